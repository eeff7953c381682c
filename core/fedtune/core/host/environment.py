"""What the environment says to Flower and torch; set before either is imported, and inherited by child processes."""

from __future__ import annotations

import os

_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait bring a busy machine to its knees
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def prepare_environment() -> None:
    """Sets what nobody has set otherwise."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def limit_pieces(size: int) -> None:
    """In how large pieces this process sends a payload: each is a request of its own, and must cross slow links."""
    os.environ.setdefault("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(size))
