"""The hub of models: whether it can be reached from this machine, and the models of it that this machine has already.

Asked for a model without a network, the hub's library tries again and again for half a minute.
"""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

ANSWER_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443}


def hub_address() -> str:
    """Returns the hub's URL: HF_ENDPOINT, or https://huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def can_reach_hub() -> bool:
    """Returns whether the hub, or the proxy on the way to it, takes a connection; False where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(hub_address())
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    way = urlsplit(proxy) if proxy and "://" in proxy else hub
    try:
        address = (way.hostname or "", way.port or _PORTS.get(way.scheme, 443))
        socket.create_connection(address, ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def cached_model(identifier: str) -> Path | None:
    """Returns the directory of a hub's model in this machine's cache; None if it is not there.

    Raises:
        ValueError: the text is no hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(identifier, "config.json")
    return Path(found).parent if isinstance(found, str) else None
