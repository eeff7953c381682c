"""A device's HTTP calls to its server: signed, bounded, and with errors that give advice.

http = SignedHttp(server, authority, node_key, ServerClock())
content = http.post(TAKE, b"")
"""

from __future__ import annotations

import datetime

import httpx

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.host.trusted_server import ServerClock, trusting
from fedtune.core.manifest.joining import load_node_key
from fedtune.core.protocol.device_calls import HEARTBEAT_SECONDS, MAX_PIECE_BYTES
from fedtune.core.protocol.signed_requests import public_pem, sign
from fedtune.core.text import one_line

CALL_SECONDS = 20.0
MAX_ANSWER_BYTES = MAX_PIECE_BYTES + 4096
_SHOWN = 300  # characters of an error's text


class UnreachableError(FedtuneError):
    """The server cannot be reached now, and may be reachable later."""


class UntrustedError(UnreachableError):
    """The answer is not from this fleet's server, or its certificate is not valid now."""


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
        """Returns the answer to a request.

        Args:
            seconds: limit for the connection, and for each pause of the answer.

        Raises:
            UnreachableError, UntrustedError, UnknownDeviceError, NotAdmittedError, RunOverError, PeerError: the call
                failed, or its answer cannot be used.
        """
        headers = {**sign(self._key, path, self.clock.now(), body), "accept-encoding": "identity"}
        try:
            with self._client.stream("POST", path, content=body, headers=headers, timeout=seconds) as response:
                self.clock.note(response.headers.get("date"))
                content = _read(response)
                if response.status_code != 200:
                    raise _meaning(response.status_code, content)
                return content
        except httpx.TransportError as error:
            raise _transport(error) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error


def _read(response: httpx.Response) -> bytes:
    """Returns an answer's bytes; httpx alone reads any number."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PeerError("the server's answer is compressed, which was not requested")
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise PeerError(f"the server's answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(content)


def _meaning(status: int, content: bytes) -> FedtuneError:
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
            return UnreachableError("the server at this address is not a fedtune server of this release")
        case 413:
            return PeerError("the server refuses a message of this size")
    text = one_line(content[:_SHOWN].decode("utf-8", "replace"))
    return UnreachableError(f"the server answered {status}: {text}")


def _transport(error: httpx.TransportError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    if "certificate" in reason.lower():
        detail = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        if "expired" in detail or "not yet valid" in detail:
            detail += f"; by this device's clock it is {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        return UntrustedError(f"the server's certificate is refused: {detail}")
    return UnreachableError(f"the server cannot be reached (is it running, and is its address right?): {reason}")
