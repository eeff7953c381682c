"""The guarantee of a run: what its clients have spent, in numbers for programs and in words for people.

summary = privacy_summary(job, directory.rounds(), simulated=False)
sentence = guarantee(summary)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.core.job.settings import Job
from fedtune.core.privacy.budget import epsilon_after, rho_of_round
from fedtune.core.text import counted


def privacy_summary(job: Job, rounds: Sequence[Mapping[str, Any]], simulated: bool) -> dict[str, Any] | None:
    """Returns what the client that was asked most often has spent; None for a job without differential privacy.

    A round counts for every client that was asked, whether its update came or not.

    Args:
        simulated: whether the noise follows from the job's seed.
    """
    settings = job.privacy
    if settings.mode == "off":
        return None
    asked = Counter(client["id"] for line in rounds for client in line["clients"])
    most = max(asked.values(), default=0)
    return {
        "mode": settings.mode,
        "simulated": simulated,
        "epsilon": epsilon_after(settings, most),
        "delta": settings.delta,
        "participations": most,
        "allowed_epsilon": settings.epsilon,
        "allowed_participations": settings.participations,
        "rho_of_round": rho_of_round(settings),
        "unit": "one client's whole data, present or absent",
        "max_dropout": job.secure_aggregation.max_dropout,
        "max_corrupt": job.secure_aggregation.max_corrupt,
    }


def guarantee(privacy: Mapping[str, Any]) -> str:
    """Returns the guarantee as sentences."""
    held = (
        f"Differential privacy: with or without any one client's data, everything in the sums and in the adapter has "
        f"nearly the same probability, (ε, δ) = ({privacy['epsilon']:.2f}, {privacy['delta']:.2g}), after "
        f"{privacy['participations']} of at most {counted(privacy['allowed_participations'], 'round')} of a client."
    )
    if privacy["simulated"]:
        return (
            f"{held} This was a simulation, whose noise follows from the job's seed: who knows it can take the noise "
            "off, so the guarantee is that of a live run."
        )
    if privacy["mode"] == "central":
        return f"{held} The server added the noise and is trusted with the sums before it."
    return (
        f"{held} The devices added the noise. It is assumed that of a round's clients no more than "
        f"{privacy['max_dropout']:.0%} vanished and {privacy['max_corrupt']:.0%}, at least one, colluded."
    )
