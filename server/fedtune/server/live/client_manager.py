"""Says before every round which devices take part: it waits for all of them at first, and later for enough."""

from __future__ import annotations

from fedtune.core.host.clock import SYSTEM_CLOCK, Clock
from fedtune.core.job.contradictions import secure_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.server.live.registrar import AskableGrid, Registrar
from fedtune.strategies.cohorts.selection import cohort_size

MAX_LEAST = 1000  # devices that a round may need
_POLL_SECONDS = 0.2


class ClientManager:
    """The population of a run's rounds.

    Args:
        grid: of the run.
        registrar: knows who may be asked.
        known: the devices that the others know; one that is enrolled while a job runs takes part in the next.
        wait_seconds: how long the first round waits for everyone.
    """

    def __init__(
        self,
        grid: AskableGrid,
        registrar: Registrar,
        job: Job,
        known: set[str],
        wait_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._grid, self._registrar, self._job, self._known, self._clock = grid, registrar, job, known, clock
        self._until = clock.monotonic() + wait_seconds

    def __call__(self, grid: object) -> dict[str, int]:
        """Device -> node, as soon as a round of them can come to something."""
        del grid  # it is the one this was made with
        board = self._registrar.board
        while True:
            present = {name: node for name, node in self._registrar.present(self._grid).items() if name in self._known}
            everyone = len(present) == len(self._known) or self._clock.monotonic() >= self._until
            if everyone and self._enough(len(present)):
                self._until = 0.0  # later rounds wait for no more than they need
                board.working(state="training")
                return present
            least = next((count for count in range(len(present), MAX_LEAST) if self._enough(count)), MAX_LEAST)
            wanted = least if self._clock.monotonic() >= self._until else max(least, len(self._known))
            left_out = self._registrar.left_out
            unwilling = f", {left_out} more refuse or sit out" if left_out else ""
            board.working(state=f"waiting for devices: {len(present)} of {wanted} are there{unwilling}")
            self._clock.sleep(_POLL_SECONDS)

    def _enough(self, present: int) -> bool:
        """Whether a round with so many devices can come to anything."""
        settings = self._job.federation
        if present < settings.minimum_clients:
            return False
        if not self._job.secure_aggregation.enabled:
            return True
        return not secure_cohort_problems(self._job, cohort_size(settings.clients_per_round, present))
