"""Copies of a run's results: adapter, report, rounds, summary, job and exported models, with every digest checked.

    fetch_results(Path("runs/first"), Path("first"))

The copy is checked, not the original, and appears under its name only when it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedtune.core.errors import ExportError, RunDirectoryError
from fedtune.core.protocol.model_manifest import MANIFEST, verify
from fedtune.server.run_directory import ADAPTER, JOB, REPORT, ROUNDS, SUMMARY, file_digests, read_summary
from fedtune.server.run_files import new_directory, storage

MODELS = "onnx"
_PAGE_END = b"</html>"


def fetch_results(run: Path, out: Path) -> list[Path]:
    """Copies the results of a run that has ended to a new folder.

    Args:
        out: the folder to make; an empty one may exist.

    Returns:
        What was copied: files, and folders for adapter and models.

    Raises:
        RunDirectoryError: there is something at `out`, or files are missing or changed; the message names all of them.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunDirectoryError(f"{out}: exists already; choose another --out, or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [ADAPTER, REPORT, ROUNDS, SUMMARY, JOB, *([MODELS] if (run / MODELS).is_dir() else [])]
    with storage(out), new_directory(out) as copy:
        for name in parts:
            _copy(run / name, copy / name)
        if problems := _problems(copy, run):
            shutil.rmtree(copy)
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise RunDirectoryError(f"{run}: its results are not whole, and nothing was copied:{listed}")
    return [out / name for name in parts]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
    elif source.is_file():
        shutil.copyfile(source, target)


def _problems(copy: Path, run: Path) -> list[str]:
    """Returns a sentence for each file that is missing or changed, and what mends it."""
    try:
        summary = read_summary(copy)
    except RunDirectoryError:
        remedy = f"the run has not ended, or take it from a backup; its state: fedtune server show {run.name}"
        return [f"{SUMMARY} is missing or damaged; {remedy}"]
    problems = _digest_problems(copy, summary)
    report = copy / REPORT
    if not report.is_file() or not report.read_bytes().rstrip().endswith(_PAGE_END):
        problems.append(f"{REPORT} is missing or cut off; write it again with: fedtune report {run}")
    if not (copy / JOB).is_file():
        problems.append(f"{JOB} is missing; take it from a backup")
    for manifest in sorted((copy / MODELS).glob(f"*/{MANIFEST}")):
        try:
            verify(manifest.parent)
        except ExportError as error:
            again = f"export it again with: fedtune export {run} --force"
            problems.append(f"{str(error).replace(str(copy), str(run))}; {again}")
    return problems


def _digest_problems(copy: Path, summary: dict[str, Any]) -> list[str]:
    expected = summary.get("files")
    if not isinstance(expected, dict):
        return [f"{SUMMARY} has no digests: it was written by an earlier release; copy the files of the run by hand"]
    inside = copy.resolve()
    there = [name for name in expected if (copy / name).is_file() and (copy / name).resolve().is_relative_to(inside)]
    found = file_digests(copy, [copy / name for name in there])
    backup = "take it from a backup"
    return [
        f"{name} is {'changed' if name in found else 'missing'}; {backup}"
        for name, digest in expected.items()
        if found.get(name) != digest
    ]
