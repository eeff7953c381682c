"""The job file: what shall be trained, on what, by whom and how. One file for simulation and live alike.

    job = load_job(Path("job.toml"), overrides=["federation.rounds=40"])

Every key has a default. Unknown keys, wrong types, values out of bounds and contradictions are all reported at once.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedtune.core.errors import JobError
from fedtune.core.secagg.graph import MIN_SURVIVORS, choose_thresholds

DEMO = "demo"  # the bundled base model or the bundled task, wherever a path is expected
BUNDLED = "bundled"  # the fleet that comes with fedtune
DEFAULT_LOCAL_STEPS = 20
SMALLEST_TIER = 4  # rank indices
MAX_JOB_BYTES = 1 << 20

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
class TrainingSettings:
    """[training]: what one client does with the adapter it receives.

    Args:
        local_steps: optimizer steps a round; 20 where neither this nor `local_epochs` is set.
        local_epochs: passes over the client's examples a round, instead of `local_steps`.
        batch_tokens: tokens an optimizer step, padding included; reached by accumulation where memory is short.
        learning_rate: of AdamW, made afresh every round, in round 1.
        schedule: how the learning rate goes down to 0 over the job's rounds; the server sends each round's value.
        proximal: μ of FedProx: μ/2·‖trained - received‖² is added to every step's loss.
        precision: of the arithmetic; "auto" takes bf16 where the hardware has it, fp16 on older GPUs, fp32 otherwise.
        weights: how a device holds the reference base: "packed" (least memory), "dequantized" (fastest), or "auto".
        seed: every random stream of the job follows from it.
    """

    local_steps: _Positive | None = None
    local_epochs: _PositiveFloat | None = None
    batch_tokens: Annotated[int, Field(ge=8, le=1 << 24)] = 2048
    learning_rate: _PositiveFloat = 2e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_gradient_norm: _PositiveFloat = 1.0
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    weights: Literal["auto", "packed", "dequantized"] = "auto"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0


@dataclass(frozen=True, config=_STRICT)
class FederationSettings:
    """[federation]: the rounds.

    Args:
        clients_per_round: a count, or a share of the population between 0 and 1.
        selection: "uniform", or on a simulated fleet "deadline": more than are wanted, of those that can be in time, or
            "utility": of those, the ones whose updates should teach most a second (Oort; by time alone where the server
            sees sums only).
        late: what becomes of an update that comes when its round has closed: "drop", or in the clear "next": the next
            round takes it at 1/√2 of its weight. Only simulated fleets know late updates yet.
        minimum_clients: fewer survivors than this and the round changes nothing.
        deadline: seconds after which a round goes on without those who have not answered, or "auto" to wait for all.
        aggregation: how client updates become one (fedtune.strategies.aggregators).
        rebalance_every: rounds after which both factors are brought to the same share of every direction; 0 for never.
            The product stays as it is; the next request carries the whole adapter, at 8 bits.
        server_optimizer: what the server makes of the aggregate (fedtune.strategies.server_optimizers).
        server_learning_rate: its η; without it 1 for "none" and "momentum", 0.01 for the others.
        robust: in the clear, a rule in place of the mean that a few hostile updates cannot steer.
        robust_share: of the clients, how many may be hostile: cut off at either end, or left out.
        clip_norm: in the clear, the length to which longer updates are scaled down.
        weight: what a client's update weighs: its examples, its target tokens, or the same as everyone's.
        weight_cap: examples or tokens above which a client's weight grows no more; a ring's cap is lower where the
            cohort's mean weight is, since its words have room for the heaviest (fedtune.core.codec.weight_cap).
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
        fleet: a file of kinds of device (fedtune.core.fleet), "bundled", or "" for devices that are all alike.
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
    def tiers(self) -> tuple[int, ...]:
        """adapter.tiers, with its default filled in: 4, 8, 16, … and the rank, or the rank alone where all need it."""
        rank = self.adapter.rank
        if self.adapter.tiers is not None:
            return self.adapter.tiers
        if needs_equal_ranks(self):
            return (rank,)
        return (*(SMALLEST_TIER << power for power in range(8) if SMALLEST_TIER << power < rank), rank)


def load_job(path: Path | None, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file and applies `section.key=value` overrides to it.

    Args:
        path: a TOML file, or None for the defaults, which are the bundled demo.
        overrides: each "section.key=value"; the value is TOML, or a bare string where it is not.

    Raises:
        JobError: with every problem found; relative paths are resolved against the job file's folder.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            if path.stat().st_size > MAX_JOB_BYTES:
                raise JobError([f"larger than {MAX_JOB_BYTES} bytes; expected a job file"], path)
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise JobError([f"cannot be read: {error.strerror}"], path) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise JobError([f"not TOML: {error}"], path) from error
    problems = [problem for override in overrides if (problem := _apply(table, override))]
    job, invalid = _validate(table)
    problems += invalid + _contradictions(job)
    if problems:
        raise JobError(problems, path)
    return _resolve_paths(job, path.parent if path else Path.cwd())


def dump_job(job: Job) -> str:
    """The job as TOML that `load_job` reads back to an equal job."""
    sections = {
        section: {key: value for key, value in settings.items() if value is not None}
        for section, settings in dataclasses.asdict(job).items()
    }
    return tomli_w.dumps(sections)


def hides_updates(job: Job) -> bool:
    """Whether the server sees only sums: nothing that looks at single updates can work then."""
    return job.compression.preset != "none" and job.compression_form == "ring"


def needs_equal_ranks(job: Job) -> str | None:
    """Why all clients must train the same rank; None where they need not."""
    federation = job.federation
    if federation.aggregation == "fedrot":
        return 'federation.aggregation is "fedrot", which turns whole factors'
    if federation.robust != "none":
        return f'federation.robust is "{federation.robust}", which compares whole updates'
    return None


def _tier_problems(job: Job) -> list[str]:
    tiers, rank, problems = job.tiers, job.adapter.rank, []
    if list(tiers) != sorted(set(tiers)) or tiers[-1] != rank:
        problems.append(f"adapter.tiers is {list(tiers)}; expected numbers that ascend to adapter.rank = {rank}")
    if len(tiers) > 1 and (reason := needs_equal_ranks(job)):
        problems.append(f"adapter.tiers has more than one, but {reason}; expected [{rank}]")
    if odd := sorted(set(job.simulation.ranks) - set(tiers)):
        problems.append(f"simulation.ranks has {odd}; expected only tiers: {list(tiers)} (adapter.tiers)")
    if job.simulation.ranks and job.simulation.fleet:
        problems.append("simulation.ranks and simulation.fleet are both set; a fleet's plans say what devices train")
    return problems


def _late_problems(job: Job) -> list[str]:
    late, aggregation = 'federation.late is "next"', job.federation.aggregation
    problems = []
    if not job.simulation.fleet:
        problems.append(f"{late}, but simulation.fleet names no fleet")
    if hides_updates(job):
        problems.append(f"{late}, but the server sees sums only, and cannot make one update weigh less")
    if aggregation == "alternating":
        problems.append(f'{late}, but federation.aggregation is "alternating": the next round trains another factor')
    if job.federation.rebalance_every:
        problems.append(f"{late}, but federation.rebalance_every changes the basis between rounds")
    if aggregation in ("flexlora", "flora"):
        problems.append(f'{late}, but federation.aggregation is "{aggregation}": the next round has another basis')
    return problems


def aggregation_problems(job: Job) -> list[str]:
    """What in [federation] contradicts itself, or needs to see what the server is not shown."""
    federation = job.federation
    method = f'federation.aggregation is "{federation.aggregation}"'
    averages_products = federation.aggregation in ("flexlora", "flora")
    problems = []
    if hides_updates(job):
        hidden = "but updates travel as words that only their sum can be decoded from"
        if averages_products:
            problems.append(f"{method}, which multiplies each client's factors, {hidden}")
        if federation.robust != "none":
            problems.append(f'federation.robust is "{federation.robust}", which compares single updates, {hidden}')
        if federation.clip_norm is not None:
            problems.append(f"federation.clip_norm is set, {hidden}; they are clipped on the devices already")
    elif averages_products and job.compression.preset != "none":
        problems.append(
            f'{method}, which changes the basis of both factors every round; expected compression.preset = "none", '
            "since residuals and coarse changes belong to one basis"
        )
    if averages_products and federation.server_optimizer != "none":
        problems.append(
            f'{method}, which changes the basis every round; expected federation.server_optimizer = "none", '
            "whose state belongs to one basis"
        )
    if averages_products and federation.robust != "none":
        problems.append(f'{method}; expected federation.robust = "none", whose rules reduce factors, not products')
    if federation.rebalance_every and averages_products:
        problems.append(f"{method}, which balances both factors every round; expected federation.rebalance_every = 0")
    if federation.rebalance_every and federation.aggregation == "ffa":
        problems.append(f"{method}, which keeps A as the job's seed made it; expected federation.rebalance_every = 0")
    if federation.server_learning_rate is not None and federation.server_optimizer == "none":
        problems.append('federation.server_learning_rate is set, but federation.server_optimizer is "none"')
    return problems


def _validate(table: Mapping[str, Any]) -> tuple[Job, list[str]]:
    """The job, with the default in place of every key that is wrong, and a sentence about each of those."""
    # Through JSON, where strict types still let a table stand for a nested dataclass. TOML's dates have no place there.
    text = json.dumps(table, default=lambda value: {type(value).__name__: str(value)})
    try:
        return TypeAdapter(Job).validate_json(text), []
    except ValidationError as error:
        reasons: dict[tuple[str, ...], list[str]] = {}
        for detail in error.errors():
            # A key with several allowed types fails once for each; its reasons become one sentence.
            reasons.setdefault(tuple(map(str, detail["loc"][:2])), []).append(_sentence(detail))
    job, further = _validate(_without(json.loads(text), list(reasons)))
    return job, [f"{'.'.join(key)}: {' or '.join(dict.fromkeys(texts))}" for key, texts in reasons.items()] + further


def _without(table: dict[str, Any], keys: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    for section, *key in keys:
        if key and isinstance(table.get(section), dict):
            table[section].pop(key[0], None)
        else:
            table.pop(section, None)
    return table


def _sentence(detail: Mapping[str, Any]) -> str:
    section = detail["loc"][0] if detail["loc"] else ""
    if detail["type"] == "unexpected_keyword_argument":
        known = _known_keys(str(section) if len(detail["loc"]) > 1 else None)
        return f"unknown key; expected one of {', '.join(known)}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("String should ")
    return f"expected {message}, got {detail['input']!r}"


def _known_keys(section: str | None) -> list[str]:
    sections = {field.name: field.default for field in dataclasses.fields(Job)}
    if section is None:
        return list(sections)
    settings = sections.get(section)
    return [field.name for field in dataclasses.fields(settings)] if settings is not None else []  # type: ignore[arg-type]


def _contradictions(job: Job) -> list[str]:
    problems = []
    if job.training.local_steps is not None and job.training.local_epochs is not None:
        problems.append("training.local_steps and training.local_epochs are both set; expected one of them")
    if job.training.batch_tokens < job.data.sequence_length:
        problems.append(
            f"training.batch_tokens is {job.training.batch_tokens}, less than one sequence "
            f"(data.sequence_length = {job.data.sequence_length})"
        )
    if job.data.train == DEMO and job.data.partition != "by-file":
        problems.append(f'data.partition is "{job.data.partition}", but the demo\'s households are clients already')
    wanted = job.federation.clients_per_round
    if isinstance(wanted, int) and job.federation.minimum_clients > wanted:
        problems.append(
            f"federation.minimum_clients is {job.federation.minimum_clients}, "
            f"more than federation.clients_per_round = {wanted}"
        )
    if job.compression_form == "sparse":
        if job.compression.rotation is not None:
            problems.append('compression.rotation is set, but only compression.form = "ring" rotates')
        if job.compression.bits == 1:
            problems.append('compression.bits is 1; compression.form = "sparse" takes 2 to 8')
    if job.federation.selection != "uniform" and not job.simulation.fleet:
        problems.append(f'federation.selection is "{job.federation.selection}", but simulation.fleet names no fleet')
    if job.federation.late == "next":
        problems += _late_problems(job)
    if job.export.formats and not job.data.evaluation:
        problems.append(
            "export.formats is set, but data.evaluation is empty: an export is checked on held-out examples before "
            "it is published; name a file, or set export.formats = []"
        )
    simulation = job.simulation
    if simulation.backend == "local" and simulation.threads != 1 and simulation.workers not in ("auto", 1):
        problems.append(
            f"simulation.workers is {simulation.workers} and simulation.threads is {simulation.threads}: threads do "
            'not live through a fork; expected threads = 1, workers = 1 or backend = "ray"'
        )
    if job.model.quantization == "none" and job.training.weights == "packed":
        problems.append('training.weights is "packed", but model.quantization is "none": nothing is packed')
    return problems + _tier_problems(job) + aggregation_problems(job) + _insecure(job)


def _insecure(job: Job) -> list[str]:
    """Why secure aggregation cannot do what the job asks of it; empty when it can, or is off."""
    secure, wanted = job.secure_aggregation, job.federation.clients_per_round
    if not secure.enabled:
        return []
    problems = []
    off = "or set secure_aggregation.enabled = false"
    if job.compression.preset == "none":
        problems.append(f'compression.preset is "none": float32 values cannot be masked; choose another preset, {off}')
    elif job.compression.form == "sparse":
        problems.append(f'compression.form is "sparse": only a ring can be masked; set form = "ring", {off}')
    if isinstance(wanted, int):
        problems += secure_cohort_problems(job, wanted)
    return problems


def secure_cohort_problems(job: Job, cohort: int) -> list[str]:
    """Why a cohort of this size cannot be summed securely as the job asks; empty when it can."""
    secure = job.secure_aggregation
    try:
        minimum = choose_thresholds(cohort, secure.max_corrupt, secure.max_dropout).minimum
    except JobError as error:
        return [f"secure_aggregation: {problem}" for problem in error.problems]
    if minimum < MIN_SURVIVORS:
        problem = (
            f"secure_aggregation: of {cohort} clients a round, {minimum} may be left; a sum hides an update among at "
            f"least {MIN_SURVIVORS}. Raise federation.clients_per_round or lower secure_aggregation.max_dropout"
        )
        return [problem]
    return []


def _apply(table: dict[str, Any], override: str) -> str | None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        return f'--set {override}: expected section.key=value, e.g. "federation.rounds=40"'
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    settings = table.setdefault(section, {})
    if not isinstance(settings, dict):
        return f"--set {override}: [{section}] is not a table in the job file"
    settings[key] = value
    return None


def _resolve_paths(job: Job, folder: Path) -> Job:
    def resolve(path: str) -> str:
        return path if path in ("", DEMO) else str((folder / path).absolute())

    base = folder / job.model.base
    model = dataclasses.replace(job.model, base=str(base.absolute())) if base.is_dir() else job.model
    if job.model.base == DEMO:
        model = job.model
    data = dataclasses.replace(job.data, train=resolve(job.data.train), evaluation=resolve(job.data.evaluation))
    fleet = job.simulation.fleet
    simulation = job.simulation if fleet == BUNDLED else dataclasses.replace(job.simulation, fleet=resolve(fleet))
    return dataclasses.replace(job, model=model, data=data, simulation=simulation)
