"""A job: what shall be trained, on what, by whom and how. The same for simulation and live; every key has a default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedtune.core.job.local_work import TrainingSettings
from fedtune.core.job.methods import AGGREGATIONS, RULE

DEMO = "demo"  # the bundled base model or the bundled task, wherever a path is expected
BUNDLED = "bundled"  # the fleet that comes with fedtune
SMALLEST_TIER = 4  # rank indices

_STRICT = ConfigDict(extra="forbid", strict=True)
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """[model]: the frozen base that every adapter is trained against.

    Args:
        base: a Hugging Face directory or hub id, or "demo" for the bundled model.
        quantization: what the reference base's linear weights are: "nf4" (QLoRA) or "none".
    """

    base: Annotated[str, Field(min_length=1)] = DEMO
    quantization: Literal["nf4", "none"] = "nf4"


@dataclass(frozen=True, config=_STRICT)
class AdapterSettings:
    """[adapter]: the low-rank factors, ΔW = alpha / sqrt(rank) · B · A.

    Args:
        rank: R, the largest rank that any device trains.
        tiers: how many of the rank indices a device may train a round, ascending to the rank; 4, 8, 16, … where not
            set. Which one it trains follows from its plan; without plans everybody trains all.
        target_modules: "all-linear", or the endings of the names of the modules to adapt.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: _PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    tiers: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=32)] | None = None


@dataclass(frozen=True, config=_STRICT)
class DataSettings:
    """[data]: where examples come from and how they are split among simulated clients.

    Args:
        train: a file or glob pattern, relative to the job file, or "demo" for the bundled households.
        partition: "by-file" (one client a file), "iid", "dirichlet:ALPHA", "dirichlet:ALPHA:FIELD", "by-field:FIELD".
        clients: how many clients "iid", "dirichlet" and the demo make; the other partitions follow from the data.
        examples_per_client: how many examples each of the demo's households has.
        evaluation: a file of held-out examples for the server, "demo", or "" for none.
        holdout: share of each client's examples that it keeps back for its own evaluation.
        sequence_length: tokens; longer prompts lose their beginning, longer completions drop the example.
        skip_bad: count broken lines and go on instead of stopping at the first file with one.
    """

    train: Annotated[str, Field(min_length=1)] = DEMO
    partition: Annotated[str, Field(pattern=r"^(by-file|iid|dirichlet:[0-9]*\.?[0-9]+(:[^:]+)?|by-field:[^:]+)$")] = (
        "by-file"
    )
    clients: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    examples_per_client: Annotated[int, Field(ge=2, le=1_000_000)] = 200
    evaluation: str = DEMO
    holdout: _Share = 0.1
    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 256
    skip_bad: bool = False


@dataclass(frozen=True, config=_STRICT)
class FederationSettings:
    """[federation]: the rounds.

    Args:
        clients_per_round: a count, or a share of the population between 0 and 1.
        selection: "uniform", or by the times that devices or a simulated fleet predict "deadline": more than are
            wanted, of those that can be in time, or "utility": of those, the ones whose updates should teach most a
            second (Oort; by time alone where the server sees sums only). Slow devices do part of the work.
        late: what becomes of an update that comes when its round has closed: "drop", or in the clear "next": the next
            round takes it at 1/√2 of its weight. Only simulated fleets know late updates yet.
        minimum_clients: fewer survivors than this and the round changes nothing.
        deadline: seconds after which a round goes on without those who have not answered, or "auto" to wait for all.
        aggregation: how client updates become one (fedtune.strategies.aggregation).
        rebalance_every: rounds after which both factors are brought to the same share of every direction; 0 for never.
            The product stays as it is; the next request carries the whole adapter, at 8 bits.
        server_optimizer: what the server makes of the aggregate (fedtune.strategies.server_optimizers).
        server_learning_rate: its η; without it 1 for "none" and "momentum", 0.01 for the others.
        robust: in the clear, a rule in place of the mean that a few hostile updates cannot steer.
        robust_share: of the clients, how many may be hostile: cut off at either end, or left out.
        clip_norm: in the clear, the length to which longer updates are scaled down.
        weight: what a client's update weighs: its examples, its target tokens, or the same as everyone's.
        weight_cap: examples or tokens above which a client's weight grows no more; a ring's cap is lower where the
            cohort's mean weight is, since its words have room for the heaviest (fedtune.core.codec.clipping).
        evaluate_every: rounds between evaluations on the server; 0 for only before and after.
        evaluate_clients_every: rounds between evaluations on the clients; 0 for only after the last round.
        evaluation_clients: how many clients evaluate at most.
    """

    rounds: _Positive = 20
    clients_per_round: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 10
    selection: Literal["uniform", "deadline", "utility"] = "uniform"
    late: Literal["drop", "next"] = "drop"
    minimum_clients: _Positive = 1
    deadline: Literal["auto"] | _PositiveFloat = "auto"
    aggregation: Literal["fedavg", "alternating", "ffa", "fedrot", "flexlora", "flora"] = "fedavg"
    rebalance_every: _Count = 0
    server_optimizer: Literal["none", "momentum", "adam", "yogi", "adagrad"] = "none"
    server_learning_rate: _PositiveFloat | None = None
    robust: Literal["none", "median", "trimmed-mean", "multi-krum"] = "none"
    robust_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    clip_norm: _PositiveFloat | None = None
    weight: Literal["examples", "tokens", "uniform"] = "examples"
    weight_cap: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    evaluate_every: _Count = 1
    evaluate_clients_every: _Count = 0
    evaluation_clients: _Positive = 100


@dataclass(frozen=True, config=_STRICT)
class CompressionSettings:
    """[compression]: how few bytes an adapter update is.

    Args:
        preset: "none" (float32, exact), "balanced" or "extreme"; it fills in every key that is not set.
        form: "sparse" sends each client's largest values, entropy-coded; "ring" sends words that can be added before
            they are decoded, which is what secure aggregation masks; "auto" takes the one that fits.
        bits: how fine a value is sent up: steps of 6 / (2^bits - 1) of the values' root mean square.
        density: the share of a factor's values that a client sends in a round.
        error_feedback: whether a client keeps what it did not send and adds it to its next update.
        downlink_bits: how fine the adapter's change is sent down.
        rotation: whether a randomized Hadamard transform spreads the values before they are rounded; "ring" only.
    """

    preset: Literal["none", "balanced", "extreme"] = "balanced"
    form: Literal["auto", "sparse", "ring"] = "auto"
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    error_feedback: bool | None = None
    downlink_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    rotation: bool | None = None


@dataclass(frozen=True, config=_STRICT)
class SecureAggregationSettings:
    """[secure_aggregation]: the server learns the sum over a round's survivors and nothing of any one of them.

    Args:
        enabled: whether updates are masked; they then travel in a ring (compression.form).
        max_dropout: the share of a cohort that may vanish at any step before a round has no sum.
        max_corrupt: the share of a cohort that may collude with a lying server.
    """

    enabled: bool = True
    max_dropout: _Share = 0.3
    max_corrupt: _Share = 0.1


@dataclass(frozen=True, config=_STRICT)
class SimulationSettings:
    """[simulation]: how `fedtune simulate` runs, and the faults it injects.

    Args:
        backend: "local" trains in this process and its forks, which share one base model; "ray" spreads clients over a
            pool of Ray actors, each with its own.
        workers: processes that train, or "auto" for as many as there are cores (GPUs for "ray") and clients in a round,
            and as memory allows. It changes no bit of the result.
        threads: torch threads of each worker, 0 for all cores. One is the default because results then do not depend
            on how many cores a machine has, and because small models gain little from more; workers do better there.
        fleet: a file of kinds of device (fedtune.core.job.device_kinds), "bundled", or "" for devices that are all
            alike.
        ranks: without a fleet, the rank of each client in the order of names, again from the first where there are more
            clients; none for the adapter's.
        dropout: probability that a client of the cohort vanishes in a round; under secure aggregation before any of the
            round's exchanges.
        failing: probability that a client of the cohort raises an exception in a round.
        slow: probability that a client of the cohort sleeps `slow_seconds` before it answers.
    """

    backend: Literal["local", "ray"] = "local"
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    threads: Annotated[int, Field(ge=0, le=4096)] = 1
    fleet: str = ""
    ranks: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    failing: Annotated[float, Field(ge=0, le=1)] = 0.0
    slow: Annotated[float, Field(ge=0, le=1)] = 0.0
    slow_seconds: Annotated[float, Field(ge=0, le=86_400)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class ExportSettings:
    """[export]: what a finished run is turned into for inference.

    Args:
        formats: ONNX models to write, each gated against the merged model; none by default.
    """

    formats: tuple[Literal["int4", "int8", "fp16", "fp32"], ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Job:
    """Everything that determines a run; the same job gives the same adapter."""

    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    compression: CompressionSettings = CompressionSettings()
    secure_aggregation: SecureAggregationSettings = SecureAggregationSettings()
    simulation: SimulationSettings = SimulationSettings()
    export: ExportSettings = ExportSettings()

    @property
    def compression_form(self) -> Literal["sparse", "ring"]:
        """compression.form, with "auto" decided."""
        if self.compression.form != "auto":
            return self.compression.form
        return "ring" if self.secure_aggregation.enabled else "sparse"

    @property
    def hides_updates(self) -> bool:
        """Returns whether the server sees only sums: nothing that looks at single updates can work then."""
        return self.compression.preset != "none" and self.compression_form == "ring"

    @property
    def needs_equal_ranks(self) -> str | None:
        """The reason why all clients must train the same rank; None where they need not."""
        federation = self.federation
        if reason := AGGREGATIONS[federation.aggregation].equal_ranks:
            return f'federation.aggregation is "{federation.aggregation}", which {reason}'
        if federation.robust != "none":
            return f'federation.robust is "{federation.robust}", which {RULE.equal_ranks}'
        return None

    @property
    def tiers(self) -> tuple[int, ...]:
        """adapter.tiers, with its default filled in: 4, 8, 16, … and the rank, or the rank alone where all need it."""
        rank = self.adapter.rank
        if self.adapter.tiers is not None:
            return self.adapter.tiers
        if self.needs_equal_ranks:
            return (rank,)
        return rank_tiers(rank)


def rank_tiers(largest: int) -> tuple[int, ...]:
    """Gives 4, 8, 16, … and the largest itself."""
    tiers, rank = [], SMALLEST_TIER
    while rank < largest:
        tiers.append(rank)
        rank *= 2
    return (*tiers, largest)
