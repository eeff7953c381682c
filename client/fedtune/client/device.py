"""A device that answers training and evaluation requests of its clients with one base model in memory.

A live device has one client; in a simulation a thousand clients take turns on one device and one base model, or train
side by side on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fedtune.client.client_store import ClientStore
from fedtune.client.trainer import LocalResult, LocalTask, Trainer
from fedtune.core.adapter.basis import Basis, align_update, basis_changes, follow
from fedtune.core.adapter.layout import AdapterLayout, Factor, Factors, Indices, Vector, adapter_digest
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.adapter.tiers import rank_indices
from fedtune.core.codec import Residual, RingUpdate
from fedtune.core.codec.downlink import FIRST, receive
from fedtune.core.codec.noise_seeds import NoiseSeed, of_entropy
from fedtune.core.codec.update_forms import FORMS, RING, UpdateForm
from fedtune.core.codec.uplink import FactorTerms, factor_terms
from fedtune.core.errors import ModelError, PeerError, UpdateError
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.round_terms import check_base, check_evaluation, check_training
from fedtune.core.protocol.messages import Base, Downlink, EvaluateReply, EvaluateRequest, TrainReply, TrainRequest
from fedtune.core.seeds import derive_seed
from fedtune.core.spans import span
from fedtune.data.examples import Example, hold_out

CACHED_CLIENTS = 64  # clients whose tokenised examples stay in memory; those of others are read and tokenised again

OpenTrainer = Callable[[Base], Trainer]
LoadExamples = Callable[[str, Trainer, int], Sequence[Example]]
WorkShare = Callable[[str, TrainRequest], float]
UpdateChange = Callable[[AdapterLayout, Factors, Vector, Vector], Vector]
"""Changes an update before it is encoded: (layout, factors, received, update) -> update.

`received` is the whole adapter, `update` the segment of the trained factors.
"""

Agreed = Callable[[], JobTerms | None]
"""Returns the terms of the job that the device works for; None where it follows whatever is asked."""

Encoded = TypeVar("Encoded")
Encode = Callable[[Vector, FactorTerms, int], Encoded]


def all_of_it(client: str, request: TrainRequest) -> float:
    """Returns 1, the share of a device that has time for all the work."""
    del client, request
    return 1.0


def no_terms() -> None:
    """Returns None, for a device that follows whatever is asked."""


@dataclass(frozen=True)
class Contribution:
    """A trained update as words that can be masked.

    Args:
        result: outcome of the training.
        terms: the codec's terms, one for each trained factor, or for each slice of it that the client owns.
        parts: words and auxiliary sums for each of the terms.
    """

    result: LocalResult
    terms: tuple[FactorTerms, ...]
    parts: tuple[RingUpdate, ...]


@dataclass(frozen=True, eq=False)
class _Trained:
    """A trained update before it is encoded.

    Args:
        updates: for each of the terms, the update's values there.
    """

    result: LocalResult
    terms: tuple[FactorTerms, ...]
    updates: tuple[Vector, ...]


@dataclass(frozen=True)
class _Split:
    training: list[Example]
    held_out: list[Example]


class Device:
    """Answers training and evaluation requests, one at a time.

    Args:
        open_trainer: loads the base model that a request names; called once for each.
        load_examples: (client, trainer, sequence length) -> that client's examples.
        store: state that clients keep between rounds.
        share: (client, request) -> share of the requested local work that the client can do in time. The device applies
            it itself: a server that chose it could tell a client's update from those of idle ones in their sum.
        postprocess: changes to the trained update before it is encoded, in this order, after the alignment that a
            request may ask for.
        forms: forms in which updates may travel up, by their names in requests.
        agreed: returns the terms that requests must follow from; a request that differs is refused before any of the
            client's examples are read.
        noise: gives the seeds of noise, which must be unforeseeable for it to hide anything.
        turns: entered for each request, by default a lock. Requests that `fedtune.client.rendezvous` lets meet in the
            trainer already take turns everywhere else, and need none.
    """

    def __init__(
        self,
        open_trainer: OpenTrainer,
        load_examples: LoadExamples,
        store: ClientStore,
        share: WorkShare = all_of_it,
        postprocess: Sequence[UpdateChange] = (),
        forms: Mapping[str, UpdateForm] = FORMS,
        agreed: Agreed = no_terms,
        noise: NoiseSeed = of_entropy,
        turns: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._open_trainer = open_trainer
        self._load_examples = load_examples
        self._store = store
        self._share = share
        self._postprocess = tuple(postprocess)
        self._forms = forms
        self._agreed = agreed
        self._noise = noise
        self._held: tuple[str, Vector] = ("", np.empty(0, dtype=np.float32))
        self._rebasing: tuple[str, dict[str, Basis] | None] = ("", None)
        self._trainer: tuple[Base, Trainer] | None = None
        self._splits: OrderedDict[tuple[str, Base, float, int], _Split] = OrderedDict()
        self._turns = threading.Lock() if turns is None else turns

    def train(self, client: str, request: TrainRequest) -> TrainReply:
        """Trains the received adapter on the client's examples.

        Raises:
            PeerError: the request differs from the job's terms, does not match its digests, or asks for a form that
                this device does not know or for a residual that would enter a sum.
            ModelError: this device has another base model.
            UpdateError: training gave no update that may be sent.
        """
        with self._turns:
            form = self._forms.get(request.uplink.form)
            if form is None:
                asked = f"an update of the form {request.uplink.form!r} is asked for"
                raise PeerError(f"{asked}; this device knows {', '.join(self._forms)}")
            made = self._train(client, request)
            with span("encoding", client):
                if request.uplink.error_feedback:
                    made = replace(made, updates=self._compensated(client, request, made))
                parts = self._encoded(client, request, made, form.encode)
                if request.uplink.error_feedback:
                    sent = [form.decode(part, each) for part, each in zip(parts, made.terms, strict=True)]
                    self._keep(client, request, made, sent)
        result = made.result
        return TrainReply(
            round=request.round,
            examples=result.examples,
            tokens=result.target_tokens,
            steps=result.steps,
            loss=result.loss,
            seconds=result.seconds,
            update=parts,
        )

    def contribute(self, client: str, request: TrainRequest) -> Contribution:
        """Trains as `train` does, and returns words that can be masked; no earlier round enters them."""
        with self._turns:
            made = self._train(client, request)
            with span("encoding", client):
                parts = self._encoded(client, request, made, RING.contribute)
            return Contribution(made.result, made.terms, parts)

    def hold(self, request: TrainRequest) -> str:
        """Receives a request's adapter, and returns the digest of the adapter that this device then holds.

        Raises:
            PeerError, ModelError: as in `train`.
        """
        with self._turns:
            return adapter_digest(self._receive(self._accept(request), request.adapter, request.job_seed))

    @property
    def job(self) -> str | None:
        """The digest of the terms that requests must follow from; None where there are none."""
        terms = self._agreed()
        return terms.digest if terms else None

    def terms(self, request: TrainRequest) -> tuple[FactorTerms, ...]:
        """Returns the codec's terms for each factor that a round trains, all slices of it; raises as `hold` does."""
        with self._turns:
            layout = self._accept(request).layout
        return factor_terms(request.uplink, layout, request.work.factors, request.job_seed, request.round)

    def evaluate(self, client: str, request: EvaluateRequest) -> EvaluateReply:
        """Scores the received adapter on the client's held-out examples.

        Raises:
            PeerError, ModelError: as in `train`.
            UpdateError: the client has no held-out examples.
        """
        with self._turns:
            if (terms := self._agreed()) is not None:
                check_base(terms, request.base)
                check_evaluation(terms, request)
            trainer = self._trainer_for(request.base)
            received = self._receive(trainer, request.adapter, request.job_seed)
            held_out = self._split(client, trainer, request.base, request.holdout, request.job_seed).held_out
            if not held_out:
                raise UpdateError("the client keeps no examples back to evaluate on")
            score = trainer.evaluate(received, held_out)
        return EvaluateReply(request.round, score.examples, score.tokens, score.loss, score.exact_match)

    def _receive(self, trainer: Trainer, adapter: Downlink, seed: int) -> Vector:
        layout = trainer.layout
        if adapter.digest == self._held[0]:
            self._store.keep_adapter(*self._held)  # by now the store may be that of another job
            return self._held[1]
        basis = layout.initial(seed) if adapter.basis == FIRST else self._store.adapter(adapter.basis, layout.size)
        if basis is None:
            raise PeerError(f"this device no longer holds the adapter {adapter.basis[:16]}…; it needs the whole one")
        with span("receiving the adapter"):
            held = receive(layout, basis, adapter)
            self._store.keep_adapter(adapter.digest, held)
        self._held = (adapter.digest, held)
        return held

    def _train(self, client: str, request: TrainRequest) -> _Trained:
        """Trains; returns the result, and each part of the update that travels."""
        trainer, work = self._accept(request), request.work
        received = self._receive(trainer, request.adapter, request.job_seed)
        split = self._split(client, trainer, request.base, work.holdout, request.job_seed)
        if work.align and work.factors != "ab":
            raise PeerError(f"a request to align the factors {work.factors}; only both can be turned")
        if request.rebasing and trainer.layout.kind != "lora":
            raise PeerError(f"a request about a change of basis; the adapter's kind is {trainer.layout.kind}")
        layout, seed, number = trainer.layout, request.job_seed, request.round
        with span("planning", client):
            terms = factor_terms(request.uplink, layout, work.factors, seed, number, own_tier(request))
            owned = rank_indices(seed, number, layout.rank, request.tier) if request.tier else None
            task = _local_task(client, request, owned, self._share(client, request))
        result = trainer.train(split.training, received, task)
        update = align_update(lora_layout(layout), received, result.update) if work.align else result.update
        for change in self._postprocess:
            update = change(layout, work.factors, received, update)
        updates = []
        for each in terms:
            segment, start = layout.segment(each.factor), layout.segment(work.factors).start
            updates.append(update[segment.start - start : segment.stop - start][each.indices])
        return _Trained(result, terms, tuple(updates))

    def _compensated(self, client: str, request: TrainRequest, made: _Trained) -> tuple[Vector, ...]:
        """Returns the updates with the client's residuals added."""
        return tuple(
            self._residual(client, request, each).compensate(update, each.indices)
            for each, update in zip(made.terms, made.updates, strict=True)
        )

    def _residual(self, client: str, request: TrainRequest, terms: FactorTerms) -> Residual:
        """Returns the client's residual of a whole factor before this round, in the basis of this round.

        It is empty where the change of basis is unknown, because the client did not take part then or missed another
        one.
        """
        residual = self._store.residual(client, terms.factor, terms.whole, request.round)
        rebasing = request.rebasing
        kept = self._store.residual_round(client, terms.factor, request.round)
        if rebasing is None or kept > rebasing.round:
            return residual
        changes = self._basis_changes(request, rebasing.digest) if kept > rebasing.before else None
        if changes is None:
            return Residual.empty(terms.whole)
        pair = lora_layout(self._trainer_for(request.base).layout)
        return Residual(follow(pair, changes, terms.factor, residual.values))

    def _basis_changes(self, request: TrainRequest, digest: str) -> dict[str, Basis] | None:
        """Returns the change of basis after the round of this adapter; None where this device never held it."""
        if digest != self._rebasing[0]:
            layout = lora_layout(self._trainer_for(request.base).layout)
            held = self._store.adapter(digest, layout.size)
            self._rebasing = (digest, None if held is None else basis_changes(layout, held))
        return self._rebasing[1]

    def _keep(self, client: str, request: TrainRequest, made: _Trained, sent: Sequence[Vector]) -> None:
        """Stores the new residuals; at indices that this client does not own in this round they stay as they were."""
        residuals: dict[Factor, Residual] = {}
        for each, update, carried in zip(made.terms, made.updates, sent, strict=True):
            before = residuals.get(each.factor) or self._residual(client, request, each)
            residuals[each.factor] = before.carry(update - carried, each.indices)
        for factor, residual in residuals.items():
            self._store.keep_residual(client, factor, request.round, residual)

    def _encoded(
        self, client: str, request: TrainRequest, made: _Trained, encode: Encode[Encoded]
    ) -> tuple[Encoded, ...]:
        """Returns one part for each of the terms."""

        def seed(each: FactorTerms) -> int:
            if each.rho:
                return self._noise(client, each)
            return derive_seed(request.job_seed, "dither", request.round, client, *each.label)

        return tuple(encode(update, each, seed(each)) for each, update in zip(made.terms, made.updates, strict=True))

    def _accept(self, request: TrainRequest) -> Trainer:
        """Returns the trainer for a request that follows from the job's terms, where the device has some."""
        terms = self._agreed()
        if terms is None:
            return self._trainer_for(request.base)
        check_base(terms, request.base)
        trainer = self._trainer_for(request.base)
        check_training(terms, trainer.layout, request)
        return trainer

    def _trainer_for(self, base: Base) -> Trainer:
        if self._trainer is None or self._trainer[0] != base:
            self._trainer = None  # free the old one before the new one is loaded
            trainer = self._open_trainer(base)
            if trainer.digest != base.digest:
                raise ModelError(
                    f"this device's base model {trainer.name} has digest {trainer.digest[:16]}…; "
                    f"the job is for {base.digest[:16]}…"
                )
            if (trainer.layout.kind, trainer.layout.fixed_digest) != (base.kind, base.fixed):
                own, wanted = trainer.layout.fixed_digest[:16] or "none", base.fixed[:16] or "none"
                raise ModelError(
                    f"this device computed fixed factors of {trainer.name} with digest {own}; the job is for {wanted}: "
                    "both sides must run the same release of fedtune"
                )
            self._trainer = (base, trainer)
        return self._trainer[1]

    def _split(self, client: str, trainer: Trainer, base: Base, share: float, seed: int) -> _Split:
        key = (client, base, share, seed)
        if key not in self._splits:
            with span("loading data", client):
                examples = self._load_examples(client, trainer, base.sequence_length)
                self._splits[key] = _Split(*hold_out(examples, share, derive_seed(seed, "holdout", client)))
            while len(self._splits) > CACHED_CLIENTS:
                self._splits.popitem(last=False)
        self._splits.move_to_end(key)
        return self._splits[key]


def own_tier(request: TrainRequest) -> int:
    """Returns the tier that a request asks for; 0 where all clients train the whole adapter.

    Raises:
        PeerError: it is none of the round's.
    """
    tiers = request.uplink.tiers
    if (request.tier not in tiers) if tiers else request.tier:
        raise PeerError(f"a request to train {request.tier} rank indices; this round has the tiers {list(tiers)}")
    return request.tier


def _local_task(client: str, request: TrainRequest, owned: Indices | None, share: float) -> LocalTask:
    work = request.work
    if (work.local_steps > 0) == (work.local_epochs > 0):
        raise PeerError("a request with both or neither of local steps and local epochs")
    return LocalTask(
        derive_seed(request.job_seed, "train", request.round, client),
        work.scaled(share),
        None if owned is None else tuple(owned.tolist()),
    )
