"""Formulas for the memory and time of a training step, from a model's sizes and a plan's choices.

With n tokens a micro-batch, β the arithmetic's bytes a value, P trained parameters of the whole adapter, and F values
of its factors A and B, which are trained (then P = F) or fixed:

    resident       N_lin·w + N_other·β + 8P                    w: NF4 0.516, int4 0.641, or β; adapter, its gradient
    adapter        8P + 8P + F·β                               Adam's moments; received and sent; the factors in β
    core           4F + min(24 · the largest linear layer, 32 MiB)     fixed factors in float32, and their computation
    activations    L·n·[8d + 2βd + 4(q + 2k) + 4q + βq + m·βf]     q, k: query and key width; m = 4 gated, otherwise 2
      of which     two norms in float32 and their outputs, attention in float32, its output, the MLP
      checkpointed L·n·βd + one layer of the above
    transient      n·β·(5f + 4d) + 2β · the largest linear layer   one layer's backward pass
    head           12 · chunk · V + 3·β·n·d                    logits, their softmax and its gradient, in float32
    peak           resident + adapter + FLOOR + κ·HEAP·(activations + transient + head)        CPU
                   resident + adapter + κ·(activations + max(transient, head))                 GPU, its own allocator

A base in an edge pack is computed block by block, with attention's matrices, in float32 (`fedtune.client.onnx`). Its
weights are mapped from a file: the kernel drops their pages where memory is short and reads them again, so they count
beside the peak and not in it. With H heads and examples of s tokens:

    resident       4·N_lin                            where the weights are unpacked once
    activations    4·(L + 4)·n·d                      of every block, and the states and gradients between them
      and          L·n·4·(2f + d + 2q + 2k + s·H)     where they are kept, see `fedtune.edge.graph_cut`
    block          2.5 · n · one layer of the above + 2·4·n·s·H         its backward pass
      and          4·N_lin/L                          one block's weights, where each is unpacked for every use
    head           12 · chunk · V                     of at most PACK_CHUNK_LOGITS logits
    adapter        26P, the fixed factors, and TOKENIZER·V
    peak           resident + adapter + SESSIONS + κ·(activations + block + head)

The constants were fitted to measurements, see benchmarks/plan: glibc's heap does not give a phase's blocks back to the
next, so on CPUs the phases add up, and fragmentation costs a factor HEAP. On GPUs attention works in β. κ is a device's
correction, measured over predicted, from one trial step. Time is operations over a measured rate:

    forward   2·N_lin + 2·V·d·share + 4·L·s·q     a token: products with frozen weights, logits of targets, attention
    backward  2·N_lin + 2·V·d·share + 8·L·s·q     input gradients only; frozen weights have none
    recompute the forward pass of the blocks, where activations are checkpointed
    adapter   2·P + 4·F
    unpacking 2·UNPACKING·N_lin, once a micro-batch instead of a token, where weights of a pack are not unpacked once

A step is slower than its largest product alone; benchmarks/plan measured EFFICIENCY. One trial step
replaces the whole estimate of time, per device and model. The constants of edge packs were fitted by hand to steps on
three bases, the demo's, SmolLM2-135M and one of 520 million parameters: 2% too little to 32% too much on the larger
two, most with few tokens, and on the demo 13% too little to 44% too much, where the heap decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.adapter.layout import AdapterKind
from fedtune.model.shape import MAX_CHUNK_LOGITS, PACK_CHUNK_LOGITS, ModelShape, Precision, Weights

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PACKED_BYTES = {"nf4": 4.127 / 8, "int4": 5.125 / 8}  # of a number in a packed base
HEAP = 1.3
FLOOR = 5 << 20  # code and tables that the first step of a process brings in
FACTORISER_BYTES = 24  # per parameter of the layer whose fixed factors are computed: three copies in float64
KEPT_BLOCK = 32 << 20  # glibc gives larger blocks back to the system
QUANTIZER_BYTES = 20  # per parameter of the layer that is being packed
EFFICIENCY = 0.35
PACKED_SLOWDOWN = 1.3  # of unpacking the weights for every product on CPUs
SESSIONS = 16 << 20  # an edge pack's graphs, and blocks of the heap that their first runs leave
BLOCK_COPIES, ATTENTION_COPIES = 2.5, 2.0  # of a block's values in its backward pass
TOKENIZER, TOKENIZER_FILE = 300, 800  # bytes of a token, held and while the tokenizer is read
UNPACKING = 400.0  # operations in the time of unpacking one weight of an edge pack
PACK_EFFICIENCY = 1.3  # onnxruntime's products are faster than those of numpy that are measured

PACK_WEIGHTS: tuple[Weights, ...] = ("mapped", "unpacked")  # of edge packs

Form = tuple[Weights, bool]
"""A format of the linear weights, and whether activations are computed again instead of kept."""


@dataclass(frozen=True)
class Choices:
    """The choices of a plan that determine memory and time.

    Args:
        rank: rank of the loaded adapter; a lower tier freezes part of it, and the memory stays.
        sequence_length: length of the longest example.
        tokens: n, tokens of a micro-batch, padding included.
        kind: kind of the adapter.
        quantization: the base's format, "nf4", "int4" or "none".
        threads: number of the library's threads on a processor.
    """

    weights: Weights
    precision: Precision
    rank: int
    sequence_length: int
    tokens: int
    checkpointing: bool
    cuda: bool = False
    kind: AdapterKind = "lora"
    quantization: str = "nf4"
    threads: int = 1


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted bytes over those that the process takes before it loads the model.

    Args:
        weights: the frozen base.
        adapter: factors, gradient, Adam's moments and copies.
        activations: activations kept for the backward pass.
        working: a layer's backward pass, the head, and the allocator's overhead.
        loading: the peak while the model is read and packed.
        mapped: weights in a file that is mapped, in none of the others; the kernel may drop them at any time.
    """

    weights: int
    adapter: int
    activations: int
    working: int
    loading: int
    mapped: int = 0

    @property
    def training(self) -> int:
        """The peak of training."""
        return self.weights + self.adapter + self.activations + self.working

    @property
    def peak(self) -> int:
        """The higher of the two peaks."""
        return max(self.training, self.loading)


def predict_memory(
    shape: ModelShape, choices: Choices, *, target_share: float = 1.0, kappa: float = 1.0
) -> MemoryPrediction:
    """Evaluates the memory formula above.

    Args:
        target_share: share of tokens that the loss counts; only those have logits.
        kappa: κ of this device and model.
    """
    if choices.weights in PACK_WEIGHTS:
        return _predict_pack(shape, choices, target_share, kappa)
    beta = VALUE_BYTES[choices.precision]
    tokens, width = choices.tokens, shape.width
    linear_bytes = PACKED_BYTES[choices.quantization] if choices.weights == "packed" else beta
    weights = shape.linear_parameters * linear_bytes + shape.other_parameters * beta
    factors = shape.factor_parameters(choices.rank)
    computed = FACTORISER_BYTES * shape.largest_linear if choices.kind == "core" else 0
    fixed = 4 * factors + min(computed, KEPT_BLOCK) if choices.kind == "core" else 0
    adapter = 24 * shape.adapter_parameters(choices.kind, choices.rank) + beta * factors + fixed
    layer = tokens * layer_bytes_per_token(shape, beta, choices.cuda)
    activations = shape.layers * layer
    if choices.checkpointing:
        activations = shape.layers * tokens * width * beta + layer
    transient = tokens * beta * (5 * shape.mlp_width + 4 * width) + 2 * beta * shape.largest_linear
    targets = max(1.0, tokens * target_share)
    chunk = min(targets, max(1, MAX_CHUNK_LOGITS // shape.vocabulary))
    head = 12 * chunk * shape.vocabulary + 3 * beta * targets * width
    if choices.cuda:
        working, floor, heap, loading = max(transient, head), 0, 1.0, weights  # packed on the CPU, then moved
    else:
        working, floor, heap = transient + head, FLOOR, HEAP
        loading = shape.file_bytes + weights + max(shape.largest_linear * QUANTIZER_BYTES, computed)
    waste = (kappa * heap - 1.0) * (activations + working)
    return MemoryPrediction(
        round(weights), round(adapter), round(activations), round(working + waste + floor), round(loading)
    )


def _predict_pack(shape: ModelShape, choices: Choices, target_share: float, kappa: float) -> MemoryPrediction:
    beta, tokens, width = VALUE_BYTES["fp32"], choices.tokens, shape.width
    core = choices.kind == "core"
    fixed = beta * shape.factor_parameters(choices.rank) if core else 0
    computed = FACTORISER_BYTES * shape.largest_linear if core else 0
    adapter = 26 * shape.adapter_parameters(choices.kind, choices.rank) + fixed + TOKENIZER * shape.vocabulary
    weights = beta * shape.linear_parameters if choices.weights == "unpacked" else 0
    activations = beta * (shape.layers + 4) * tokens * width
    if not choices.checkpointing:
        attention = 2 * (shape.query_width + shape.kv_width) + shape.heads * choices.sequence_length
        activations += beta * shape.layers * tokens * ((2 if shape.gated else 1) * shape.mlp_width + width + attention)
    block = (
        BLOCK_COPIES * tokens * layer_bytes_per_token(shape, beta)
        + ATTENTION_COPIES * beta * tokens * choices.sequence_length * shape.heads
        + (0 if weights else beta * shape.linear_parameters / shape.layers)
    )
    chunk = min(max(1.0, tokens * target_share), max(1, PACK_CHUNK_LOGITS // shape.vocabulary))
    head = 12 * chunk * shape.vocabulary
    working = kappa * (activations + block + head) - activations + SESSIONS
    loading = SESSIONS + weights + fixed + max(computed, TOKENIZER_FILE * shape.vocabulary)
    return MemoryPrediction(
        weights, round(adapter), round(activations), round(working), round(loading), shape.file_bytes
    )


def layer_bytes_per_token(shape: ModelShape, beta: int, cuda: bool = False) -> int:
    """Returns the bytes that one transformer block keeps per token for its backward pass."""
    attention = beta if cuda else 4
    norms = 8 * shape.width + 2 * beta * shape.width
    heads = attention * (2 * shape.query_width + 2 * shape.kv_width) + beta * shape.query_width
    return norms + heads + (4 if shape.gated else 2) * beta * shape.mlp_width


def kappa_of(shape: ModelShape, choices: Choices, measured_training: int, *, target_share: float = 1.0) -> float:
    """Returns the κ that makes the predicted training peak equal to the one measured over the same baseline."""
    once, twice = (
        predict_memory(shape, choices, target_share=target_share, kappa=kappa).training for kappa in (1.0, 2.0)
    )
    changing = max(twice - once, 1)  # the peak is linear in κ
    return max(measured_training - (once - changing), 1) / changing


def operations_per_token(shape: ModelShape, choices: Choices, target_share: float = 1.0) -> float:
    """Returns the floating-point operations per token of a training step."""
    products = 2.0 * shape.linear_parameters
    attention = 4.0 * shape.layers * choices.sequence_length * shape.query_width
    head = 2.0 * shape.vocabulary * shape.width * target_share
    adapter = 2.0 * shape.adapter_parameters(choices.kind, choices.rank) + 4.0 * shape.factor_parameters(choices.rank)
    recompute = products + attention if choices.checkpointing else 0.0
    return 2 * products + 3 * attention + 2 * head + recompute + adapter


def step_seconds(shape: ModelShape, choices: Choices, rate: float, tokens: int, target_share: float = 1.0) -> float:
    """Returns the seconds of a step of `tokens` tokens on a device whose products reach `rate` operations a second."""
    operations = tokens * operations_per_token(shape, choices, target_share)
    if choices.weights in PACK_WEIGHTS:
        unpacking = 2 * UNPACKING * shape.linear_parameters if choices.weights == "mapped" else 0.0
        return (operations + unpacking) / (rate * PACK_EFFICIENCY)
    seconds = operations / (rate * EFFICIENCY)
    return seconds * (PACKED_SLOWDOWN if choices.weights == "packed" else 1.0)
