"""A machine on which one library trains every base model."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.client.plan.backend import Backend


@dataclass(frozen=True)
class Only:
    """Implements `fedtune.client.plan.backend.Backends` with one backend."""

    backend: Backend

    def installed(self, base: str) -> bool:
        return True

    def of(self, base: str) -> Backend:
        return self.backend
