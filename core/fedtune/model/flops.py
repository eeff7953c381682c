"""The floating-point operations of training and scoring, counted from a model's sizes.

With N_lin parameters of all linear layers, L blocks of query width q and key width k, width d, vocabulary V, M adapted
layers with F values of A and B at rank r, of which P are trained, and examples of s tokens, a token takes

    forward     2·N_lin + 4·L·s·q + 2·F + 2·M·r² (core only)      frozen weights, attention, the adapter
    inputs      2·(N_lin - d·(q + 2k)) + 8·L·s·q + 2·F + 2·M·r² (core only)    gradients to what each layer received;
                                                                  the first block's input has none
    adapter     2·P                                               gradients of the trained values
    head        2·V·d forward, 2·V·d backward                     only of tokens that the loss counts

A multiplication and an addition count as two; attention counts all pairs of tokens, as kernels without a causal mask
compute them. With gradient checkpointing the forward pass of the blocks counts twice. Norms, activation functions, the
optimizer, and unpacking of quantized weights are left out: they have no products of matrices. The first block's layers
also need no gradient through their adapters, which this leaves in: 2·r of each of their d inputs; nor does an MLP that
stands beside the first attention, as in GPT-NeoX.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.adapter.layout import AdaptedModule, AdapterKind, Factors
from fedtune.core.job.settings import AdapterSettings
from fedtune.model.shape import ModelShape, adapted_modules


@dataclass(frozen=True)
class ExampleLengths:
    """The mean length of examples.

    Args:
        tokens: tokens of an example, padding included.
        targets: those that the loss counts.
    """

    tokens: float
    targets: float


@dataclass(frozen=True)
class Flops:
    """The operations of a base model with an adapter.

    Args:
        shape: the base's sizes.
        adapted: the layers that have an adapter.
        rank: r, the adapter's own: a device that trains fewer rank indices computes with all of them.
    """

    shape: ModelShape
    adapted: tuple[AdaptedModule, ...]
    kind: AdapterKind
    rank: int

    @classmethod
    def of(cls, shape: ModelShape, settings: AdapterSettings) -> Flops:
        """Returns the operations of a job's model."""
        return cls(shape, adapted_modules(shape.linear, settings), settings.kind, settings.rank)

    def scored(self, lengths: ExampleLengths) -> float:
        """Returns the operations of scoring one example."""
        return lengths.tokens * self._forward(lengths.tokens) + lengths.targets * self._head

    def trained(self, lengths: ExampleLengths, factors: Factors, recomputed: bool = False) -> float:
        """Returns the operations of training on one example.

        Args:
            factors: factors that are trained.
            recomputed: whether activations are computed again instead of kept.
        """
        forward = (2.0 if recomputed else 1.0) * self._forward(lengths.tokens)
        token = forward + self._inputs(lengths.tokens) + 2.0 * self._trained_values(factors)
        return lengths.tokens * token + lengths.targets * 2.0 * self._head

    @property
    def _head(self) -> float:
        return 2.0 * self.shape.vocabulary * self.shape.width

    @property
    def _adapter(self) -> float:
        """The operations per token of the adapter's own products, forward or to its inputs."""
        factors = self.rank * sum(module.d_in + module.d_out for module in self.adapted)
        return 2.0 * factors + (2.0 * len(self.adapted) * self.rank**2 if self.kind == "core" else 0.0)

    def _forward(self, length: float) -> float:
        shape = self.shape
        return 2.0 * shape.linear_parameters + 4.0 * shape.layers * length * shape.query_width + self._adapter

    def _inputs(self, length: float) -> float:
        shape = self.shape
        first = shape.width * (shape.query_width + 2 * shape.kv_width)
        products = 2.0 * (shape.linear_parameters - first)
        return products + 8.0 * shape.layers * length * shape.query_width + self._adapter

    def _trained_values(self, factors: Factors) -> int:
        sizes = {
            "a": self.rank * sum(module.d_in for module in self.adapted),
            "b": self.rank * sum(module.d_out for module in self.adapted),
            "r": self.rank**2 * len(self.adapted),
        }
        return sum(sizes[letter] for letter in factors)
