"""The settings of a job: the model, the data, the clients and the training. Every key has a default; those of
`model.base`, `data.train` and `data.evaluation` are the bundled demo's, for jobs without a file.

The same settings serve simulations and live runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedtune.core.adapter.layout import AdapterKind
from fedtune.core.job.cost_settings import BudgetSettings, CostSettings
from fedtune.core.job.local_work import TrainingSettings
from fedtune.core.job.methods import AGGREGATIONS, RULE
from fedtune.core.metrics import EXACT, MetricName

DEMO = "demo"  # the bundled base model or the bundled task, wherever a path is expected
BUNDLED = "bundled"  # the fleet that comes with fedtune
SMALLEST_TIER = 4  # rank indices
LORA_RANK = 16
CORE_RANK = 40  # benchmarks/real: at which a base of width 256 learns as with LoRA of rank 16 at 40 times fewer bytes

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

_STRICT = ConfigDict(extra="forbid", strict=True)
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """[model]: the frozen base that every adapter is trained against.

    Args:
        base: Hugging Face directory or hub id, or "demo" for the bundled model. A job file must name it.
        quantization: format of the reference base's linear weights: "nf4" (QLoRA); "int4", the grid of an exported int4
            model, head in 8 bits, so that training and serving compute with the same numbers; or "none".
    """

    base: Annotated[str, Field(min_length=1)] = DEMO
    quantization: Literal["nf4", "int4", "none"] = "nf4"


@dataclass(frozen=True, config=_STRICT)
class AdapterSettings:
    """[adapter]: the trained change of the base's weights.

    Args:
        kind: "core" trains the square matrix R of ΔW = alpha / sqrt(rank) · B · R · A, where A and B follow from the
            base: far fewer numbers, whose mean over clients is exact (LoRA-XS). "lora" trains both factors of
            ΔW = alpha / sqrt(rank) · B · A. A job file that does not say gets "core", or "lora" where its [federation]
            treats the factors apart.
        rank: R, the largest rank that any device trains. A job file that does not say gets 40 for a core, and 16 for
            LoRA.
        alpha: scale of the adapter in these formulas.
        tiers: numbers of rank indices that a device may train in a round, ascending to the rank; 4, 8, 16, … where not
            set. A device's plan decides its tier; without plans all clients train all rank indices.
        target_modules: "all-linear", or the endings of the names of the modules to adapt, such as ["q_proj", "v_proj"].
    """

    kind: AdapterKind = "lora"
    rank: Annotated[int, Field(ge=1, le=1024)] = LORA_RANK
    alpha: _PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    tiers: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=32)] | None = None


@dataclass(frozen=True, config=_STRICT)
class DataSettings:
    """[data]: the source of examples and their partition among simulated clients.

    Args:
        train: file or glob pattern, relative to the job file, or "demo" for the bundled households. A job file must
            name it; live devices bring their own examples and do not read it.
        partition: "by-file" (one client per file), "iid", "dirichlet:ALPHA", "dirichlet:ALPHA:FIELD", "by-field:FIELD".
        clients: number of clients for "iid", "dirichlet" and the demo; for other partitions it follows from the data.
        examples_per_client: number of examples of each of the demo's households.
        evaluation: file of held-out examples for the server, "demo", or "" for none, the default of a job file with its
            own data; the scores are then those of the clients' held-out shares.
        holdout: share of each client's examples that it keeps back for its own evaluation.
        sequence_length: tokens; longer prompts are cut at the beginning, examples with longer completions are dropped.
        balance: field of the records, such as "category", whose values should appear equally often in a client's local
            training; without it they appear as often as the client has them. An epoch keeps its size: frequent values
            are drawn less often, and rare ones up to four times an epoch. Held-out examples stay as they are.
        skip_bad: whether broken lines are counted and skipped; otherwise the first file with one is an error.
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
    balance: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    skip_bad: bool = False


@dataclass(frozen=True, config=_STRICT)
class FederationSettings:
    """[federation]: the rounds.

    Args:
        run: number of the run; a device serves every round of a job once, so a job that runs again needs another one.
        rounds: number of rounds.
        clients_per_round: number of clients, or a share of the population between 0 and 1.
        selection: policy that chooses the cohort: "uniform"; "deadline", which uses the times that devices or a
            simulated fleet predict and asks more clients than wanted, all of them able to answer in time; or "utility",
            which prefers among those the clients with the most useful updates per second (Oort; by time alone where the
            server sees sums only). Slow devices do part of the work.
        late: treatment of stale updates: "drop", or in the clear "next": the next round takes them at 1/√2 of their
            weight. Only simulated fleets have stale updates yet.
        minimum_clients: number of survivors below which the round leaves the adapter as it is.
        deadline: seconds after which a round goes on without the clients that have not answered; "auto" waits for all.
        aggregation: way to combine client updates. "fedavg" is their mean, factor by factor. The others are for LoRA:
            "alternating" trains B and A in turn, and "ffa" B alone, so that the mean of factors is that of products;
            "fedrot" turns each client's factors towards the received ones before the mean; "flexlora" takes the mean
            of the products themselves and reduces it to the rank, and "flora" also keeps the rest on the server.
        rebalance_every: rounds after which both factors are brought to the same share of every direction; 0 for never.
            The product stays as it is; the next request carries the whole adapter, at 8 bits.
        server_optimizer: step of the server along the aggregate: "none" adds it as it is, "momentum" follows its
            running sum, and "adam", "yogi" and "adagrad" also scale every number by its history (Reddi et al. 2021).
        server_learning_rate: its η; without it 1 for "none" and "momentum", 0.01 for the others.
        robust: a rule in place of the mean that a few hostile updates cannot steer: "median" and "trimmed-mean" of
            each number, or "multi-krum", which leaves out the updates that are farthest from the others. Under secure
            aggregation one over the means of its groups: "median", "trimmed-mean", or "group-testing", which finds over
            rounds which clients make their groups stand apart, and leaves them out.
        robust_share: share of the clients, or groups, that may be hostile: cut off at either end, or left out.
        clip_norm: in the clear, the norm to which longer updates are scaled down.
        weight: weight of a client's update: the same for all clients, or in the clear its examples or target tokens.
        weight_cap: examples or tokens above which a client's weight does not grow.
        evaluate_every: rounds between evaluations on the server; 0 for only before and after the rounds.
        evaluate_clients_every: rounds between evaluations on the clients; 0 for only after the last round.
        evaluation_clients: largest number of clients that evaluate.
    """

    run: _Positive = 1
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
    robust: Literal["none", "median", "trimmed-mean", "multi-krum", "group-testing"] = "none"
    robust_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    clip_norm: _PositiveFloat | None = None
    weight: Literal["uniform", "examples", "tokens"] = "uniform"
    weight_cap: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    evaluate_every: _Count = 1
    evaluate_clients_every: _Count = 0
    evaluation_clients: _Positive = 100


@dataclass(frozen=True, config=_STRICT)
class EvaluationSettings:
    """[evaluation]: the server's scoring of its held-out examples (data.evaluation).

    Args:
        metric: figure that the run is judged by. "exact" and "loss", which are always measured, follow from the scored
            completions; "token-f1" (SQuAD's) and "rouge-l" compare answers that the model generates with them, where
            more than one wording is right. Devices measure exact match and loss alone.
        answer_tokens: largest number of tokens of a generated answer.
    """

    metric: MetricName = EXACT
    answer_tokens: Annotated[int, Field(ge=1, le=65_536)] = 64


@dataclass(frozen=True, config=_STRICT)
class CompressionSettings:
    """[compression]: the size and resolution of adapter updates.

    Args:
        preset: "none" (float32, exact), "balanced" or "extreme"; it fills in every key that is not set.
        form: "dense" sends all of a client's values, entropy-coded; "sparse" its largest ones; "ring" sends words that
            can be added before they are decoded, as secure aggregation needs them; "auto" takes "ring" under secure
            aggregation and "dense" in the clear.
        bits: resolution of values on the uplink: steps of 6 / (2^bits - 1) of the values' root mean square; "ring" uses
            all levels that fit the words for at least so many.
        density: share of a factor's values that a client sends in a round; "sparse" only.
        error_feedback: whether a client keeps what it did not send and adds it to its next update: by default only with
            "sparse", and never with "ring".
        downlink_bits: resolution of the adapter on the downlink: steps of about 6 / (2^bits - 1) of the root mean
            square of its change since the job began.
        rotation: whether a randomized Hadamard transform spreads the values before they are rounded; "ring" only.
    """

    preset: Literal["none", "balanced", "extreme"] = "balanced"
    form: Literal["auto", "dense", "sparse", "ring"] = "auto"
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    error_feedback: bool | None = None
    downlink_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    rotation: bool | None = None


@dataclass(frozen=True, config=_STRICT)
class SecureAggregationSettings:
    """[secure_aggregation]: the server learns the sum over a round's survivors and no single update.

    Args:
        enabled: whether updates are masked; they then travel in a ring (compression.form).
        max_dropout: share of a cohort that may vanish at any step before a round has no sum.
        max_corrupt: share of a cohort that may collude with a lying server.
        groups: number of groups into which a cohort is cut at random, each with a sum of its own, so that
            federation.robust can act on their means: "median" or "trimmed-mean" over at least 3, "group-testing" over
            at least 6. The server then sees as many sums, each over one group, within which max_dropout and max_corrupt
            hold. A round with too few clients has fewer groups. All clients train the whole adapter.
    """

    enabled: bool = True
    max_dropout: _Share = 0.3
    max_corrupt: _Share = 0.1
    groups: Annotated[int, Field(ge=1, le=1000)] = 1


@dataclass(frozen=True, config=_STRICT)
class PrivacySettings:
    """[privacy]: (epsilon, delta)-differential privacy of each client's whole data, against all who see the sums.

    Args:
        mode: "off"; "distributed", in which devices add noise before masks, so that no server is trusted; or "central",
            in which the server adds it to the sum, for comparison and for servers that are trusted.
        epsilon, delta: the guarantee after `participations` rounds of a client. delta should be below
            1 / clients^1.1.
        participations: rounds of the job in which a client takes part at most; each spends an equal share.
        clip: norm to which updates are cut, as a share of the largest that a round's steps can reach. Noise is
            proportional to it.
    """

    mode: Literal["off", "distributed", "central"] = "off"
    epsilon: Annotated[float, Field(gt=0, le=1000)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    participations: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    clip: Annotated[float, Field(gt=0, le=1)] = 0.25


@dataclass(frozen=True, config=_STRICT)
class SimulationSettings:
    """[simulation]: the way `fedtune simulate` runs clients, and the faults that it injects.

    Args:
        backend: "local" trains in this process and its forks, which share one base model; "ray" spreads clients over a
            pool of Ray actors, each with its own.
        workers: processes that train, or "auto" for as many as there are cores (GPUs for "ray") and clients in a round,
            and as memory allows. The number does not change the result.
        threads: torch threads of each worker, 0 for all cores. One is the default because results then do not depend
            on a machine's number of cores, and because small models gain more from workers than from threads.
        together: clients that a worker trains in one pass over the base model, with "local" only. "auto" takes as many
            as memory and the size of their steps allow, at least 1, and the run's job.toml then has the number. Above
            1, small steps cost less time each, and the adapter differs from that of 1 by rounding.
        fleet: TOML file of kinds of device, as core/fedtune/demo/fleet.toml, which "bundled" stands for; or "" for
            devices that are all alike.
        ranks: without a fleet, the rank of each client in the order of names, again from the first where there are more
            clients; empty for the adapter's rank.
        dropout: probability that a client of the cohort vanishes in a round; under secure aggregation before any of the
            round's exchanges.
        failing: probability that a client of the cohort raises an exception in a round.
        slow: probability that a client of the cohort sleeps `slow_seconds` before it answers.
        slow_seconds: how long such a client sleeps.
    """

    backend: Literal["local", "ray"] = "local"
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    threads: Annotated[int, Field(ge=0, le=4096)] = 1
    together: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = 1
    fleet: str = ""
    ranks: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    failing: Annotated[float, Field(ge=0, le=1)] = 0.0
    slow: Annotated[float, Field(ge=0, le=1)] = 0.0
    slow_seconds: Annotated[float, Field(ge=0, le=86_400)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class ExportSettings:
    """[export]: the files that a finished run is converted to for inference.

    Args:
        formats: ONNX models to write, each compared with the merged model by the parity gate; none by default.
    """

    formats: tuple[Literal["int4", "int8", "fp16", "fp32"], ...] = ()


@dataclass(frozen=True, config=_STRICT)
class TrackingSettings:
    """[tracking]: the experiment trackers that get a run's settings, its figures by round, and its summary.

    Args:
        to: "tensorboard" (files in the run directory), "mlflow" (the store that MLFLOW_TRACKING_URI names, or a
            database beside the run directory) and "wandb" (offline, in the run directory, without a login); none by
            default. Each needs the extra of its name. None can stop a run, or change its result.
    """

    to: tuple[TrackerName, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Job:
    """All settings of a run; the same job gives the same adapter."""

    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings("core", CORE_RANK)
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    compression: CompressionSettings = CompressionSettings()
    secure_aggregation: SecureAggregationSettings = SecureAggregationSettings()
    privacy: PrivacySettings = PrivacySettings()
    simulation: SimulationSettings = SimulationSettings()
    export: ExportSettings = ExportSettings()
    tracking: TrackingSettings = TrackingSettings()
    cost: CostSettings = CostSettings()
    budget: BudgetSettings = BudgetSettings()

    @property
    def compression_form(self) -> Literal["dense", "sparse", "ring"]:
        """The value of compression.form, with "auto" resolved."""
        if self.compression.form != "auto":
            return self.compression.form
        return "ring" if self.secure_aggregation.enabled else "dense"

    @property
    def hides_updates(self) -> bool:
        """True if the server sees only sums, so that nothing can work that reads single updates."""
        return self.compression.preset != "none" and self.compression_form == "ring"

    @property
    def needs_equal_ranks(self) -> str | None:
        """The reason why all clients must train the same rank; None where they need not."""
        federation = self.federation
        if reason := AGGREGATIONS[federation.aggregation].equal_ranks:
            return f'federation.aggregation is "{federation.aggregation}", which {reason}'
        if federation.robust != "none":
            return f'federation.robust is "{federation.robust}", which {RULE.equal_ranks}'
        if (groups := self.secure_aggregation.groups) > 1:
            return f"secure_aggregation.groups is {groups}, and no group would have enough clients of every tier"
        return None

    @property
    def tiers(self) -> tuple[int, ...]:
        """The tiers, by default 4, 8, 16, … and the rank, or the rank alone where all clients must train the same.

        Under differential privacy it is the rank alone by default: every tier more has noise of its own.
        """
        rank = self.adapter.rank
        if self.adapter.tiers is not None:
            return self.adapter.tiers
        if self.needs_equal_ranks or self.privacy.mode != "off":
            return (rank,)
        return rank_tiers(rank)


def rank_tiers(largest: int) -> tuple[int, ...]:
    """Returns 4, 8, 16, … and the largest itself."""
    tiers, rank = [], SMALLEST_TIER
    while rank < largest:
        tiers.append(rank)
        rank *= 2
    return (*tiers, largest)
