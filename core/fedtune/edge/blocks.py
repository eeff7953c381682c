"""The functions that an edge pack's graphs compute: one block with its gradients, and the head.

Per adapted linear layer with input x of shape (n, d_in), and weight Ŵ of shape (d_out, d_in), which a device unpacks:

    y = x Ŵᵀ + bias + (s (x Aᵀ) Rᵀ) Bᵀ          A: (r, d_in), R: (r, r), B: (d_out, r)

Every tensor is an input, by name, so that one graph serves all blocks, all adapters and all ranks. LoRA has R = I.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.edge.pack_contents import BLOCK, PAIRS, SCALE_LEVELS
from fedtune.edge.pack_facts import Y_GRADIENT, Y
from fedtune.model.base_model import BaseModel
from fedtune.model.nf4 import LEVELS, NF4Weight, scale_map
from fedtune.model.packed import PackedLinear

FACTORS = ("lora_a", "core", "lora_b")
SCALING = "scaling"
_TRACED_BATCH, _TRACED_LENGTH, _TRACED_RANK = 3, 24, 5  # sizes that no other dimension of a model has

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class GraphFunction:
    """A function to be written as a graph.

    Args:
        compute: the function, from the inputs by name to the outputs.
        inputs: name -> an example.
        outputs: names of the outputs.
        dynamic: name of an input -> its axes of any size.
    """

    compute: Callable[[Named], Sequence[Tensor]]
    inputs: Named
    outputs: tuple[str, ...]
    dynamic: Mapping[str, tuple[int, ...]]


def unpacking_tables() -> dict[str, Tensor]:
    """Returns the tables that unpack NF4: a byte's two levels, (256, 2), and the levels of a scale, (256,); float32."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    pairs = torch.stack([levels.repeat_interleave(len(levels)), levels.repeat(len(levels))], dim=1)
    return {PAIRS: pairs, SCALE_LEVELS: scale_map()}


def packed_tensors(layer: PackedLinear[NF4Weight]) -> dict[str, Tensor]:
    """Returns the tensors of a packed layer by name, the codes filled up to whole blocks."""
    tensors = dict(layer.packed.tensors)
    missing = len(tensors["scale_codes"]) * BLOCK // 2 - len(tensors["codes"])
    tensors["codes"] = nn.functional.pad(tensors["codes"], (0, missing))
    return tensors if layer.bias is None else tensors | {"bias": layer.bias.detach()}


class TracedLinear(nn.Module):
    """An adapted linear layer whose tensors are all replaced by inputs of the graph while it is traced."""

    def __init__(self, layer: PackedLinear[NF4Weight]) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        d_out, d_in = self.shape
        factors = {
            "lora_a": torch.zeros(_TRACED_RANK, d_in),
            "core": torch.zeros(_TRACED_RANK, _TRACED_RANK),
            "lora_b": torch.zeros(d_out, _TRACED_RANK),
        }
        self.biased = layer.bias is not None
        bias = {"bias": layer.bias.detach()} if layer.bias is not None else {}
        tensors = {"weight": torch.zeros(self.shape), **bias, **factors, SCALING: torch.zeros(())}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        bias = self.get_buffer("bias") if self.biased else None
        weight, lora_a, core, lora_b, scaling = (self.get_buffer(name) for name in ("weight", *FACTORS, SCALING))
        rows = x.reshape(-1, x.shape[-1])  # once, instead of around every product
        thin = scaling * ((rows @ lora_a.T) @ core.T)
        y = nn.functional.linear(rows, weight, bias) + thin @ lora_b.T
        return y.reshape(*x.shape[:-1], y.shape[-1])


class TracedBlock:
    """The block of a base model, as functions of named tensors.

    Args:
        base: base model with packed weights, whose blocks are alike; its network must compute eager attention.
    """

    def __init__(self, base: BaseModel) -> None:
        network = base.network.base_model
        self._layer = copy.deepcopy(network.layers[0])
        self._linear = [name for name, module in self._layer.named_modules() if isinstance(module, PackedLinear)]
        for name in self._linear:
            parent, _, leaf = name.rpartition(".")
            owner = self._layer.get_submodule(parent)
            setattr(owner, leaf, TracedLinear(getattr(owner, leaf)))
        config = base.network.config.get_text_config()
        sliding = "full_attention" not in (getattr(config, "layer_types", None) or ())
        self._window = getattr(config, "sliding_window", None) if sliding else None
        self._factors = [f"{name}.{factor}" for name in self._linear for factor in FACTORS]
        shared = {f"{linear}.{SCALING}" for linear in self._linear}
        tensors = {**dict(self._layer.named_parameters()), **dict(self._layer.named_buffers())}
        self._own = [name for name in tensors if name not in shared]
        states = torch.zeros(_TRACED_BATCH, _TRACED_LENGTH, int(config.hidden_size))
        cosines, sines = network.rotary_emb(states, torch.arange(_TRACED_LENGTH)[None])
        self._inputs = {
            "x": states,
            "cosines": cosines,
            "sines": sines,
            SCALING: torch.ones(()),
            **{name: tensors[name].detach() for name in self._own},
        }
        ranks = {"lora_a": (0,), "core": (0, 1), "lora_b": (1,)}
        self._dynamic = {
            "x": (0, 1),
            "cosines": (1,),
            "sines": (1,),
            **{name: ranks[name.rpartition(".")[2]] for name in self._factors},
        }

    @property
    def step(self) -> GraphFunction:
        """The block's outputs y, (batch, length, d), and given their gradient, those of x and of every factor."""

        def compute(inputs: Named) -> Sequence[Tensor]:
            leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", *self._factors)}
            y = self._block({**inputs, **leaves})
            given = inputs[Y_GRADIENT]
            return y.detach(), *torch.autograd.grad(y, list(leaves.values()), given, materialize_grads=True)

        outputs = (Y, *(f"{name}_gradient" for name in ("x", *self._factors)))
        inputs = {**self._inputs, Y_GRADIENT: torch.zeros_like(self._inputs["x"])}
        return GraphFunction(compute, inputs, outputs, {**self._dynamic, Y_GRADIENT: (0, 1)})

    def _block(self, inputs: Named) -> Tensor:
        x = inputs["x"]
        replaced = {name: inputs[name] for name in self._own}
        replaced |= {f"{linear}.{SCALING}": inputs[SCALING] for linear in self._linear}
        rows = torch.arange(x.shape[1])
        visible = rows[None, :] <= rows[:, None]
        if self._window is not None:
            visible = visible & (rows[None, :] > rows[:, None] - self._window)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        options = {"attention_mask": mask, "position_embeddings": (inputs["cosines"], inputs["sines"])}
        result: Tensor = torch.func.functional_call(self._layer, replaced, (x,), options)
        return result


def head_function(base: BaseModel) -> GraphFunction:
    """Returns the function from hidden states before targets, (n, d), and the targets, int64, (n,), to

    losses, (n,): the cross-entropies;   right, bool, (n,): whether the target is the likeliest token;
    x_gradient, (n, d): that of the losses' sum.

    With logits z = h Wᵀ of normed states h, the gradient of h is softmax(z) W - W[target].
    """
    norm: nn.Module = base.network.base_model.norm
    parameters = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    weight = base.head.get_parameter("weight").detach()

    def compute(inputs: Named) -> Sequence[Tensor]:
        head, targets = inputs["head"], inputs["targets"]
        leaf = inputs["x"].detach().requires_grad_()
        normed = torch.func.functional_call(norm, {name: inputs[name] for name in parameters}, (leaf,))
        logits = normed.detach() @ head.T
        logs = torch.log_softmax(logits, dim=-1)
        losses = -logs.gather(1, targets[:, None])[:, 0]
        by_normed = logs.exp() @ head - nn.functional.embedding(targets, head)
        (gradient,) = torch.autograd.grad(normed, leaf, by_normed)
        return losses, logits.argmax(dim=1) == targets, gradient

    inputs = {
        "x": torch.zeros(_TRACED_LENGTH, weight.shape[1]),
        "targets": torch.zeros(_TRACED_LENGTH, dtype=torch.int64),
        "head": weight,
        **parameters,
    }
    return GraphFunction(compute, inputs, ("losses", "right", "x_gradient"), {"x": (0,), "targets": (0,)})


def block_parameters(base: BaseModel) -> dict[str, Any]:
    """Returns every tensor of the blocks by its name in the base model, linear weights packed."""
    tensors: dict[str, Any] = {}
    layers: nn.ModuleList = base.network.base_model.layers
    for name, module in layers.named_modules(prefix="layers"):
        if isinstance(module, PackedLinear):
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed_tensors(module).items()}
        else:
            tensors |= {f"{name}.{part}": each.detach() for part, each in module.named_parameters(recurse=False)}
    return tensors
