"""One error tree: every error says what was wrong, where, and what was expected, and whose fault it was.

FedtuneError                exit status 1
├── InputError              exit status 2: the person at the keyboard can mend it
│   ├── JobError            the job file; carries every problem found, not the first
│   ├── DataError           a data file; names file and line
│   ├── ModelError          a base model or an adapter that does not fit it
│   ├── RunDirectoryError   a run directory that is in the way, incomplete or not one
│   ├── ExportError         an exported directory that is in the way, corrupt or not one; names the file; or a run
│   │                       that no export could hold
│   └── MissingExtraError   a command whose packages are not installed; prints the pip line
├── RunError                the run could not go on; what was acknowledged is on disk
│   └── RoundAbortedError   a secure round ends without a sum
├── UpdateError             one client's update is refused; the round goes on without it
└── PeerError               bytes from the other side are malformed, oversized or out of order
    ├── ServerFaultError    in secure aggregation a client refuses what the server sent
    └── ClientFaultError    in secure aggregation the server refuses what one client sent; names the client

An error of secure aggregation leaves the session that raises it as it was.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class FedtuneError(Exception):
    """Base of all errors that fedtune raises on purpose."""

    exit_status = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the message and the attributes, whatever a type's constructor takes."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InputError(FedtuneError):
    """The input was wrong; the message says where and what was expected."""

    exit_status = 2


class JobError(InputError):
    """The job cannot be run as written.

    Args:
        problems: one sentence each, all that were found.
        source: the file they were found in, or None for a job made in code.
    """

    def __init__(self, problems: Sequence[str], source: Path | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        where = str(source) if source else "job"
        super().__init__("\n".join(f"{where}: {problem}" for problem in self.problems))


class DataError(InputError):
    """A data file cannot be used; `line` counts from 1 and is None when the whole file is meant."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}:{line}: {problem}" if line is not None else f"{path}: {problem}")


class ModelError(InputError):
    """A base model cannot be loaded, or an adapter does not fit it."""


class RunDirectoryError(InputError):
    """A run directory exists already, is incomplete, or is not a run directory."""


class ExportError(InputError):
    """An exported directory is in the way, corrupt or not one; or no export could hold what a run learnt."""


class MissingExtraError(InputError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, command: str, extra: str, missing: str) -> None:
        super().__init__(f"{command} needs the package {missing}. Install it with: pip install 'fedtune[{extra}]'")


class RunError(FedtuneError):
    """The run could not go on."""


class UpdateError(FedtuneError):
    """One client's update is refused, with the reason; the round goes on without that client."""


class PeerError(FedtuneError):
    """The other side sent bytes that are malformed, oversized or out of order."""


class ServerFaultError(PeerError):
    """What the server sent is refused. The client session is as it was before and still waits for a good message.

    Attributes:
        suspect: the client that is to blame if the server is not; the next attempt should do without it.
    """

    def __init__(self, problem: str, suspect: str | None = None) -> None:
        self.suspect = suspect
        super().__init__(problem)


class ClientFaultError(PeerError):
    """What one client sent is refused. The server session is as it was before; the round goes on without the client."""

    def __init__(self, client: str, problem: str) -> None:
        self.client = client
        super().__init__(f"client {client}: {problem}")


class RoundAbortedError(RunError):
    """Too few clients are left, or their shares do not fit together: this round ends without a sum.

    Another attempt at the same round may follow if it ended before the votes were shown; clients that have revealed
    their shares serve only a later round.
    """
