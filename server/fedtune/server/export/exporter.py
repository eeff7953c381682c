"""The export as a whole: merge, write, gate, describe, publish. Nothing is published before every gate has passed.

`request.export` calls `export_request` once the request is checked.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.core.errors import DataError, ExportError, RunError
from fedtune.core.host.process import versions
from fedtune.core.protocol.model_manifest import Format, read_manifest
from fedtune.data.examples import Example, load_examples, prepare
from fedtune.data.population import evaluation_records
from fedtune.model.base_model import BaseModel
from fedtune.server.export import adapters
from fedtune.server.export.builder import RECIPES, Build, Recipe, build
from fedtune.server.export.gate import Candidate, GateReport, Reference, gate, provider_name
from fedtune.server.export.merge import FinishedRun, merge, open_run, save_model
from fedtune.server.export.publishing import Description, describe_model, publish, publish_adapter
from fedtune.server.export.request import WORKPLACE, ExportOptions, ExportRequest, no_held_out_examples
from fedtune.server.run_display import Display, format_bytes
from fedtune.server.run_files import plain_errors

LOG = "export.log"


@dataclass(frozen=True)
class Exported:
    """One published directory or adapter file."""

    path: Path
    format: str
    recipe: str
    report: GateReport

    def to_json(self) -> dict[str, Any]:
        """Returns the entry for summaries and `--json`."""
        return {
            "format": self.format,
            "path": str(self.path),
            "recipe": self.recipe,
            "gate": self.report.to_json(),
        }


@dataclass(frozen=True)
class ExportTools:
    """The three steps that take long or can fail by themselves; tests replace them.

    Args:
        save: writes a torch model as a transformers directory.
        build: writes ONNX models, appends to the log, and returns the writer of each.
        gate: compares a written model with the merged one.
    """

    save: Callable[[BaseModel, Path], None] = save_model
    build: Callable[[Sequence[Build], Path], list[str]] = build
    gate: Callable[[Candidate, Reference], GateReport] = gate


@dataclass(frozen=True, eq=False)
class _Job:
    """One export in progress.

    Args:
        work: the hidden folder where everything is built.
        reference: the run's model and the held-out examples; merged before the first gate.
    """

    run: FinishedRun
    reference: Reference
    work: Path
    options: ExportOptions
    tools: ExportTools
    display: Display

    def build(self, builds: Sequence[Build]) -> list[str]:
        """Writes models, and returns the writer of each."""
        return self.tools.build(builds, self.work / LOG)

    def wanted(self, source: Path, out: Path, form: Format, recipe: Recipe, adapter: Path | None = None) -> Build:
        """Fills in the options of a build."""
        return Build(source, out, form, recipe, self.options.provider, self.options.builder, adapter)

    def gate(self, directory: Path, form: Format, recipe: Recipe, adapter: Path | None = None) -> GateReport:
        """Compares a written model with the merged one, and shows the result."""
        candidate = Candidate(directory, form, self.options.max_drop, self.options.provider, adapter)
        report = self.tools.gate(candidate, self.reference)
        self.display.note(_verdict(form, recipe, report))
        return report

    def provenance(self, recipe: Recipe, writer: str) -> dict[str, Any]:
        """Returns the manifest's entry about the origin of a written model."""
        return {
            **self.run.provenance,
            "recipe": recipe.name,
            "writer": writer,
            "provider": self.options.provider,
            "builder_options": {**recipe.options, **self.options.builder},
            "versions": versions(),
        }


def export_request(request: ExportRequest, display: Display, tools: ExportTools | None = None) -> list[Exported]:
    """Exports a finished run: merged models, or its adapter alone.

    Args:
        request: a request that has passed its checks.

    Raises:
        InputError: the provider is missing, or the base model or the adapter is not the run's.
        RunError: the model could not be written, or a gate failed; nothing was published.
    """
    provider_name(request.options.provider)
    run = open_run(request.run)
    reference = Reference(run.base, held_out_examples(run, request.options.data))
    if request.adapter_only:
        held = _usable_base(request.out / f"base-{request.wanted[0]}", run, request.wanted[0])
    with _workplace(request.out) as work:
        job = _Job(run, reference, work, request.options, tools or ExportTools(), display)
        return [_export_adapter(job, request, held)] if request.adapter_only else _export_models(job, request)


def held_out_examples(run: FinishedRun, data: Path | None) -> list[Example]:
    """Reads the examples for the gate: the job's evaluation data, or the given file.

    Raises:
        InputError: there are none; an export is never published unchecked.
    """
    tokenizer, length = run.base.tokenizer, run.job.data.sequence_length
    if data is not None:
        return load_examples(data, tokenizer, length)[0]
    records = evaluation_records(run.job.data)
    if not records:
        raise no_held_out_examples(run.path)
    examples, report = prepare(records, tokenizer, length)
    if not examples:
        raise DataError(Path(run.job.data.evaluation), f"no usable example ({report})")
    return examples


def _export_models(job: _Job, request: ExportRequest) -> list[Exported]:
    """Writes the merged model in each format; all are published, or none."""
    merge(job.run)
    source, wanted = job.work / "merged", request.wanted
    job.tools.save(job.run.base, source)
    job.display.note(f"writing {', '.join(wanted)}")
    first = [job.wanted(source, job.work / form, form, RECIPES[form][0]) for form in wanted]
    exported = [
        _export_format(job, form, writer, source) for form, writer in zip(wanted, job.build(first), strict=True)
    ]
    for done in exported:
        publish(done.path, request.out / done.format)
    return [replace(done, path=request.out / done.format) for done in exported]


def _export_format(job: _Job, form: Format, writer: str, source: Path) -> Exported:
    """Gates the first recipe's model, and tries the other recipes until one passes."""
    directory = job.work / form
    for recipe in RECIPES[form]:
        if not directory.exists():
            try:
                (writer,) = job.build([job.wanted(source, directory, form, recipe)])
            except RunError as error:  # quantizers refuse some shapes; the next recipe may not
                job.display.note(f"{form} ({recipe.name}): {error}")
                shutil.rmtree(directory, ignore_errors=True)
                continue
        report = job.gate(directory, form, recipe)
        if report.passed:
            description = Description("model", job.run.path.resolve().name, form, job.provenance(recipe, writer))
            describe_model(directory, job.run, description, report)
            return Exported(directory, form, recipe.name, report)
        shutil.rmtree(directory)
    raise RunError(_closed(form, report))


def _export_adapter(job: _Job, request: ExportRequest, held: bool) -> Exported:
    """Writes the run's adapter, and its base too unless `held` says that there is one already."""
    (target,), (form,) = request.targets, request.wanted
    base = request.out / f"base-{form}"
    source = job.work / "reference"
    if not held:
        job.tools.save(job.run.base, source)
    merge(job.run)
    recipes = RECIPES[form] if not held else (Recipe(read_manifest(base).provenance["recipe"]),)
    file = job.work / target.name
    for recipe in recipes:
        directory, writer = (base, "") if held else _write_base(job, source, form, recipe)
        adapters.write_adapter(file, directory, job.run)
        report = job.gate(directory, form, recipe, file)
        if report.passed:
            break
    else:
        raise RunError(_closed(form, report))
    if not held:
        provenance = job.provenance(recipe, writer) | {"modules": adapters.modules(job.run.layout)}
        description = Description("adapter-base", f"{request.run.resolve().name}-base", form, provenance)
        describe_model(directory, job.run, description, report)
        publish(directory, base)
    publish_adapter(file, target, job.run, form, report)
    return Exported(target, form, recipe.name, report)


def _write_base(job: _Job, source: Path, form: Format, recipe: Recipe) -> tuple[Path, str]:
    """Writes the base with the adapter's factors as inputs; returns its folder and its writer."""
    directory = job.work / "base"
    shutil.rmtree(directory, ignore_errors=True)
    job.display.note(f"{form}: writing the base with the adapter's factors as inputs ({recipe.name})")
    (writer,) = job.build([job.wanted(source, directory, form, recipe, job.run.path / "adapter")])
    adapters.open_inputs(directory, job.run.layout)
    return directory, writer


def _usable_base(base: Path, run: FinishedRun, form: str) -> bool:
    """Returns whether there is an exported base already that takes this run's adapter.

    Raises:
        ExportError: the exported base has another base model or layout.
    """
    if not base.exists():
        return False
    manifest = read_manifest(base)
    mine = (run.base.digest, adapters.modules(run.layout), form)
    theirs = (manifest.provenance.get("base_digest"), manifest.provenance.get("modules"), manifest.format)
    if manifest.kind != "adapter-base" or mine != theirs:
        raise ExportError(f"{base}: a base for other adapters than this run's; choose another --out")
    return True


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """Gives a hidden folder inside `out`, and removes it in any case; after a failure the log stays in `out`."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with plain_errors(), tempfile.TemporaryDirectory(prefix=WORKPLACE, dir=out) as name:
            try:
                yield Path(name)
            finally:
                if (log := Path(name) / LOG).is_file():
                    log.replace(out / LOG)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise RunError(f"{out}: {reason}; nothing was exported") from error
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _verdict(form: str, recipe: Recipe, report: GateReport) -> str:
    state = "passed" if report.passed else f"refused: {'; '.join(report.failures)}"
    return (
        f"{form} ({recipe.name}): exact match {report.exact_match:.1%} (merged {report.reference_exact_match:.1%}), "
        f"argmax {report.argmax_agreement:.2%}, max logit error {report.max_logit_error:.2g}, "
        f"{format_bytes(report.bytes)}, {report.decode_tokens_per_second:,.0f} tokens/s: {state}"
    )


def _closed(form: Format, report: GateReport) -> str:
    tried = len(RECIPES[form])
    return (
        f"{form}: the export differs from the merged model: {'; '.join(report.failures)}; "
        f"{tried} {'recipe was' if tried == 1 else 'recipes were'} tried and nothing was exported"
    )
