"""The call with which a machine hands in its request to join, before the server knows it."""

from __future__ import annotations

import httpx

from fedtune.core.errors import InputError
from fedtune.core.host.trusted_server import trusting
from fedtune.core.manifest.joining import JOIN, JoinRequest

CALL_SECONDS = 5.0
_TAKEN, _REFUSED = 200, 409


def hand_in(server: str, authority: bytes, request: JoinRequest) -> bool:
    """Gives the server a request for the fleet's owner; returns whether the server has taken it.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.

    Raises:
        InputError: the fleet has a device of this name, or too many requests wait.
    """
    try:
        with httpx.Client(base_url=f"https://{server}", verify=trusting(authority), timeout=CALL_SECONDS) as client:
            status = client.post(JOIN, content=request.to_bytes()).status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    if status == _REFUSED:
        raise InputError(
            f"{request.name}: the server refuses it: the fleet has a device of this name (choose another --name, or "
            "have the owner revoke that one), or a thousand requests wait"
        )
    return status == _TAKEN
