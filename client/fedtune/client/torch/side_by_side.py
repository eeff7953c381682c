"""Several clients' local training side by side: one pass over the frozen base model trains all of them.

    outcomes = train_together(model, [ClientTask(examples, received, task), ...])

Each client has adapter factors, optimizer state and clipping of its own, and its own steps of its own examples; the
outcomes are those of `fedtune.client.torch.training.train_locally` up to rounding. With few examples a step, most of a
step's time is the same for one client as for several: launches of kernels on a GPU, Python on a processor.

With g_k the gradient of client k's mean loss over its own targets, (K, values), float32, one backward pass gives

    g = ∂/∂θ Σ_k Σ_t L_kt / targets_k,     row k of g has only terms of client k

since nothing in the base model mixes rows. That is no longer so, and clients must train one after another, where random
numbers are drawn for a whole batch (dropout), and where one loss scale serves all gradients (fp16).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.client.local_steps import StepSums, check_start, local_steps, not_owned, result_of
from fedtune.client.torch.many_optimizers import many_optimizer
from fedtune.client.torch.training import training_mode
from fedtune.client.trainer import ClientTask, LocalResult, Outcome
from fedtune.core.adapter.layout import Factor, Factors, Vector, factor_letters
from fedtune.core.errors import UpdateError
from fedtune.data.batches import micro_batches
from fedtune.data.examples import Example
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.loss import target_losses
from fedtune.model.side_by_side_layers import CurrentRows, ManyAdapters, PaddedRows, Stretches

_OF_THE_LONGEST = {"dynamic", "longrope"}
_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def reason_against(model: AdaptedModel) -> str | None:
    """Returns the reason why clients of this model must train one after another; None where there is none."""
    if model.base.precision == "fp16":
        return "in fp16 a loss scale follows the gradients of one client"
    if _drops_out(model.base.network):
        return "the base model has dropout, whose random numbers follow from a client's own seed"
    if kinds := _rotations(model.base.network) & _OF_THE_LONGEST:
        return f"the base model's rotary positions ({min(kinds)}) follow from the longest example of a batch"
    return None


def train_together(model: AdaptedModel, tasks: Sequence[ClientTask]) -> list[Outcome]:
    """Trains the clients of tasks with the same work and micro-batches, on a model without a `reason_against`.

    Examples, received adapters and the rank indices that clients own may differ. A client with fewer steps than others
    has the values of its own last step. One whose loss, gradient or update is not finite fails alone, with the error of
    `train_locally`.

    Returns:
        An outcome for each task; `LocalResult.seconds` is the client's share of the time that all took.

    Raises:
        MixedRowsError: the architecture mixes the rows of a batch.
    """
    start = time.perf_counter()
    outcomes: dict[int, Outcome] = {}
    for index, each in enumerate(tasks):
        try:
            check_start(each.examples, each.received)
        except UpdateError as error:
            outcomes[index] = error
    sound = [index for index in range(len(tasks)) if index not in outcomes]
    if sound:
        together = _Pass(model, [tasks[index] for index in sound])
        together.train()
        outcomes.update(zip(sound, together.outcomes((time.perf_counter() - start) / len(sound)), strict=True))
    return [outcomes[index] for index in range(len(tasks))]


class _Pass:
    """The training of K clients.

    Args:
        tasks: each has examples and a finite adapter.
    """

    def __init__(self, model: AdaptedModel, tasks: Sequence[ClientTask]) -> None:
        self._model, self._tasks = model, tasks
        self._work = tasks[0].task.work
        segment = model.layout.segment(self._work.factors)
        received = torch.from_numpy(np.stack([each.received for each in tasks])).to(model.base.device)
        self._anchor = received[:, segment].contiguous()
        self._trained = nn.Parameter(self._anchor.clone())
        self._gradient = self._trained.grad = torch.zeros_like(self._anchor)
        self._adapters = ManyAdapters(
            {letter: received[:, where] for letter, where in model.layout.segments()}
            | _by_letter(model, self._work.factors, self._trained.data),
            _by_letter(model, self._work.factors, self._gradient),
        )
        self._frozen = self._frozen_values()
        self._last: dict[int, Tensor] = {}
        self._measured: list[Tensor] = []  # of each step: losses and norms, (2, K)
        self._done: list[list[StepSums]] = [[] for _ in tasks]

    def train(self) -> None:
        """Takes all steps of all clients; nothing waits for the device before the last one."""
        model, rows = self._model, CurrentRows()
        with (
            training_mode(model, self._tasks[0].task.seed, self._work.gradient_checkpointing),
            model.side_by_side(self._adapters, rows) as layers,
        ):
            matrices = [each for layer in layers.values() for each in layer.parameters() if each.grad is not None]
            optimizer = many_optimizer(self._trained, matrices, self._work)
            for steps in self._steps():
                self._gradient.zero_()
                losses = self._accumulate(steps, rows)
                self._measured.append(torch.stack([losses, self._finish_gradient()]))
                optimizer.step()
                if self._frozen is not None and self._work.weight_decay:  # it changes values without a gradient, too
                    self._trained.data.copy_(torch.where(self._frozen, self._anchor, self._trained.data))

    def outcomes(self, seconds: float) -> Iterator[Outcome]:
        """Yields each client's outcome.

        Args:
            seconds: those that a client took.
        """
        updates = [(self._last[index] - self._anchor[index]).cpu().numpy() for index in range(len(self._tasks))]
        measured = torch.stack(self._measured).cpu().numpy().astype(np.float64)
        for index, (each, update) in enumerate(zip(self._tasks, updates, strict=True)):
            try:
                yield self._result(each, update, measured[:, :, index], self._done[index], seconds)
            except UpdateError as error:
                yield error

    def _result(
        self,
        task: ClientTask,
        update: Vector,
        measured: np.ndarray[tuple[int, int], np.dtype[np.float64]],
        done: Sequence[StepSums],
        seconds: float,
    ) -> LocalResult:
        sums = []
        for number, (step, (loss, norm)) in enumerate(zip(done, measured.tolist(), strict=False), 1):
            if not math.isfinite(loss):
                raise UpdateError(f"the loss is {loss} at local step {number}")
            if not math.isfinite(norm):
                raise UpdateError(f"the gradient's norm is {norm} at local step {number}")
            sums.append(step._replace(loss=loss))
        return result_of(update, task.examples, sums, seconds)

    def _steps(self) -> Iterator[list[list[Example]]]:
        """Yields the examples of each client's next step, none for clients that have taken all of theirs."""
        own = [local_steps(each.examples, each.task) for each in self._tasks]
        while True:
            steps = [next(each, []) for each in own]
            for index, step in enumerate(steps):
                if not step and index not in self._last:
                    self._last[index] = self._trained.detach()[index].clone()
            if not any(steps):
                return
            yield steps

    def _accumulate(self, steps: list[list[Example]], rows: CurrentRows) -> Tensor:
        """Accumulates the gradients of all clients' mean losses; returns the sums of their losses, float32, (K,)."""
        model, device = self._model, self._model.base.device
        budget = self._tasks[0].task.micro_batch_tokens or self._work.batch_tokens
        targets = [sum(example.target_tokens for example in step) for step in steps]
        cut = [micro_batches(step, budget) if step else [] for step in steps]
        losses = torch.zeros(len(steps), device=device)
        tokens = [0] * len(steps)
        for number in range(max(map(len, cut))):
            parts = [own[number] if number < len(own) else [] for own in cut]
            batch = model.lm_head.batch(*parts)
            rows.rows = Stretches(batch.stretches) if batch.stretches else PaddedRows.of(list(map(len, parts)), device)
            counts = [sum(example.target_tokens for example in part) for part in parts]
            each = target_losses(model.lm_head, batch)
            weights = [1 / whole if whole else 0.0 for whole in targets]
            lengths = torch.tensor(counts, device=device)
            per_target = torch.tensor(weights, device=device).repeat_interleave(lengths, output_size=sum(counts))
            torch.autograd.backward(each, per_target)
            losses += torch.segment_reduce(each.detach(), "sum", lengths=lengths, unsafe=True)
            for index, part in enumerate(parts):
                tokens[index] += batch.stretches[index] if batch.stretches else len(part) * batch.ids.shape[1]
        for done, whole, computed in zip(self._done, targets, tokens, strict=True):
            if computed:
                done.append(StepSums(0.0, whole, computed))
        return losses

    def _finish_gradient(self) -> Tensor:
        """Adds the proximal term, freezes what is not owned, and clips; returns each client's norm, float32, (K,)."""
        gradient = self._gradient
        if self._work.proximal:
            gradient.add_(self._trained.detach() - self._anchor, alpha=self._work.proximal)
        if self._frozen is not None:
            gradient.masked_fill_(self._frozen, 0.0)
        norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
        gradient.mul_((self._work.max_gradient_norm / (norms + _EPSILON)).clamp(max=1.0)[:, None])
        return norms

    def _frozen_values(self) -> Tensor | None:
        """Returns a mask of the values that clients do not own, (K, values); None where all own all."""
        if all(each.task.owned is None for each in self._tasks):
            return None
        masks = np.zeros(self._anchor.shape, dtype=np.bool_)
        for mask, each in zip(masks, self._tasks, strict=True):
            if each.task.owned is not None:
                mask[:] = not_owned(self._model.layout, self._work.factors, each.task.owned)
        return torch.from_numpy(masks).to(self._anchor.device)


def _by_letter(model: AdaptedModel, factors: Factors, values: Tensor) -> dict[Factor, Tensor]:
    """Returns the values (K, segment of these factors) by factor."""
    start = model.layout.segment(factors).start
    places = {letter: model.layout.segment(letter) for letter in factor_letters(factors)}
    return {letter: values[:, where.start - start : where.stop - start] for letter, where in places.items()}


def _rotations(network: nn.Module) -> set[str]:
    """Returns the kinds of rotary positions in a network, by transformers' names; layers may differ."""
    said = [getattr(module, "rope_type", None) for module in network.modules()]
    return {str(kind) for each in said if each for kind in (each.values() if isinstance(each, dict) else [each])}


def _drops_out(network: nn.Module) -> bool:
    """Returns whether any part of a network draws dropout in training, as a layer or by a rate of its own."""
    rates = (
        value
        for module in network.modules()
        for name, value in vars(module).items()
        if (name == "p" and isinstance(module, nn.Dropout)) or "dropout" in name
    )
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)
