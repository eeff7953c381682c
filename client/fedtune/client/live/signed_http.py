"""A device's HTTP calls to its server: signed, bounded, and with errors that give advice.

http = SignedHttp(server, authority, node_key, ServerClock())
content = http.post(TAKE, b"")
for chunk in http.stream(READ, wanted, 4 << 20):        # an answer that need not be in memory
    file.write(chunk)
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import httpx

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.host.trusted_server import ServerClock, trusting
from fedtune.core.manifest.joining import load_node_key
from fedtune.core.protocol.device_calls import HEARTBEAT_SECONDS, MAX_PIECE_BYTES
from fedtune.core.protocol.signed_requests import public_pem, sign
from fedtune.core.text import one_line

CALL_SECONDS = 20.0
MAX_ANSWER_BYTES = MAX_PIECE_BYTES + 4096
_CHUNK = 64 << 10
_SHOWN = 2000  # bytes of an error's text


class UnreachableError(FedtuneError):
    """The server cannot be reached now, and may be reachable later."""


class UntrustedError(UnreachableError):
    """The answer is not from this fleet's server, or its certificate is not valid now."""


class NothingThereError(UnreachableError):
    """There is nothing at this address.

    Args:
        reason: the server's own words; empty where it has none, as a server of another release.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("the server at this address is not a fedtune server of this release")
        self.reason = reason


class UnknownDeviceError(FedtuneError):
    """The server does not know this device's key: it was revoked, or the server is just starting."""


class NotAdmittedError(FedtuneError):
    """The server does not admit this device: it was revoked, or still counts as running from before a crash."""


class RunOverError(FedtuneError):
    """The run that a message belongs to is over, and its answer is no longer needed."""


class SignedHttp:
    """The calls of one device; several threads may make them.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.
        node_key: private key of the device, PEM.
        clock: estimate of the server's clock.
    """

    def __init__(self, server: str, authority: bytes, node_key: str, clock: ServerClock) -> None:
        self.clock = clock
        self._key = load_node_key(node_key)
        # A server must not redirect devices to hosts of their own networks.
        self._client = httpx.Client(base_url=f"https://{server}", verify=trusting(authority), follow_redirects=False)

    @property
    def public_key(self) -> bytes:
        """The public key that identifies requests, PEM."""
        return public_pem(self._key)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def post(self, path: str, body: bytes, seconds: float = CALL_SECONDS) -> bytes:
        """Returns the answer to a request, as `stream` does."""
        return b"".join(self.stream(path, body, MAX_ANSWER_BYTES, seconds))

    def stream(self, path: str, body: bytes, limit: int, seconds: float = CALL_SECONDS) -> Iterator[bytes]:
        """Yields the answer to a request as it arrives; a device whose clock is wrong signs again by the server's.

        Args:
            limit: most bytes of an answer; httpx alone reads any number.
            seconds: limit for the connection, and for each pause of the answer.

        Raises:
            UnreachableError, UntrustedError, UnknownDeviceError, NotAdmittedError, RunOverError, PeerError: the call
                failed, or its answer cannot be used.
        """
        try:
            yield from self._once(path, body, limit, seconds)
        except UnknownDeviceError:
            if not self.clock.correct():
                raise
            yield from self._once(path, body, limit, seconds)

    def _once(self, path: str, body: bytes, limit: int, seconds: float) -> Iterator[bytes]:
        headers = {**sign(self._key, path, self.clock.now(), body), "accept-encoding": "identity"}
        try:
            with self._client.stream("POST", path, content=body, headers=headers, timeout=seconds) as response:
                self.clock.note(response.headers.get("date"))
                if (coding := response.headers.get("content-encoding", "identity")) != "identity":
                    raise PeerError(f"the server's answer is compressed ({coding[:40]!r}), which was not requested")
                if response.status_code != 200:
                    raise _meaning(response.status_code, next(response.iter_raw(_SHOWN), b""))
                received = 0
                for chunk in response.iter_raw(_CHUNK):
                    received += len(chunk)
                    if received > limit:
                        raise PeerError(f"the server's answer has more than {limit} bytes")
                    yield chunk
        except httpx.TransportError as error:
            raise _transport(error) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error


def _meaning(status: int, content: bytes) -> FedtuneError:
    text = one_line(content.decode("utf-8", "replace"))
    match status:
        case 401:
            return UnknownDeviceError(
                "the server does not know this device: the fleet's owner has not approved it yet (fedtune fleet "
                "approve CODE), or it was revoked; then: fedtune client leave, and join again"
            )
        case 403:
            return RunOverError("the run is over")
        case 412:
            return NotAdmittedError(
                "the server does not take this device in: it was revoked (leave and join again), or another process "
                f"uses its keys, or one did until less than {2 * HEARTBEAT_SECONDS:.0f} s ago (wait)"
            )
        case 404 | 405:
            return NothingThereError(text)
        case 400:
            return PeerError(f"the server refuses the request with status 400: {text}")
        case 413:
            return PeerError("the server refuses a message of this size")
    return UnreachableError(f"the server answered {status}: {text}")


def _transport(error: httpx.TransportError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    if "certificate" in reason.lower():
        detail = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        if "expired" in detail or "not yet valid" in detail:
            detail += f"; by this device's clock it is {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        return UntrustedError(f"the server's certificate is refused: {detail}")
    return UnreachableError(f"the server cannot be reached (is it running, and is its address right?): {reason}")
