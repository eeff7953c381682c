"""The training libraries of this machine: onnxruntime trains edge packs, and torch all other base models.

    backend = INSTALLED.of("packs/SmolLM2-135M")

A library is imported when it is first needed, so that a device which only has edge packs never imports torch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fedtune.client.plan.backend import Backend
from fedtune.core.errors import MissingExtraError
from fedtune.data.job_inputs import is_pack


class InstalledBackends:
    """Implements `fedtune.client.plan.backend.Backends`; the form of a base model decides."""

    def installed(self, base: str) -> bool:
        """Returns whether the library for a base model is installed, without importing it."""
        try:
            return find_spec("onnxruntime" if is_pack(Path(base)) else "torch") is not None
        except ModuleNotFoundError:  # of an import hook that hides it
            return False

    def of(self, base: str) -> Backend:
        """Returns the library for a base model.

        Raises:
            MissingExtraError: it is not installed.
        """
        return _onnx(base) if is_pack(Path(base)) else _torch(base)


def _onnx(base: str) -> Backend:
    try:
        return _onnx_backend()
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"training on the edge pack {base}", "edge", error.name or "onnxruntime") from None


def _torch(base: str) -> Backend:
    try:
        return _torch_backend()
    except ModuleNotFoundError as error:
        wanted = f"training on the base model {base} (edge packs need no torch)"
        raise MissingExtraError(wanted, "client", error.name or "torch") from None


@cache
def _onnx_backend() -> Backend:
    from fedtune.client.onnx.onnx_backend import OnnxBackend

    return OnnxBackend()


@cache
def _torch_backend() -> Backend:
    from fedtune.client.torch.torch_backend import TorchBackend

    return TorchBackend()


INSTALLED = InstalledBackends()
