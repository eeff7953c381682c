"""The peer: the pattern of Flower's published LLM fine-tuning app, on Flower's own FedAvg and Ray simulation engine.

    python peer.py --base DIR --clients 10 --cohort 10 --rounds 3 --local-steps 5 --workers 2

Every client call loads and quantizes the model again (peer_client.py). The program prints a line a round, as
`fedtune simulate` does when piped.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peer_client import app as client_app
from peer_client import initial_arrays
from workload import Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("clients", "cohort", "rounds", "local-steps", "workers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", action="store_true", help="what peer_client.py says")
    options = vars(parser.parse_args())
    workers, tuned = options.pop("workers"), options.pop("tuned")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    workload = Workload(**options)
    run_simulation(
        server_app(workload, tuned),
        client_app,
        num_supernodes=workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": workers, "logging_level": logging.ERROR, "log_to_driver": False},
        },
    )


def server_app(workload: Workload, tuned: bool) -> ServerApp:
    """Returns a ServerApp with FedAvg over A and B, without evaluation."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        strategy = _Announced(
            fraction_train=workload.cohort / workload.clients,
            min_available_nodes=workload.clients,
            fraction_evaluate=0.0,
        )
        strategy.start(
            grid=grid,
            initial_arrays=initial_arrays(workload.base),
            num_rounds=workload.rounds,
            train_config=ConfigRecord({"local-steps": workload.local_steps, "base": workload.base, "tuned": tuned}),
        )

    return app


class _Announced(FedAvg):
    """FedAvg that prints a line when a round's aggregate is ready."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is None:
            raise RuntimeError(f"round {server_round}: no client survived")
        print(f"round {server_round}  loss {metrics['train_loss']:.3f}", flush=True)
        return arrays, metrics


if __name__ == "__main__":
    main()
