"""The check of a job for settings that contradict each other; each problem is a sentence that names the keys."""

from __future__ import annotations

from fedtune.core.job.methods import AGGREGATIONS, RULE
from fedtune.core.job.secure_cohorts import FEWEST_MEANS, FEWEST_TESTED, grouped_cohort_problems
from fedtune.core.job.settings import DEMO, Job
from fedtune.core.metrics import METRICS

NO_FEEDBACK_IN_A_RING = (
    "a residual carried into a later sum is a memory that the sum's round does not name, by which a server that "
    "chooses cohorts can read one client's update, and a device that takes part once never sends it"
)


UNMASKED_GROUPS = (
    "secure_aggregation.groups is {}, but secure_aggregation.enabled is false: the server sees every update, and a "
    "rule can act on all of them; expected groups = 1"
)


def contradictions(job: Job) -> list[str]:
    """Returns one sentence for each contradiction in a job; empty when there is none."""
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
    problems += _form_problems(job)
    if job.federation.late == "next":
        problems += _late_problems(job)
    if job.export.formats and not job.data.evaluation:
        problems.append(
            "export.formats is set, but data.evaluation is empty: an export is checked on held-out examples before "
            "it is published; name a file, or set export.formats = []"
        )
    if METRICS[job.evaluation.metric].generated and not job.data.evaluation:
        problems.append(
            f'evaluation.metric is "{job.evaluation.metric}", but data.evaluation is empty: there are no examples to '
            'answer; name a file, or set evaluation.metric = "exact"'
        )
    if job.export.formats and (reason := unexportable(job)):
        problems.append(
            f'export.formats is set, but {reason}; expected federation.aggregation = "flexlora", or export.formats = []'
        )
    simulation = job.simulation
    if simulation.backend == "local" and simulation.threads != 1 and simulation.workers not in ("auto", 1):
        problems.append(
            f"simulation.workers is {simulation.workers} and simulation.threads is {simulation.threads}: threads do "
            'not survive a fork; expected threads = 1, workers = 1 or backend = "ray"'
        )
    if simulation.backend == "ray" and simulation.together not in ("auto", 1):
        problems.append(
            f'simulation.together is {simulation.together}, but simulation.backend is "ray", whose actors train one '
            'client after another; expected together = 1 or backend = "local"'
        )
    if job.model.quantization == "none" and job.training.weights == "packed":
        problems.append('training.weights is "packed", but model.quantization is "none": nothing is packed')
    if job.budget.money is not None and not job.cost.priced:
        problems.append(
            f"budget.money is {job.budget.money:g}, but [cost] has no price; expected one of cost.kwh, cost.gb_up, "
            "cost.gb_down, cost.hour and cost.device_hour"
        )
    problems += _tier_problems(job) + _kind_problems(job) + aggregation_problems(job) + _insecure(job)
    return problems + _privacy_problems(job)


def _form_problems(job: Job) -> list[str]:
    """Returns one sentence for each key of [compression] that the form in which updates travel does not have."""
    form, settings, problems = job.compression_form, job.compression, []
    if form == "ring" and settings.error_feedback:
        problems.append(
            f'compression.error_feedback is true, but compression.form is "ring": {NO_FEEDBACK_IN_A_RING}; expected '
            'error_feedback = false, or form = "sparse" with secure_aggregation.enabled = false'
        )
    if form != "ring" and settings.rotation is not None:
        problems.append('compression.rotation is set, but only compression.form = "ring" rotates')
    if form != "ring" and settings.bits == 1:
        problems.append(f'compression.bits is 1; compression.form = "{form}" takes 2 to 8')
    if form != "sparse" and settings.density is not None:
        problems.append('compression.density is set, but only compression.form = "sparse" leaves values out')
    return problems


def _privacy_problems(job: Job) -> list[str]:
    """Returns the reasons why the job's rounds cannot have the guarantee of its [privacy]; empty when they can."""
    settings, problems = job.privacy, []
    if settings.mode == "off":
        return []
    asked = f'privacy.mode is "{settings.mode}", but'
    if settings.mode == "distributed" and not job.secure_aggregation.enabled:
        problems.append(
            f"{asked} secure_aggregation.enabled is false: the server would see each update with a small share of the "
            'noise; expected enabled = true, or mode = "central"'
        )
    elif job.compression_form != "ring":
        problems.append(
            f'{asked} compression.form is "{job.compression_form}": noise is for words of a ring; expected form = '
            '"ring"'
        )
    if job.training.local_epochs is not None:
        problems.append(
            f"{asked} training.local_epochs is set: the clip follows from the number of steps; expected "
            "training.local_steps"
        )
    if job.federation.selection != "uniform":
        problems.append(
            f'{asked} federation.selection is "{job.federation.selection}", which asks some clients more often than '
            'others; expected "uniform"'
        )
    if job.federation.weight != "uniform":
        problems.append(
            f'{asked} federation.weight is "{job.federation.weight}": a weight is a client\'s data too; expected '
            '"uniform"'
        )
    if job.federation.evaluate_clients_every:
        problems.append(
            f"{asked} federation.evaluate_clients_every is set: scores are a client's data without noise; expected 0"
        )
    return problems


def unexportable(job: Job) -> str | None:
    """Returns the reason why an export could not hold all of the run's result; None when it can."""
    aggregation = job.federation.aggregation
    if AGGREGATIONS[aggregation].keeps_residual:
        return (
            f'federation.aggregation is "{aggregation}": the server keeps what the rank of the adapter cannot hold as '
            "a residual, and an export has the adapter only"
        )
    return None


def _insecure(job: Job) -> list[str]:
    """Returns the reasons why the job cannot use secure aggregation; empty when it can, or when it is off."""
    secure, wanted = job.secure_aggregation, job.federation.clients_per_round
    if not secure.enabled:
        return [UNMASKED_GROUPS.format(secure.groups)] if secure.groups > 1 else []
    problems = []
    off = "or set secure_aggregation.enabled = false"
    if job.compression.preset == "none":
        problems.append(f'compression.preset is "none": float32 values cannot be masked; choose another preset, {off}')
    elif job.compression_form != "ring":
        problems.append(
            f'compression.form is "{job.compression.form}": only a ring can be masked; set form = "ring", {off}'
        )
    if isinstance(wanted, int):
        problems += grouped_cohort_problems(job, wanted)
    if secure.groups > 1 and job.federation.selection != "uniform":
        problems.append(
            f'secure_aggregation.groups is {secure.groups}, but federation.selection is "{job.federation.selection}", '
            "which closes a round once enough clients of all have answered, and may leave any group with too few; "
            'expected "uniform", or groups = 1'
        )
    return problems


def _tier_problems(job: Job) -> list[str]:
    tiers, rank, problems = job.tiers, job.adapter.rank, []
    if list(tiers) != sorted(set(tiers)) or tiers[-1] != rank:
        problems.append(f"adapter.tiers is {list(tiers)}; expected numbers that ascend to adapter.rank = {rank}")
    if len(tiers) > 1 and (reason := job.needs_equal_ranks):
        problems.append(f"adapter.tiers has more than one, but {reason}; expected [{rank}]")
    if odd := sorted(set(job.simulation.ranks) - set(tiers)):
        problems.append(f"simulation.ranks has {odd}; expected only tiers: {list(tiers)} (adapter.tiers)")
    if job.simulation.ranks and job.simulation.fleet:
        problems.append("simulation.ranks and simulation.fleet are both set; a fleet's plans say what devices train")
    return problems


def _kind_problems(job: Job) -> list[str]:
    """Returns the reasons why the aggregation cannot combine adapters of the job's kind."""
    if job.adapter.kind == "lora":
        return []
    federation = job.federation
    problems: list[str] = []
    kind = f'adapter.kind is "{job.adapter.kind}", which has no pair of trained factors'
    if AGGREGATIONS[federation.aggregation].needs_pair:
        problems.append(
            f'{kind}, but federation.aggregation is "{federation.aggregation}"; expected "fedavg", or '
            'adapter.kind = "lora"'
        )
    if federation.rebalance_every:
        problems.append(f'{kind} to balance; expected federation.rebalance_every = 0, or adapter.kind = "lora"')
    return problems


def _late_problems(job: Job) -> list[str]:
    late, aggregation = 'federation.late is "next"', job.federation.aggregation
    method = AGGREGATIONS[aggregation]
    problems = []
    if not job.simulation.fleet:
        problems.append(f"{late}, but simulation.fleet names no fleet")
    if job.hides_updates:
        problems.append(f"{late}, but the server sees sums only, and cannot make one update weigh less")
    if len(method.trains) > 1:
        problems.append(f'{late}, but federation.aggregation is "{aggregation}": the next round trains another factor')
    if job.federation.rebalance_every:
        problems.append(f"{late}, but federation.rebalance_every changes the basis between rounds")
    if method.changes_basis:
        problems.append(f'{late}, but federation.aggregation is "{aggregation}": the next round has another basis')
    return problems


def aggregation_problems(job: Job) -> list[str]:
    """Returns one sentence for each setting in [federation] that contradicts others or needs values hidden by masks."""
    federation = job.federation
    name, method = f'federation.aggregation is "{federation.aggregation}"', AGGREGATIONS[federation.aggregation]
    problems = []
    if job.hides_updates:
        hidden = "but updates travel as words that only their sum can be decoded from"
        if method.sees_updates:
            exact = ' and compression.preset = "none"' if method.changes_basis else ""
            problems.append(f"{name}, which {method.sees_updates}, {hidden}; expected {_shown_by(job)}{exact}")
        if federation.robust != "none":
            problems += _hidden_rule_problems(job, hidden)
        if federation.clip_norm is not None:
            clipped = f"they are clipped on the devices already; leave it out, or set {_shown_by(job)}"
            problems.append(f"federation.clip_norm is set, {hidden}; {clipped}")
        if federation.weight != "uniform":
            problems.append(
                f'federation.weight is "{federation.weight}", {hidden}: weights among them would tell example counts, '
                f'and a false one could not be noticed; expected "uniform", or {_shown_by(job)}'
            )
    elif federation.robust == "group-testing":
        problems.append(
            'federation.robust is "group-testing", which tests sums over groups, but the server sees every update; '
            'expected "median", "trimmed-mean" or "multi-krum", or secure_aggregation.enabled = true'
        )
    elif method.changes_basis and job.compression.preset != "none":
        problems.append(
            f'{name}, which changes the basis of both factors every round; expected compression.preset = "none", '
            "since residuals and coarse changes belong to one basis"
        )
    if method.changes_basis and federation.server_optimizer != "none":
        problems.append(
            f'{name}, which changes the basis every round; expected federation.server_optimizer = "none", '
            "whose state belongs to one basis"
        )
    if method.sees_updates and federation.robust != "none":
        problems.append(f'{name}; expected federation.robust = "none", whose rules reduce factors, not products')
    if federation.rebalance_every and method.changes_basis:
        problems.append(f"{name}, which balances both factors every round; expected federation.rebalance_every = 0")
    if federation.rebalance_every and method.freezes_a:
        problems.append(f"{name}, which keeps A as the job's seed made it; expected federation.rebalance_every = 0")
    if federation.server_learning_rate is not None and federation.server_optimizer == "none":
        problems.append('federation.server_learning_rate is set, but federation.server_optimizer is "none"')
    return problems


def _shown_by(job: Job) -> str:
    """Returns the setting by which the server would see every single update."""
    return "secure_aggregation.enabled = false" if job.secure_aggregation.enabled else 'compression.form = "dense"'


def _hidden_rule_problems(job: Job, hidden: str) -> list[str]:
    """Returns the reasons why a robust rule cannot act on the means of groups."""
    federation, secure = job.federation, job.secure_aggregation
    rule = f'federation.robust is "{federation.robust}"'
    if not secure.enabled or secure.groups < FEWEST_MEANS:
        over = f'"median" or "trimmed-mean" with secure_aggregation.groups of {FEWEST_MEANS} or more'
        over += f', or "group-testing" with {FEWEST_TESTED} or more, or {_shown_by(job)}'
        return [f'{rule}, which {RULE.sees_updates}, {hidden}; expected "none", or {over}']
    if federation.robust == "multi-krum":
        problem = f"{rule}, which leaves out whole updates for their distance from others, and a few means of groups"
        expected = f'expected "median" or "trimmed-mean", or {_shown_by(job)} and groups = 1'
        return [f"{problem} cannot be told apart by distance; {expected}"]
    if federation.robust == "group-testing" and secure.groups < FEWEST_TESTED:
        problem = f"{rule}, which compares directions, but secure_aggregation.groups is {secure.groups}"
        return [f'{problem}; expected {FEWEST_TESTED} or more, or "median"']
    if federation.robust == "trimmed-mean" and int(federation.robust_share * secure.groups) < 1:
        problem = f"{rule}, which cuts off none of {secure.groups} groups at federation.robust_share = "
        return [f"{problem}{federation.robust_share}; expected a share of at least 1 / {secure.groups}"]
    return []
