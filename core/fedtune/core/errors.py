"""The tree of errors. A message states the problem, its place and the expected value; the type shows whose fault it is.

FedtuneError                exit status 1
├── InputError              exit status 2: the user can correct the input
│   ├── JobError            the job file; carries all problems found, not only the first
│   ├── DataError           a data file; names file and line
│   ├── ModelError          a base model or an adapter that does not fit it
│   ├── RunDirectoryError   a run directory that is in the way, incomplete or not one
│   ├── ExportError         an exported directory that is in the way, corrupt or not one; names the file; or a run
│   │                       that no export could hold
│   └── MissingExtraError   a command whose packages are not installed; prints the pip line
├── RunError                the run could not go on; all acknowledged rounds are on disk
│   ├── RunCancelledError   the operator has cancelled it
│   └── RoundAbortedError   a secure round ends without a sum
│       └── UnfitSharesError    since shares do not fit together, and it is not certain by whose fault
├── UpdateError             a client's update is refused; the round goes on without it
└── PeerError               bytes from the other side are malformed, oversized or out of order
    ├── ServerFaultError    in secure aggregation a client refuses the server's message
    └── ClientFaultError    in secure aggregation the server refuses a client's message; names the client

An error of secure aggregation does not change the session that raises it.
"""

from __future__ import annotations

import copyreg
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FedtuneError(Exception):
    """The base class of all errors that fedtune raises on purpose."""

    exit_status = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the message and the attributes, independent of the parameters of a type's constructor."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InputError(FedtuneError):
    """The input is wrong; the message states the place and the expected value."""

    exit_status = 2


class JobError(InputError):
    """The job cannot be run as written.

    Args:
        problems: all problems that were found, one sentence each.
        source: file of the job, or None for a job made in code.
    """

    def __init__(self, problems: Sequence[str], source: Path | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        where = str(source) if source else "job"
        super().__init__("\n".join(f"{where}: {problem}" for problem in self.problems))


class DataError(InputError):
    """A data file cannot be used; `line` counts from 1 and is None when the problem concerns the whole file."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}:{line}: {problem}" if line is not None else f"{path}: {problem}")


class ModelError(InputError):
    """A base model cannot be loaded, or an adapter does not fit it."""


class RunDirectoryError(InputError):
    """A run directory exists already, is incomplete, or is not a run directory."""


class ExportError(InputError):
    """An exported directory is in the way, corrupt or not one, or an export could not hold all of a run's result."""


class MissingExtraError(InputError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, command: str, extra: str, *missing: str) -> None:
        if len(missing) == 1:
            needed = f"needs the package {missing[0]}. Install it with: {install_line(extra)}"
        else:
            needed = f"needs the packages {' and '.join(missing)}. Install them with: {install_line(extra)}"
        super().__init__(f"{command} {needed}")


def install_line(extra: str) -> str:
    """Returns the command that installs an extra from where this fedtune came from: a clone, a wheel or an index."""
    try:
        text = distribution("fedtune").read_text("direct_url.json")  # pip's record; there is none for an index
    except PackageNotFoundError:
        text = None
    origin = json.loads(text or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return f"pip install -e '{unquote(urlsplit(origin['url']).path)}[{extra}]'"
    return f"pip install 'fedtune[{extra}]{' @ ' + origin['url'] if origin else ''}'"


class RunError(FedtuneError):
    """The run could not go on."""


class RunCancelledError(RunError):
    """The operator has cancelled the run; what its rounds gave is kept."""


class UpdateError(FedtuneError):
    """A client's update is refused; the round goes on without that client."""


class PeerError(FedtuneError):
    """The other side sent bytes that are malformed, oversized or out of order."""


class ServerFaultError(PeerError):
    """A client refuses a message of the server. Its session is unchanged and still waits for a valid message.

    Attributes:
        suspect: client that is at fault if the server is not; the next attempt should leave it out.
    """

    def __init__(self, problem: str, suspect: str | None = None) -> None:
        self.suspect = suspect
        super().__init__(problem)


class PolicyError(ServerFaultError):
    """The server asks for something beyond a bound that the owner of the client has set."""


class ClientFaultError(PeerError):
    """The server refuses a client's message. Its session is unchanged, and the round goes on without the client."""

    def __init__(self, client: str, problem: str) -> None:
        self.client = client
        super().__init__(f"client {client}: {problem}")


class RoundAbortedError(RunError):
    """A secure round ends without a sum: too few clients are left, or their shares do not fit together.

    Clients that have sent a masked update serve only a later round, and no further attempt at this one.
    """


class UnfitSharesError(RoundAbortedError):
    """The shares of a client do not fit together: it dealt wrong ones, or too many holders revealed wrong ones."""
