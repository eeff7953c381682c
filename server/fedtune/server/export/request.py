"""Requests for exports, from the command or from a run's last step, checked before torch and ONNX are imported.

exported = export(ExportRequest(Path("runs/first"), ("int4", "fp32"), Path("runs/first/onnx")), display)
# runs/first/onnx/int4/, runs/first/onnx/fp32/
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.adapter.adapter_files import ADAPTER_WEIGHTS
from fedtune.core.errors import ExportError, InputError, MissingExtraError, RunDirectoryError
from fedtune.core.job.contradictions import unexportable
from fedtune.core.job.job_file import recorded_job
from fedtune.core.job.settings import Job
from fedtune.core.protocol.model_manifest import ADAPTER_SUFFIX, FORMATS, MANIFEST, Format
from fedtune.data.job_inputs import source_of
from fedtune.data.population import evaluation_records
from fedtune.data.records import read_records
from fedtune.server.run_directory import ADAPTER, JOB, SUMMARY, read_summary
from fedtune.server.run_display import Display
from fedtune.server.run_files import storage, write_json

if TYPE_CHECKING:
    from fedtune.server.export.exporter import Exported, ExportTools

ONNX = "onnx"  # the folder in a run directory, with one folder a format
MAX_DROP = 1.0
MAX_RISE = 2.0
PROMPTS = 200
_QUANTIZATION = {"accuracy_level", "algo_config", "block_size", "is_symmetric", "matmul_mixed_precision", "use_qdq"}
_NEEDED = ("torch", "transformers", "onnx", "onnxruntime_genai", "onnxscript", "tokenizers")


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Args:
        provider: the execution provider to build and check for: "cpu", "cuda", "dml", ...
        builder: options for onnxruntime-genai's model builder, about the graph.
        max_drop: points of exact match and token accuracy that int4, int8 and fp16 may lose.
        max_rise: percent by which their perplexity may rise.
        prompts: largest number of held-out examples to compare on.
        exact_products: whether products take activations in float32, which decodes many times slower than fp32, instead
            of rounded to 8 bits.
        data: held-out examples for the gate, instead of the job's own evaluation data.
        force: replace an earlier export.
    """

    provider: str = "cpu"
    builder: dict[str, str] = field(default_factory=dict)
    max_drop: float = MAX_DROP
    max_rise: float = MAX_RISE
    prompts: int = PROMPTS
    exact_products: bool = False
    data: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """One call of `fedtune export`.

    Args:
        run: the directory of a finished run.
        formats: "int4", ...; in any order.
        out: each format goes to `out`/FORMAT.
        adapter_only: writes `out`/NAME.onnx_adapter, NAME being the run's, and the base to `out`/base-FORMAT once.
    """

    run: Path
    formats: tuple[str, ...]
    out: Path
    options: ExportOptions = field(default_factory=ExportOptions)
    adapter_only: bool = False

    @property
    def wanted(self) -> list[Format]:
        """Returns the formats, each once, in the order in which they are written.

        Raises:
            InputError: a format is unknown, there is none, or an adapter would get several bases.
        """
        unknown = [form for form in self.formats if form not in FORMATS]
        if self.adapter_only and len(self.formats) != 1:
            raise InputError("--adapter-only takes one --format, that of the base")
        if unknown or not self.formats:
            named = ", ".join(unknown) or "nothing"
            raise InputError(f"--format {named}: unknown; expected some of {', '.join(FORMATS)}")
        return [form for form in FORMATS if form in self.formats]

    @property
    def targets(self) -> list[Path]:
        """Returns the paths that the export will publish."""
        if self.adapter_only:
            return [self.out / f"{self.run.resolve().name}{ADAPTER_SUFFIX}"]
        return [self.out / form for form in self.wanted]

    def check(self) -> None:
        """Checks everything that can be checked without loading a model.

        Raises:
            InputError: an unknown format, a limit that is none, something in the way, a run without an adapter, another
                kind of base, or no held-out examples.
        """
        _ = self.wanted
        _check_limits(self.options)
        if ours := sorted(_QUANTIZATION & set(self.options.builder)):
            raise InputError(
                f"--option {ours[0]}: fedtune quantizes by its own recipes; expected an option about the graph"
            )
        _check_free(self.out, self.targets, self.options.force)
        job, _ = read_finished(self.run)
        source_of(job.model.base)
        if self.options.data is not None:
            read_records(self.options.data)
        elif not evaluation_records(job.data):
            raise no_held_out_examples(self.run)


def export(request: ExportRequest, display: Display, tools: ExportTools | None = None) -> list[Exported]:
    """Exports a finished run; torch and the ONNX packages are imported only after all checks that need neither.

    Args:
        tools: replacements of the exporter's steps; by default its own.

    Raises:
        InputError: see `ExportRequest.check`; or the base model is not the run's.
        MissingExtraError: the packages that write ONNX are not installed.
        RunError: the model could not be written, or a gate failed; nothing was published.
    """
    if missing := _missing_package():
        raise MissingExtraError("fedtune export", "export", missing)
    request.check()
    from fedtune.server.export.exporter import export_request

    return export_request(request, display, tools)


def read_finished(path: Path) -> tuple[Job, dict[str, Any]]:
    """Reads the job and the summary of a run that can be exported.

    Raises:
        RunDirectoryError: the path is not a run directory, or the run has no adapter yet.
        ExportError: an export could not represent the trained model.
    """
    if not (path / JOB).is_file():
        raise RunDirectoryError(f"{path}: not a run directory; expected a {JOB} in it")
    summary = read_summary(path)
    if not (path / ADAPTER / ADAPTER_WEIGHTS).is_file():
        raise RunDirectoryError(f"{path}: no {ADAPTER}/{ADAPTER_WEIGHTS}; expected the adapter of a finished run")
    job = recorded_job(path / JOB)
    if reason := unexportable(job):
        raise ExportError(f'{path}: {reason}; expected a run with federation.aggregation = "flexlora"')
    return job, summary


def no_held_out_examples(path: Path) -> InputError:
    """Returns the error for a job without held-out examples; an export is never published unchecked."""
    return InputError(
        f"{path}: the job has no data.evaluation to check the export on; give held-out examples: --data FILE"
    )


def check_export(job: Job) -> None:
    """Checks before a run that its export can be done after it.

    Raises:
        MissingExtraError: the job wants an export, and its packages are not installed.
    """
    if job.export.formats and (missing := _missing_package()):
        raise MissingExtraError("[export]", "export,inference", missing)


def export_finished(job: Job, path: Path, summary: dict[str, Any], display: Display) -> None:
    """Exports the job's formats to the run directory; an earlier export is replaced.

    Args:
        summary: the finished run's summary; it gains "exports", here and in summary.json.

    Raises:
        RunError: a model could not be written or differs too much from the merged one; the run itself is whole.
    """
    if not job.export.formats:
        return
    request = ExportRequest(path, job.export.formats, path / ONNX, ExportOptions(force=True))
    summary["exports"] = [done.to_json() for done in export(request, display)]
    with storage(path):
        write_json(path / SUMMARY, summary)


def _missing_package() -> str | None:
    return next((package for package in _NEEDED if importlib.util.find_spec(package) is None), None)


def _check_limits(options: ExportOptions) -> None:
    if not 0 <= options.max_drop <= 100:  # which NaN is not either
        raise InputError(f"--max-drop {options.max_drop:g}: expected points from 0 to 100")
    if not 0 <= options.max_rise < math.inf:
        raise InputError(f"--max-rise {options.max_rise:g}: expected a percentage, 0 or more and finite")


def _check_free(out: Path, targets: Sequence[Path], force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: exists already and is not a directory")
    for target in targets:
        if not target.exists():
            continue
        is_export = target.is_file() or (target / MANIFEST).is_file()
        if not force or not is_export:
            advice = "choose another --out, or replace it with --force" if is_export else "it is not an export"
            raise ExportError(f"{target}: exists already; {advice}")
