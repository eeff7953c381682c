"""The live page's view of a server: the job in progress, and devices with plan, last contact and state."""

from __future__ import annotations

from typing import Any

from fedtune.server.live.server_home import ServerHome
from fedtune.server.live.status_board import Board, DeviceStatus
from fedtune.server.watch.live_run import LiveRun, Shown


def live_run(home: ServerHome, board: Board) -> LiveRun:
    """Returns the run of a server's job in progress, as a live page shows it."""

    def shown() -> Shown:
        name = board.job.name if board.job else ""
        return Shown(name, home.path / "runs" / name)

    def devices() -> dict[str, dict[str, Any]]:
        return {name: _values(device) for name, device in board.snapshot().items()}

    def problems() -> tuple[str, ...]:
        return tuple(f"{problem.time}  {problem.text}" for problem in board.last_problems())

    return LiveRun(shown, lambda: board.job.state if board.job else "no job in progress", devices, problems)


def _values(device: DeviceStatus) -> dict[str, Any]:
    plan = device.plan
    return {
        "state": device.state,
        "heard": None if device.heard is None else round(device.heard),
        "plan": f"rank {plan.rank}, {plan.weights}" if plan else "",
        "predicted": plan.seconds if plan else None,
    }
