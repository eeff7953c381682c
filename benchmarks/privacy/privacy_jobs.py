"""The tasks of benchmarks/privacy and the size of a round, for the programs of this folder."""

from __future__ import annotations

from pathlib import Path

COHORT = 100


def job_paths(base: Path | None, task: Path | None) -> dict[str, tuple[str, ...]]:
    """Returns the tasks that can be run, each with the overrides that name its files."""
    if base is None or task is None:
        return {"demo": ()}
    files = f"model.base={base}", f"data.train={task / 'train.jsonl'}", f"data.evaluation={task / 'eval.jsonl'}"
    return {"demo": (), "wordnet": files}
