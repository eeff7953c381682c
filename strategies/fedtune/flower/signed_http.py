"""A device's HTTP calls to Flower's Fleet API (flwr 1.41): signed, bounded, and with errors that give advice.

calls = SignedHttp(server, authority, node_key)
response = calls.call(calls.brief.ActivateNode, request)
"""

from __future__ import annotations

import datetime
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import (
    RuntimeVersionMetadata,
    get_runtime_version_incompatibility_exit_message,
)
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.host.trusted_server import ServerClock, trusting
from fedtune.core.manifest.joining import load_node_key
from fedtune.core.protocol.bundles import MAX_TAKEN_BYTES
from fedtune.core.protocol.signed_requests import TIME_HEADER, public_pem, sign

HEARTBEAT_INTERVAL = 15.0  # the server counts a device as offline after two of these
CALL_SECONDS = 20.0
HEARTBEAT_CALL_SECONDS = 12.0
PIECE_SECONDS = 240.0  # for a piece, up or down, over a very slow link
MAX_ANSWER_BYTES = MAX_TAKEN_BYTES + (1 << 20)  # for one call; a piece of a message is far smaller

T = TypeVar("T")


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


class IncompatibleError(FedtuneError):
    """The server runs a version of Flower that is incompatible with this device's."""


class SignedHttp:
    """The calls of one device, over several connections with different timeouts.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.
        node_key: private key of the device, PEM.
        clock: estimate of the server's clock.
        max_answer_bytes: limit on the bytes of one response.
    """

    def __init__(
        self,
        server: str,
        authority: bytes,
        node_key: str,
        clock: ServerClock,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self.clock = clock
        self._signer = _Signer(node_key, clock)
        context = trusting(authority)
        interceptors: list[ProtobufClientInterceptor] = [_Versions(), self._signer]
        self.brief, self.beats, self.pieces = (
            FleetHttpClient(f"https://{server}", interceptors=interceptors, verify=context, timeout=seconds)
            for seconds in (CALL_SECONDS, HEARTBEAT_CALL_SECONDS, PIECE_SECONDS)
        )
        for client in (self.brief, self.beats, self.pieces):
            client._client.follow_redirects = False  # a server must not redirect devices to hosts of their own networks
            client._client.event_hooks = {"response": [lambda response: _bound(response, max_answer_bytes)]}

    @property
    def public_key(self) -> bytes:
        """The public key that identifies requests, PEM."""
        return self._signer.public

    def close(self) -> None:
        """Closes the connections."""
        for client in (self.brief, self.beats, self.pieces):
            client.close()

    def call(self, call: Callable[[Any], T], request: Any) -> T:
        """Returns the answer to a request.

        Raises:
            UnreachableError, UntrustedError, UnknownDeviceError, NotAdmittedError, RunOverError, IncompatibleError,
            PeerError: the call failed, or its answer cannot be used.
        """
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise _meaning(error.response) from error
        except httpx.TransportError as error:
            raise _transport(error) from error
        except ValueError as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error


class _Bounded(httpx.SyncByteStream):
    """The byte stream of a response, with a limit."""

    def __init__(self, stream: httpx.SyncByteStream, limit: int) -> None:
        self._stream, self._limit = stream, limit

    def __iter__(self) -> Iterator[bytes]:
        left = self._limit
        for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise PeerError(f"the server's answer has more than {self._limit} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx.Response, limit: int) -> None:
    """Limits the bytes of a response; httpx alone reads any number."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PeerError("the server's answer is compressed, which was not requested")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream, limit)


class _Signer:
    """Signs every request, and for Flower its time, by the server's clock once it is known to differ."""

    def __init__(self, node_key: str, clock: ServerClock) -> None:
        self._key, self._clock = load_node_key(node_key), clock
        self.public = public_pem(self._key)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        headers = sign(self._key, request.url.path, self._clock.now(), request.content)
        signature = b64encode(sign_message(self._key, headers[TIME_HEADER].encode("ascii"))).decode("ascii")
        request.headers.update({**headers, FLEET_HTTP_SIGNATURE_HEADER: signature})
        response = call_next(context)
        self._clock.note(response.headers.get("date"))
        return response


class _Versions:
    """Adds Flower's version headers; unlike Flower's own interceptor, it does not end the process on a mismatch.

    It also requests uncompressed responses, see `_bound`.
    """

    def __init__(self) -> None:
        self._metadata = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update({**self._metadata, "accept-encoding": "identity"})
        return call_next(context)


def _meaning(response: httpx.Response) -> FedtuneError:
    text = response.text[:300]
    if complaint := get_runtime_version_incompatibility_exit_message(response.text):
        return IncompatibleError(
            f"the server's version does not fit this device's: {complaint}. Install the same fedtune version on both"
        )
    match response.status_code:
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
                f"uses its keys, or one did until less than {2 * HEARTBEAT_INTERVAL:.0f} s ago (wait)"
            )
        case 404 | 405:
            return UnreachableError("the server at this address is not a fedtune server")
        case 413:
            return PeerError("the server refuses a message of this size")
    return UnreachableError(f"the server answered {response.status_code}: {text}")


def _transport(error: httpx.TransportError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    if "certificate" in reason.lower():
        detail = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        if "expired" in detail or "not yet valid" in detail:
            detail += f"; by this device's clock it is {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        return UntrustedError(f"the server's certificate is refused: {detail}")
    return UnreachableError(f"the server cannot be reached (is it running, and is its address right?): {reason}")
