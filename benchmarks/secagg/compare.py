"""Is secure aggregation here faster, smaller and more exact than Flower's SecAgg+ on the same vectors?

Both run in this process, on one cohort with a complete graph and the same threshold. fedtune's round runs in full:
every client, every message, the sum compared bit for bit. Only a sample of Flower's clients runs, and its server's cost
is computed from measured units (flower_round.py), so every Flower row is scaled. Seconds are CPU seconds. Bytes are
payload bytes of one surviving client without the model; for Flower without its message envelope. "Total" is n clients
plus the server.

    python benchmarks/secagg/compare.py                       # n = 20 and 100, 100k and 1M parameters: some minutes
    python benchmarks/secagg/compare.py --clients 20 --parameters 100000 --dropout 0 0.2 --sample 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from flower_round import flower_round
from round_cost import Clock, Cost

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

from rehearsal import Rehearsal, Update, plain_sum

from fedtune.core.secagg import Segment, Stage

BITS = 4  # bits of a quantized value; a ring's word has more, enough for a sum over n clients
WEIGHT_LIMIT = 1 << 16
LORA_SIZE = 1e-3  # size of an update's coordinates that Flower gets as floats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--parameters", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument(
        "--sample", type=int, default=2, help="Flower's clients, and units of its server's work, to run"
    )
    options = parser.parse_args()
    print("| n | parameters | dropout | | client s | server s | total s | up B | down B | relative error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for n in options.clients:
        for parameters in options.parameters:
            updates = make_updates(n, parameters)
            for dropout in options.dropout:
                compare(updates, int(dropout * n), options.sample)


def compare(updates: dict[str, Update], dropouts: int, sample: int) -> None:
    """Prints three rows: fedtune, Flower, and the ratio of Flower to fedtune."""
    n, parameters = len(updates), updates["client-0"]["v"].size
    ours = our_round(updates, dropouts)
    floats = [(update["v"] / ((1 << BITS) - 1) - 0.5) * LORA_SIZE for update in updates.values()]
    flowers = flower_round(floats, dropouts, n // 2 + 1, sample)
    for name, cost in (("fedtune", ours), ("Flower (scaled)", flowers)):
        print(
            f"| {n} | {parameters:,} | {dropouts / n:.0%} | {name} | {cost.client:.3f} | {cost.server:.2f} "
            f"| {cost.total:.1f} | {cost.up:,} | {cost.down:,} | {cost.error:.2g} |"
        )
    bytes_ratio = (flowers.up + flowers.down) / (ours.up + ours.down)
    print(
        f"| | | | ratio | {flowers.client / ours.client:.1f} | {flowers.server / ours.server:.1f} "
        f"| **{flowers.total / ours.total:.1f}** | both ways: | **{bytes_ratio:.1f}** | |",
        flush=True,
    )


def make_updates(n: int, parameters: int) -> dict[str, Update]:
    """Draws quantized updates of n clients, and each client's weight as a segment of its own."""
    rng = np.random.default_rng(0)
    weight = np.array([100], dtype=np.uint32)
    return {
        f"client-{client_index}": {"v": rng.integers(0, 1 << BITS, parameters, dtype=np.uint8), "weight": weight}
        for client_index in range(n)
    }


def our_round(updates: dict[str, Update], dropouts: int) -> Cost:
    """Runs one whole round, whose last `dropouts` clients vanish after they have shared their keys."""
    n = len(updates)
    ring = (n * ((1 << BITS) - 1)).bit_length()
    segments = [
        Segment("v", updates["client-0"]["v"].size, ring, (1 << BITS) - 1, (0,)),
        Segment("weight", 1, 32, WEIGHT_LIMIT, (0,)),
    ]
    rehearsal = Rehearsal.prepare([0] * n, segments)
    cost, server, clients = Cost(clients=n), Clock(), [Clock() for _ in range(n - dropouts)]
    requests = rehearsal.server.open()
    while requests:
        for client_index, (client, request) in enumerate(requests.items()):
            if client_index >= len(clients):
                if rehearsal.server.stage is not Stage.MASK:
                    rehearsal.server.receive(client, rehearsal.answer(client, request, updates))
                continue
            with clients[client_index]:
                reply = rehearsal.answer(client, request, updates)
            with server:
                rehearsal.server.receive(client, reply)
            if client_index == 0:
                cost.up, cost.down = cost.up + len(reply), cost.down + len(request)
        with server:
            requests = rehearsal.server.advance()
    cost.client, cost.server = statistics.median(clock.seconds for clock in clients), server.seconds
    result = rehearsal.server.result
    expected = {name: plain_sum(updates, name, result.survivors) for name in result.sums}
    cost.error = 0.0 if all(np.array_equal(result.sums[name], expected[name]) for name in expected) else 1.0
    return cost


if __name__ == "__main__":
    main()
