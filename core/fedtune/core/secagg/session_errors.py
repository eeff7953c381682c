"""Errors of secure aggregation: each says whose fault it was. None of them changes the session that raises it.

PeerError
├── ServerFaultError     a client refuses what the server sent
└── ClientFaultError     the server refuses what one client sent; names the client
RunError
└── RoundAbortedError    the round ends without a sum
"""

from __future__ import annotations

from fedtune.core.errors import PeerError, RunError


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
