"""A base model in an edge pack with one adapter, computed by onnxruntime block by block.

    network = EdgeNetwork(pack, pack.layout(job.adapter))
    network.load(vector)
    loss = network.add_gradient(batch, 1 / targets, "ab", gradient)

A training pass keeps what the blocks' backward graphs need, or only the input of each block, from which the forward
graph then computes it again. In the second case the memory is one block's activations and unpacked weights, its inputs
once per layer, and the packed weights, which are mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdapterLayout, Extent, Factor, Factors, Vector, factor_letters
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.errors import ModelError
from fedtune.data.batches import Batch
from fedtune.edge.pack import EdgePack, UnpackedBlocks
from fedtune.edge.pack_contents import FREQUENCIES
from fedtune.edge.pack_facts import BACKWARD, FORWARD, HEAD, REMEDY, Y_GRADIENT, Y
from fedtune.model.shape import PACK_CHUNK_LOGITS

_NAMES: dict[Factor, str] = {"a": "lora_a", "b": "lora_b", "r": "core"}  # of a factor's input in the graphs
_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}  # onnxruntime's names

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Block:
    """One block: its number, the adapter's factors by name, and the extent of each of them in the adapter's vector."""

    layer: int
    factors: dict[str, Array]
    extents: dict[str, Extent]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A block's forward pass: its input, and the values that were kept of it; none where they are computed again."""

    block: _Block
    x: Vector
    kept: list[Array]


class EdgeNetwork:
    """Computes losses and gradients.

    Args:
        pack: base model.
        layout: layout of the adapter's vector.
        threads: number of threads of onnxruntime, and of those that unpack weights.
        unpacked: whether to keep the unpacked weights of all blocks, instead of unpacking each for every use.

    Raises:
        ModelError: onnxruntime is too old for the pack's graphs or cannot load them, or they do not fit its tensors.
    """

    def __init__(self, pack: EdgePack, layout: AdapterLayout, threads: int = 1, *, unpacked: bool = False) -> None:
        check_runtime(pack, onnxruntime.__version__)
        self.pack = pack
        self.layout = layout
        self._forward, self._backward, self._head = (
            _session(pack, name, threads) for name in (FORWARD, BACKWARD, HEAD)
        )
        self._kept = [each.name for each in self._forward.get_outputs() if each.name != Y]
        prefix = f"{pack.facts.norm}."
        self._norm = {name.removeprefix(prefix): each for name, each in pack.tensors.items() if name.startswith(prefix)}
        self._scaling = np.asarray(layout.scaling, dtype=np.float32)
        self._extents = _extents(layout)
        self._unpacked = UnpackedBlocks(pack, threads, keep=unpacked)
        self.load(np.zeros(layout.size, dtype=np.float32))
        self._check_inputs()

    def extents(self, factors: Factors) -> list[Extent]:
        """Returns the extents of the named factors' matrices in the adapter's vector."""
        return [each[letter] for letter in factor_letters(factors) for each in self._extents.values()]

    def load(self, vector: Vector) -> None:
        """Takes the adapter's values from a flat vector, float32, (layout.size,), without a copy."""
        self.layout.check(vector)
        self._blocks = [self._block(layer, vector) for layer in range(self.pack.facts.shape.layers)]

    def add_gradient(
        self, batch: Batch, scale: float, factors: Factors, gradient: Vector, *, checkpointing: bool = False
    ) -> float:
        """Adds the gradient of scale · Σ cross-entropies to `gradient`, and returns the sum of the cross-entropies.

        Args:
            factors: factors whose gradients are computed.
            gradient: float32, (layout.size,), changed in place.
            checkpointing: whether activations are computed again instead of kept.
        """
        states, passes = self._embedded(batch.ids), []
        for block in self._blocks:
            keep = bool(block.extents) and not checkpointing
            results = self._run(self._forward, [Y, *self._kept] if keep else [Y], self._feeds(block, states))
            passes.append(_Pass(block, states, results[1:]))
            states = results[0]
        flat = states.reshape(-1, states.shape[-1])
        backward = np.zeros_like(flat)
        loss = 0.0
        for rows in self._chunks(batch):
            places = batch.positions[rows]
            losses, by_states = self._run_head(["losses", "x_gradient"], flat[places], batch.targets[rows])
            backward[places] = by_states * np.float32(scale)
            loss += float(losses.sum(dtype=np.float64))
        wanted = [_NAMES[letter] for letter in factor_letters(factors)]
        y_gradient = backward.reshape(states.shape)
        first = next(index for index, block in enumerate(self._blocks) if block.extents)
        for layer in range(len(self._blocks) - 1, first - 1, -1):
            done = passes.pop()
            trained = [name for name in done.block.extents if name.rpartition(".")[2] in wanted]
            outputs = [f"{name}_gradient" for name in trained]
            if layer > first:
                outputs.append("x_gradient")
            feeds = self._feeds(done.block, done.x)
            kept = done.kept or self._run(self._forward, self._kept, feeds)
            feeds |= {Y_GRADIENT: y_gradient, **dict(zip(self._kept, kept, strict=True))}
            results = self._run(self._backward, outputs, feeds)
            if layer > first:
                y_gradient = results.pop()
            for name, values in zip(trained, results, strict=True):
                gradient[done.block.extents[name].where] += values.reshape(-1)
        return loss

    def score(self, batch: Batch) -> tuple[Vector, npt.NDArray[np.bool_]]:
        """Returns per target its cross-entropy, float32, and whether it is the likeliest token; both (targets,)."""
        states = self._embedded(batch.ids)
        for block in self._blocks:
            (states,) = self._run(self._forward, [Y], self._feeds(block, states))
        flat = states.reshape(-1, states.shape[-1])
        results = [
            self._run_head(["losses", "right"], flat[batch.positions[rows]], batch.targets[rows])
            for rows in self._chunks(batch)
        ]
        return np.concatenate([losses for losses, _ in results]), np.concatenate([right for _, right in results])

    def _embedded(self, ids: npt.NDArray[np.int64]) -> Vector:
        """Returns the input of the first block: float32, (batch, length, d)."""
        facts = self.pack.facts
        states = self.pack.tensors[facts.embedding][ids]
        return states * np.float32(facts.embedding_scale) if facts.embedding_scale != 1.0 else states

    def _check_inputs(self) -> None:
        """Checks that the graphs take the tensors that this network has.

        Raises:
            ModelError: an input of a graph has no tensor, or one of another shape or type.
        """
        states = np.zeros((1, 2, self.pack.facts.shape.width), dtype=np.float32)
        for block in self._blocks:
            feeds = self._feeds(block, states)
            _check(self.pack, FORWARD, self._forward, feeds)
            _check(self.pack, BACKWARD, self._backward, {**feeds, Y_GRADIENT: states}, self._kept)
        _check(self.pack, HEAD, self._head, self._head_feeds(states[0], np.zeros(2, dtype=np.int64)))

    def _run(self, session: Any, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        results: list[Array] = session.run(outputs, feeds, _only_needed())
        return results

    def _run_head(self, outputs: Sequence[str], states: Vector, targets: npt.NDArray[np.int64]) -> list[Array]:
        return self._run(self._head, outputs, self._head_feeds(states, targets))

    def _feeds(self, block: _Block, x: Vector) -> dict[str, Array]:
        cosines, sines = self._rotations(x.shape[1])
        shared = {"x": x, "cosines": cosines, "sines": sines, "scaling": self._scaling}
        return shared | self._unpacked.weights(block.layer) | block.factors

    def _head_feeds(self, states: Vector, targets: npt.NDArray[np.int64]) -> dict[str, Array]:
        return {"x": states, "targets": targets, "head": self.pack.tensors[self.pack.facts.head], **self._norm}

    def _rotations(self, length: int) -> tuple[Vector, Vector]:
        """Returns the rotary embedding's cosines and sines: float32, (1, length, head width)."""
        angles = np.arange(length, dtype=np.float32)[:, None] * self.pack.tensors[FREQUENCIES]
        angles = np.concatenate([angles, angles], axis=1)[None]
        scale = np.float32(self.pack.facts.rope_scale)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def _chunks(self, batch: Batch) -> Iterator[slice]:
        """Yields the fewest equal parts of the targets whose logits may exist at once."""
        most, count = max(1, PACK_CHUNK_LOGITS // self.pack.facts.shape.vocabulary), len(batch.targets)
        size = -(-count // max(1, -(-count // most)))
        for start in range(0, count, size):
            yield slice(start, start + size)

    def _block(self, layer: int, vector: Vector) -> _Block:
        """Returns a block with the adapter's factors; a layer that is not adapted gets B = 0."""
        rank, prefix = self.layout.rank, f"{self.pack.facts.blocks}.{layer}."
        factors: dict[str, Array] = {}
        extents: dict[str, Extent] = {}
        for module in self.pack.facts.shape.linear:
            if not module.name.startswith(prefix):
                continue
            own = module.name.removeprefix(prefix)
            trained = {
                f"{own}.{_NAMES[letter]}": extent for letter, extent in self._extents.get(module.name, {}).items()
            }
            lora_a, lora_b = self._fixed(module.name) or (
                np.zeros((rank, module.d_in), dtype=np.float32),
                np.zeros((module.d_out, rank), dtype=np.float32),
            )
            factors |= {f"{own}.lora_a": lora_a, f"{own}.core": np.eye(rank, dtype=np.float32), f"{own}.lora_b": lora_b}
            factors |= {name: vector[extent.where].reshape(extent.shape) for name, extent in trained.items()}
            extents |= trained
        return _Block(layer, factors, extents)

    def _fixed(self, module: str) -> tuple[Vector, Vector] | None:
        return self.layout.fixed.pairs.get(module) if isinstance(self.layout, CoreLayout) else None


def check_runtime(pack: EdgePack, version: str) -> None:
    """Checks that an onnxruntime of this version runs the pack's graphs.

    Raises:
        ModelError: it is older than the facts say.
    """
    needed = pack.facts.onnxruntime
    if _numbers(version) < _numbers(needed):
        raise ModelError(
            f"{pack.directory}: needs onnxruntime {needed} or later, and {version} is installed; "
            f"run: pip install 'onnxruntime>={needed}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _session(pack: EdgePack, name: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # an arena keeps the largest block's activations of every batch shape
    # Its threads would spin while numpy computes, between two calls of a session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(pack.directory / name, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{pack.directory / name}: onnxruntime cannot load it: {reason}") from error


def _check(pack: EdgePack, name: str, session: Any, feeds: Mapping[str, Array], computed: Collection[str] = ()) -> None:
    path = pack.directory / name
    inputs = {each.name: each for each in session.get_inputs() if each.name not in computed}
    if inputs.keys() != feeds.keys():
        differing = ", ".join(sorted(inputs.keys() ^ feeds.keys()))
        raise ModelError(f"{path}: the graph and the pack's tensors differ in {differing}; {REMEDY}")
    for key, array in feeds.items():
        given, needed = (_TYPES.get(array.dtype.name, array.dtype.name), array.shape), inputs[key]
        fits = len(needed.shape) == array.ndim and all(
            not isinstance(size, int) or size == own for size, own in zip(needed.shape, array.shape, strict=True)
        )
        if given[0] != needed.type or not fits:
            raise ModelError(
                f"{path}: {key} is {given[0]} of shape {given[1]}; the graph takes {needed.type} of shape "
                f"{tuple(needed.shape)}; {REMEDY}"
            )


def _only_needed() -> Any:
    """Returns options with which a session computes no output that is not asked for."""
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def _extents(layout: AdapterLayout) -> dict[str, dict[Factor, Extent]]:
    """Returns module name -> its trained factors and their extents."""
    if isinstance(layout, CoreLayout):
        return {name: {"r": extent} for name, extent in layout.extents.items()}
    return {name: {"a": a, "b": b} for name, (a, b) in lora_layout(layout).extents.items()}
