"""How much virtual time does each way of choosing clients take to a target exact match on a fleet of unequal devices?

The bundled fleet and the demo's task, one household a device. Training is real; time is the fleet's: what a device
takes follows from its kind, with jitter, and devices are away or vanish as their kind does, alike for every policy.

    uniform          K clients, and the round waits for the slowest
    deadline-aware   1.3·K of those that can do some of the work by the deadline, 1.3 × the 80th percentile of predicted
                     times; slow ones do as many steps as they can; the round closes with the K-th update
    utility-aware    the same, chosen by Oort's utility

    python benchmarks/fleet/run.py                    # about ten minutes on two cores
    python benchmarks/fleet/run.py --fleet my.toml --target 0.5
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from fedtune.client.device import Device
from fedtune.client.plan.planner import RESERVE, NoPlanError, Wishes, choose
from fedtune.client.store import ClientStore
from fedtune.core.errors import FedtuneError
from fedtune.core.fleet import Fleet, Kind, load_fleet
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job, load_job
from fedtune.core.messages import TrainRequest, decode, encode
from fedtune.core.seeds import generator
from fedtune.demo import FLEET, JOB
from fedtune.model.shape import shape_of
from fedtune.server.evaluator import ModelEvaluator
from fedtune.server.simulation.workshop import Workshop
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.round import LATE, Federation, TrainingRound, initial_state
from fedtune.strategies.selection import Selection
from fedtune.strategies.strategy import federation_from_job
from fedtune.strategies.timed_selection import DeadlineSelection, UtilitySelection
from fedtune.strategies.virtual_clock import round_deadline, run_clock, work_share

HERE = Path(__file__).parent
CLIENTS, COHORT, MOST_ROUNDS = 100, 10, 24
PROGRAM_BYTES = 400_000_000  # what a training process takes before it loads a model
UPDATE_BYTES, ADAPTER_BYTES = 21_000, 31_000  # of a client-round, benchmarks/demo
POLICIES = ("uniform", "deadline-aware", "utility-aware")


@dataclass(frozen=True)
class Outcome:
    """One policy's run.

    Args:
        seconds: of virtual time until the target was met; None where it never was.
        updates: kind -> updates that counted.
    """

    rounds: int
    seconds: float | None
    total: float
    exact_match: float
    updates: Counter[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, default=FLEET)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    fixed = [
        "secure_aggregation.enabled=false",
        "export.formats=[]",
        f"data.clients={CLIENTS}",
        f"federation.clients_per_round={COHORT}",
        f"federation.rounds={MOST_ROUNDS}",
    ]
    try:
        job = load_job(JOB, [*fixed, *options.overrides])
        fleet = load_fleet(options.fleet)
        able = plans(job, fleet)
        outcomes = {policy: run(job, fleet, able, policy, options.target) for policy in POLICIES}
    except FedtuneError as error:
        parser.exit(error.exit_status, f"{error}\n")
    table = format_table(outcomes, fleet)
    print(f"\n{table}")
    if not options.dry:
        write_results(table, options.target)


def plans(job: Job, fleet: Fleet) -> set[str]:
    """The kinds that the model fits, each with its plan printed."""
    shape, able = shape_of(job.model), set()
    steps = job.training.local_steps or DEFAULT_LOCAL_STEPS
    for kind in fleet.kind:
        budget = round(kind.memory_mb * 1e6 * (1 - RESERVE)) - PROGRAM_BYTES
        training = job.training
        wishes = Wishes("nf4", "fp32", job.adapter.rank, job.data.sequence_length, training.batch_tokens, steps)
        try:
            plan = choose(shape, wishes, budget)
        except NoPlanError as error:
            print(f"{kind.name} sits out: {error}")
            continue
        able.add(kind.name)
        choices = plan.choices
        print(f"{kind.name}: {choices.weights}, {choices.tokens} tokens at once", flush=True)
    return able


def run(job: Job, fleet: Fleet, able: set[str], policy: str, target: float) -> Outcome:
    """Rounds until the target is met."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(job, Path(folder))
        device = Device(lambda _: workshop.model, workshop.examples, ClientStore(Path(folder)))
        evaluator = ModelEvaluator(workshop.model, job.data)
        kinds = fleet.assign(workshop.population.names, job.training.seed)
        tokens = (job.training.local_steps or DEFAULT_LOCAL_STEPS) * job.training.batch_tokens
        predicted = {name: kind.seconds(tokens, UPDATE_BYTES, ADAPTER_BYTES) for name, kind in kinds.items()}
        federation = federation_from_job(job, workshop.base, workshop.model.layout)
        federation = replace(federation, selection=_selection(policy, job, predicted, federation.selection))
        state = initial_state(federation)
        broadcast = Broadcast(federation.layout, federation.layout.initial(job.training.seed), exact=False)
        clock, updates, exact_match = 0.0, Counter[str](), 0.0
        for number in range(1, MOST_ROUNDS + 1):
            present = [n for n, kind in kinds.items() if kind.name in able and _present(job, kind, number, n)]
            deadline = None if policy == "uniform" else round_deadline([predicted[name] for name in present])
            round_ = TrainingRound.open(federation, state, present, broadcast)
            shares = {n: work_share(predicted[n], deadline) if deadline else 1.0 for n in round_.cohort}
            times = {n: _seconds(job, kinds[n], number, n, predicted[n] * shares[n]) for n in round_.cohort}
            course = run_clock(times, COHORT, deadline)
            for name in course.arrived:
                request = _request(round_, name, shares[name])
                round_.take_in(name, encode(device.train(name, request)))
                updates[kinds[name].name] += 1
            for name in course.late:
                round_.give_up(name, LATE)
            state, record = round_.close()
            federation = _learned(federation, number, record.clients)
            clock += course.seconds
            score = evaluator.evaluate(state.adapter)
            exact_match = score.exact_match if score else 0.0
            print(
                f"{policy} round {number}: {course.seconds:.1f} s, {len(course.arrived)} of {len(times)} in time, "
                f"exact match {exact_match:.1%} after {clock:.0f} s",
                flush=True,
            )
            if exact_match >= target:
                return Outcome(number, clock, clock, exact_match, updates)
    return Outcome(MOST_ROUNDS, None, clock, exact_match, updates)


def format_table(outcomes: dict[str, Outcome], fleet: Fleet) -> str:
    """Markdown."""
    names = [kind.name for kind in fleet.kind]
    head = ("policy", "virtual s to target", "of uniform", "rounds", "s a round", *(f"updates of {n}" for n in names))
    lines = [list(head), ["---"] * len(head)]
    baseline = outcomes["uniform"].seconds
    for policy, outcome in outcomes.items():
        counted = sum(outcome.updates.values())
        lines.append(
            [
                policy,
                "not reached" if outcome.seconds is None else f"{outcome.seconds:.0f}",
                f"{outcome.seconds / baseline:.0%}" if outcome.seconds and baseline else "",
                f"{outcome.rounds}",
                f"{outcome.total / outcome.rounds:.1f}",
                *(f"{outcome.updates[name] / counted:.0%}" for name in names),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_results(table: str, target: float) -> None:
    """Keeps the table beside this program."""
    question, _, rest = (__doc__ or "").partition("\n\n")
    command = shlex.join(["python", "benchmarks/fleet/run.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
    ran = f"`{command}` on {datetime.date.today():%Y-%m-%d}: {machine}. Target: exact match {target:.0%}; one seed."
    text = ["# Choosing clients on a fleet, in virtual time", question, ran, table, rest.strip()]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _selection(policy: str, job: Job, predicted: dict[str, float], uniform: Selection) -> Selection:
    match policy:
        case "deadline-aware":
            return DeadlineSelection(COHORT, job.training.seed, predicted)
        case "utility-aware":
            return UtilitySelection(COHORT, job.training.seed, predicted)
    return uniform


def _learned(federation: Federation, number: int, clients: tuple) -> Federation:  # type: ignore[type-arg]
    if isinstance(federation.selection, UtilitySelection):
        return replace(federation, selection=federation.selection.learned(number, clients))
    return federation


def _present(job: Job, kind: Kind, number: int, name: str) -> bool:
    return float(generator(job.training.seed, "present", number, name).random()) < kind.availability


def _seconds(job: Job, kind: Kind, number: int, name: str, expected: float) -> float | None:
    random = generator(job.training.seed, "course", number, name)
    vanishes = float(random.random()) < kind.failure_rate
    return None if vanishes else expected * float(random.lognormal(0.0, kind.jitter))


def _request(round_: TrainingRound, name: str, share: float) -> TrainRequest:
    request = decode(round_.requests.payload(name), TrainRequest)
    steps = max(1, round(share * request.work.local_steps))
    return msgspec.structs.replace(request, work=msgspec.structs.replace(request.work, local_steps=steps))


if __name__ == "__main__":
    main()
