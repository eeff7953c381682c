"""The peer's ServerApp, which waits for its clients, measures, and writes the results."""

from __future__ import annotations

import json
import time
from pathlib import Path

from exchanges import measure, workloads
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serves one run of `flwr run`."""
    clients = int(context.run_config["clients"])
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        time.sleep(0.2)
    Path(str(context.run_config["out"])).write_text(json.dumps(measure(grid, nodes, workloads(clients))))
