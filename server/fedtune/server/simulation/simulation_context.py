"""The simulation context, which every process builds from the job: the base model, the population and the clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device, all_of_it
from fedtune.client.message_handlers import handle_in_the_clear, handle_under_secure_aggregation
from fedtune.client.rendezvous import Rendezvous, one_by_one
from fedtune.client.secure_rounds import Credentials
from fedtune.client.torch.joint_training import JointTraining
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import Trainer
from fedtune.core.codec.noise_seeds import from_seed
from fedtune.core.errors import DataError
from fedtune.core.host.process import keep_freed_memory
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.privacy.budget import rho_of_round
from fedtune.core.protocol.messages import Base, Handler
from fedtune.core.secagg import Identity, MemoryRoundLog, Policy, Roster, RoundLog
from fedtune.core.secagg.primitives import KEY_BYTES
from fedtune.core.seeds import generator
from fedtune.data.examples import CleaningReport, Example, prepare
from fedtune.data.job_inputs import JobInputs
from fedtune.data.population import Population
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.shape import ModelShape, shape_of
from fedtune.server.custom_metrics import NO_METRICS, CustomMetrics
from fedtune.server.evaluation import HeldOut
from fedtune.server.job_model import describe_base, open_model
from fedtune.server.simulation.faults import with_faults
from fedtune.server.simulation.simulated_fleet import SimulatedFleet
from fedtune.strategies.assembly import Clients

Wrap = Callable[[Handler], Handler]
MakeTrainer = Callable[[AdaptedModel], Trainer]


@dataclass(frozen=True)
class Enrolment:
    """The identities of simulated clients, which every process derives from the job's seed.

    They exercise the protocol but protect nothing, since the job reveals the keys. Real devices draw secret keys.

    A simulated client keeps its record of served rounds in memory only: when the simulation is resumed after a crash,
    its clients start again from the last acknowledged round.
    """

    identities: Mapping[str, Identity]
    roster: Roster
    policy: Policy
    _logs: dict[str, RoundLog] = field(default_factory=dict)

    @classmethod
    def rehearse(cls, names: Sequence[str], job: Job) -> Enrolment:
        """Makes an identity for each client, and a policy with the job's own requirements.

        Raises:
            InputError: a name is too long to be enrolled.
        """
        seed = job.training.seed
        identities = {name: Identity(generator(seed, "identity", name).bytes(KEY_BYTES)) for name in names}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        return cls(
            identities, roster, Policy(max_corrupt=job.secure_aggregation.max_corrupt, rho=rho_of_round(job.privacy))
        )

    def credentials(self, client: str) -> Credentials:
        """Returns a client's credentials for secure rounds."""
        log = self._logs.setdefault(client, MemoryRoundLog())
        return Credentials(self.identities[client], self.roster, self.policy, log)


class SimulationContext:
    """One process's part of a simulation: model, data and clients, each created on first use.

    `begin` creates it, since torch must have the job's number of threads before it computes anything.

    Args:
        inputs: the contents of the job's files.
        folder: the folder of the clients' state between rounds; the processes of a simulation share it.
        make_trainer: model -> the trainer of every client, for one after another; by default torch's, for many at once.
        wrap: makes another handler out of that of the clients' messages, for clients that misbehave.
        together: clients that are trained in one pass; by default the job's number, and 1 where that is "auto".
        metrics: the user's own metrics; only the process that evaluates needs them.
    """

    def __init__(
        self,
        inputs: JobInputs,
        folder: Path,
        make_trainer: MakeTrainer | None = None,
        wrap: Wrap | None = None,
        together: int | None = None,
        metrics: CustomMetrics = NO_METRICS,
    ) -> None:
        self.inputs, self.folder = inputs, folder
        asked = inputs.job.simulation.together
        self.together: int = together or (1 if asked == "auto" else asked)
        self.notes: list[str] = []
        """What people should know about the training in this process."""
        self._make_trainer, self._wrap, self._metrics = make_trainer, wrap, metrics
        self._cleaning: dict[str, CleaningReport] = {}

    @classmethod
    def begin(
        cls,
        job: Job,
        folder: Path,
        inputs: JobInputs | None = None,
        make_trainer: MakeTrainer | None = None,
        wrap: Wrap | None = None,
        together: int | None = None,
        metrics: CustomMetrics = NO_METRICS,
    ) -> SimulationContext:
        """Makes this process a part of the simulation.

        From then on torch computes with the job's number of threads, and the process keeps the memory that it frees.

        Args:
            inputs: the contents of the job's files, if they were read already.
        """
        if threads := job.simulation.threads:
            torch.set_num_threads(threads)
        keep_freed_memory()
        return cls(inputs or JobInputs(job), folder, make_trainer, wrap, together, metrics)

    @property
    def job(self) -> Job:
        """The job that is simulated."""
        return self.inputs.job

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the base model."""
        return shape_of(self.job.model)

    @property
    def population(self) -> Population:
        """The clients that the job's data makes."""
        return self.inputs.population

    @property
    def cleaning(self) -> dict[str, CleaningReport]:
        """The counts of records after cleaning, for each client that has read its examples."""
        return dict(self._cleaning)

    @cached_property
    def model(self) -> AdaptedModel:
        """The base model with an adapter, loaded once a process."""
        return open_model(self.job)

    @cached_property
    def trainer(self) -> Rendezvous:
        """The trainer of every client, which trains those together that ask at once."""
        if self._make_trainer is not None:
            own = self._make_trainer(self.model)
            return Rendezvous(own, one_by_one(own))
        trainer = TorchTrainer(self.model)
        return Rendezvous(trainer, JointTraining(trainer, self.together, self.notes.append))

    @cached_property
    def base(self) -> Base:
        """The description of the base model in requests."""
        return describe_base(self.job, self.model)

    @cached_property
    def terms(self) -> JobTerms:
        """The terms of the job."""
        return JobTerms(with_learning_rate(self.job, self.model.layout), self.base)

    @cached_property
    def held_out(self) -> HeldOut:
        """The server's own examples, on which it scores adapters."""
        return HeldOut(self.model, self.job, self._metrics)

    @cached_property
    def enrolment(self) -> Enrolment:
        """The clients' identities."""
        return Enrolment.rehearse(self.population.names, self.job)

    @cached_property
    def devices(self) -> SimulatedFleet | None:
        """The clients as devices, if the job has a fleet."""
        kinds = self.inputs.fleet
        if kinds is None:
            return None
        return SimulatedFleet(self.job, kinds, self.population.names, self.shape)

    @cached_property
    def clients(self) -> Clients:
        """The properties of the clients by which cohorts are chosen."""
        names, devices, dealt = sorted(self.population.names), self.devices, self.job.simulation.ranks
        if devices is not None:
            return Clients(len(names), devices.rank, devices.predicted, devices.present, virtual_time=True)
        ranks = {name: dealt[index % len(dealt)] for index, name in enumerate(names)} if dealt else None
        return Clients(len(names), ranks.__getitem__ if ranks else None)

    def handler(self) -> Handler:
        """Returns the handler of every client's messages, with the faults that the job injects."""
        store = ClientStore(self.folder)
        share = self.devices.work if self.devices else all_of_it
        noise = from_seed(self.terms.seed)
        device = Device(
            lambda _: self.trainer,
            self.examples,
            store,
            share,
            agreed=lambda: self.terms,
            noise=noise,
            turns=nullcontext() if self.together > 1 else None,
        )
        secure, simulation = self.job.secure_aggregation.enabled, self.job.simulation
        if secure:
            handler = handle_under_secure_aggregation(device, self.enrolment.credentials)
        else:
            handler = handle_in_the_clear(device)
        if simulation.dropout or simulation.failing or simulation.slow:
            handler = with_faults(handler, simulation, self.job.training.seed, secure)
        return self._wrap(handler) if self._wrap else handler

    def examples(self, client: str, trainer: Trainer, sequence_length: int) -> Sequence[Example]:
        """Returns one client's examples, cleaned and tokenised."""
        records = self.population.records(client)
        if self.devices is not None:
            sequence_length = self.devices.sequence_length(client, sequence_length)
        bad = self.population.bad_lines(client)
        examples, report = prepare(records, trainer.tokenizer, sequence_length, self.job.data.balance)
        report += CleaningReport(read=bad, bad=bad)
        self._cleaning[client] = report
        if not examples:
            source = self.population.source(client)
            raise DataError(source, f"no usable example ({report}); at most {sequence_length} tokens were allowed")
        return examples
