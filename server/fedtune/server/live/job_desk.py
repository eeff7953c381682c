"""The end of each job that the server works on: finished, failed or cancelled; or it stays in the queue."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fedtune.core.errors import InputError, RunCancelledError, RunError
from fedtune.flower.run_grid import LinkLostError
from fedtune.server.live.job_history import has_rounds, how_far
from fedtune.server.live.job_queue import CANCELLED, FAILED, FINISHED, Jobs, QueuedJob
from fedtune.server.run_directory import SUMMARY

MAX_ERRORS = 3  # unexpected errors after which a job counts as failed


@dataclass(frozen=True)
class Ending:
    """The end of a job.

    Args:
        state: "finished", "failed" or "cancelled".
        reason: as the queue keeps it; "" for a finished job.
        text: a sentence for people.
    """

    job: QueuedJob
    state: str
    reason: str
    text: str


class JobDesk:
    """Runs jobs until they end.

    Args:
        work: resumes or begins a job, and runs it to its end.
        ended: told of each job's end, once the queue has it.
    """

    def __init__(self, jobs: Jobs, work: Callable[[QueuedJob], None], ended: Callable[[Ending], None]) -> None:
        self._jobs, self._work, self._ended = jobs, work, ended
        self._errors: Counter[str] = Counter()

    def take(self, job: QueuedJob) -> None:
        """Works on a job, which then has ended, or stays in the queue.

        Raises:
            RunError: the failure is not the job's, as far as is known, and the job may be tried again.
        """
        if job.is_cancelled and not has_rounds(self._jobs, job):
            self._cancelled(job)
            return
        try:
            self._work(job)
        except RunCancelledError:
            self._cancelled(job)
        except InputError as error:
            self._fail(job, str(error))
        except LinkLostError:
            raise
        except RunError as error:
            if not (self._jobs.run_path(job) / SUMMARY).is_file():
                raise  # a full disk, for example: the job goes on when there is space again
            self._fail(job, str(error))
        except Exception as error:  # from torch, Flower or a bug: the job fails, the server goes on
            traceback.print_exc()
            self._errors[job.name] += 1
            reason = f"{type(error).__name__}: {error}"
            if self._errors[job.name] < MAX_ERRORS:
                raise RunError(reason) from error
            self._fail(job, reason, f", {MAX_ERRORS} times", "; the log has the traceback")
        else:
            self._jobs.finish(job)
            self._ended(Ending(job, FINISHED, "", f"job {job.name} finished: {self._jobs.run_path(job)}"))

    def _cancelled(self, job: QueuedJob) -> None:
        reason = how_far(self._jobs, job)
        self._jobs.set_aside(job, reason)
        self._ended(Ending(job, CANCELLED, reason, f"job {job.name} {reason}"))

    def _fail(self, job: QueuedJob, reason: str, often: str = "", more: str = "") -> None:
        if job.is_cancelled:  # nobody wants it any more; but its adapter may be missing, which the reason explains
            reason = f"{how_far(self._jobs, job)}; it could not be closed: {reason}"
            self._jobs.set_aside(job, reason)
            self._ended(Ending(job, CANCELLED, reason, f"job {job.name} {reason}{more}"))
            return
        self._jobs.fail(job, reason)
        self._ended(Ending(job, FAILED, reason, f"job {job.name} failed{often}: {reason}{more}"))
