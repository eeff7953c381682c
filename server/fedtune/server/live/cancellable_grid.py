"""A run's grid that ends the run once its job is cancelled, at the next look for answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedtune.core.errors import PeerError
from fedtune.flower.run_grid import RunGrid
from fedtune.flower.stock_apps import Grid


class CancellableGrid(Grid):
    """Passes every call on to the run's grid.

    A round looks for answers several times a second, and so does the wait for devices: a job that waits for a device
    that will never answer can be cancelled, too.

    Args:
        grid: the run's grid.
        check: raises RunCancelledError if the job is cancelled.
    """

    def __init__(self, grid: RunGrid, check: Callable[[], None]) -> None:
        self._grid, self._check = grid, check

    def set_run(self, run: Any) -> None:
        """Replaces the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self._grid.run

    def create_message(self, *arguments: Any, **named: Any) -> Any:
        """Refuses Flower's deprecated way to make a message."""
        return self._grid.create_message(*arguments, **named)

    def get_node_ids(self) -> list[int]:
        """Returns the devices that are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Any]) -> Sequence[str]:
        """Sends messages, as `RunGrid` does."""
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Returns the replies that are there, as `RunGrid` does."""
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Sends the messages, and waits for their replies."""
        self._check()
        return self._grid.send_and_receive(messages, timeout=timeout)

    # -- for the registration of devices ------------------------------------------------------------------------------

    def drop_late(self) -> set[int]:
        """Discards late answers, as `RunGrid` does; called several times a second while devices are waited for."""
        self._check()
        return self._grid.drop_late()

    def sitting_out(self) -> set[int]:
        """Returns the nodes that sit out, as `RunGrid` does."""
        return self._grid.sitting_out()

    def ask(
        self, nodes: Iterable[int], action: str, group: str, payload: bytes, seconds: float
    ) -> dict[int, bytes | PeerError]:
        """Asks all nodes the same, as `RunGrid` does."""
        return self._grid.ask(nodes, action, group, payload, seconds)
