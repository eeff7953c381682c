"""Edge packs as devices read them: checked against their manifest, and mapped into memory instead of read.

    pack = open_pack(Path("packs/SmolLM2-135M"))
    codes = pack.tensors["model.layers.0.self_attn.q_proj.codes"]      # uint8, backed by the file

A pack is a directory, whose files `fedtune.edge.pack_facts` lists. All blocks of a model are alike, so one graph
serves them all; weights and factors are its inputs. An adapter of either kind is ΔW = s · B · R · A per linear layer,
where R is the identity for LoRA.
"""

from __future__ import annotations

import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.bfloat16 import round_to_bfloat16
from fedtune.core.errors import ExportError, ModelError
from fedtune.core.job.settings import AdapterSettings
from fedtune.core.protocol.model_manifest import PACK_KIND, verify
from fedtune.data.job_inputs import PACK_FACTS
from fedtune.edge.graph_files import check_self_contained
from fedtune.edge.pack_contents import BLOCK, GROUP, PACKED_PARTS, PAIRS, SCALE_LEVELS, Tensors, check_tensors
from fedtune.edge.pack_facts import GRAPHS, REMEDY, TOKENIZER, WEIGHTS, PackFacts, read_facts
from fedtune.model.shape import adapted_modules

_HEADER_LENGTH = 8
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4")}


@dataclass(frozen=True, eq=False)
class EdgePack:
    """A pack whose files are those of its manifest.

    Args:
        tensors: the base's weights by name, read-only and mapped: uint8 codes and float32.
    """

    directory: Path
    facts: PackFacts
    tensors: Tensors

    def block(self, layer: int) -> dict[str, npt.NDArray[Any]]:
        """Returns the tensors of one block, by their names within it."""
        prefix = f"{self.facts.blocks}.{layer}."
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}

    def weight(self, module: AdaptedModule, room: Vector | None = None) -> Vector:
        """Returns the unpacked weight of a linear layer: float32, (d_out, d_in), the bits that torch devices have.

        Ŵ_i = level[q_i] · (map[u_k] · t_g + m), see `fedtune.model.nf4`. A byte of codes is two weights, which are
        looked up as one number of eight bytes.

        Args:
            room: memory for it, float32, (two for each byte of codes,); None for new memory.
        """
        codes, scale_codes, steps, mean = (self.tensors[f"{module.name}.{part}"] for part in PACKED_PARTS)
        levels = np.empty(2 * len(codes), dtype=np.float32) if room is None else room
        pairs = np.ascontiguousarray(self.tensors[PAIRS]).view(np.uint64)[:, 0]
        np.take(pairs, codes, out=levels.view(np.uint64), mode="clip")  # clipping takes no second copy; none is clipped
        scales = self.tensors[SCALE_LEVELS][scale_codes] * np.repeat(steps, GROUP)[: len(scale_codes)] + mean
        blocks = levels.reshape(-1, BLOCK)
        np.multiply(blocks, scales[:, None], out=blocks)
        return levels[: module.d_out * module.d_in].reshape(module.d_out, module.d_in)

    def layout(self, settings: AdapterSettings) -> AdapterLayout:
        """Returns the layout of an adapter on this base, as torch devices compute it.

        Raises:
            ModelError: a target matches no linear layer, or the rank is over the smaller side of a layer.
        """
        modules = {module.name: module for module in adapted_modules(self.facts.shape.linear, settings)}
        if settings.kind == "lora":
            return LoraLayout(tuple(modules.values()), settings.rank, settings.alpha)
        return CoreLayout.between(
            tuple(modules.values()),
            settings.rank,
            settings.alpha,
            lambda name: round_to_bfloat16(self.weight(modules[name])),
        )


class UnpackedBlocks:
    """The base model's tensors block by block, unpacked into memory that all blocks share, or kept of each.

    A graph that unpacked them would take several times as long, and new pages of memory for each.

    Args:
        pack: base model.
        threads: number of threads, each of which unpacks some of a block's matrices.
        keep: whether to unpack each block once only.
    """

    def __init__(self, pack: EdgePack, threads: int = 1, *, keep: bool = False) -> None:
        self._pack = pack
        self._kept: dict[int, dict[str, npt.NDArray[Any]]] | None = {} if keep else None
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="unpacking")
        layers = range(pack.facts.shape.layers)
        self._others = [
            {name: each for name, each in pack.block(layer).items() if name.rpartition(".")[2] not in PACKED_PARTS}
            for layer in layers
        ]
        self._linear: list[list[tuple[str, AdaptedModule]]] = [[] for _ in layers]
        for module in pack.facts.shape.linear:
            layer, _, own = module.name.removeprefix(f"{pack.facts.blocks}.").partition(".")
            self._linear[int(layer)].append((own, module))
        sizes = {own: 2 * len(pack.tensors[f"{module.name}.codes"]) for own, module in self._linear[0]}
        self._room = {} if keep else {own: np.empty(size, dtype=np.float32) for own, size in sizes.items()}
        for linear in self._linear:  # the largest first, so that the threads end together
            linear.sort(key=lambda named: -named[1].d_in * named[1].d_out)

    def weights(self, layer: int) -> dict[str, npt.NDArray[Any]]:
        """Returns the tensors of a block by the names that its graphs have for them.

        If blocks are not kept, the next call overwrites them.
        """
        if self._kept is None:
            return self._unpack(layer)
        if layer not in self._kept:
            self._kept[layer] = self._unpack(layer)
        return self._kept[layer]

    def _unpack(self, layer: int) -> dict[str, npt.NDArray[Any]]:
        return self._others[layer] | dict(self._workers.map(self._unpacked, self._linear[layer]))

    def _unpacked(self, linear: tuple[str, AdaptedModule]) -> tuple[str, Vector]:
        own, module = linear
        return f"{own}.weight", self._pack.weight(module, self._room.get(own))


def open_pack(directory: Path) -> EdgePack:
    """Checks every file of a pack, and maps its weights.

    Raises:
        ModelError: it is no pack, or a file is missing, cut short, changed or does not fit the others; the message
            names it and the remedy.
    """
    try:
        manifest = verify(directory)
    except ExportError as error:
        raise ModelError(f"{error}; {REMEDY}") from error
    if manifest.kind != PACK_KIND or not {PACK_FACTS, *GRAPHS, WEIGHTS, TOKENIZER} <= set(manifest.files):
        raise ModelError(f"{directory}: its manifest lists only a part of an edge pack's files; {REMEDY}")
    facts = read_facts(directory)
    for name in GRAPHS:
        check_self_contained(directory / name)
    try:
        tensors = map_tensors(directory / WEIGHTS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / WEIGHTS}: not a file of weights: {error}; {REMEDY}") from error
    check_tensors(directory, facts, tensors)
    return EdgePack(directory, facts, tensors)


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Maps the tensors of a safetensors file: pages are loaded when they are first used, and may be dropped again."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = _HEADER_LENGTH + int.from_bytes(mapped[:_HEADER_LENGTH], "little")
    header = json.loads(mapped[_HEADER_LENGTH:start])
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        flat = np.frombuffer(mapped, dtype, (last - first) // dtype.itemsize, start + first)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
