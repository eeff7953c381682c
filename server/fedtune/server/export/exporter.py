"""The export as a whole: merge, write, gate, describe, publish. Nothing is published before every gate has passed.

`request.export` calls `export_request` once the request is checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.errors import ExportError, ModelError, RunError
from fedtune.core.host.process import versions
from fedtune.core.protocol.model_manifest import FORMATS, Format, read_manifest
from fedtune.model.base_model import BaseModel
from fedtune.server.export import adapters
from fedtune.server.export.builder import KEPT, RECIPES, Build, OnlyMergedError, Recipe, build
from fedtune.server.export.gate import Candidate, GateReport, Reference, gate
from fedtune.server.export.grid_graph import Progress
from fedtune.server.export.held_out import split_examples, too_few_to_calibrate, too_few_to_check, unlike_the_run
from fedtune.server.export.merge import FinishedRun, merge, open_run, save_model
from fedtune.server.export.onnx_model import provider_name
from fedtune.server.export.publishing import Description, describe_model, publish, publish_adapter
from fedtune.server.export.request import ExportOptions, ExportRequest
from fedtune.server.export.workplace import LOG, workplace
from fedtune.server.run_directory import ADAPTER
from fedtune.server.run_display import Display, format_bytes


@dataclass(frozen=True)
class Exported:
    """One published directory or adapter file.

    Args:
        remarks: sentences about the way it came to be, such as why it is not the format that was asked for.
    """

    path: Path
    format: Format
    recipe: str
    report: GateReport
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the entry for summaries and `--json`."""
        return {
            "format": self.format,
            "path": str(self.path),
            "recipe": self.recipe,
            "gate": self.report.to_json(),
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True)
class ExportTools:
    """The three steps that take long or can fail by themselves; tests replace them.

    Args:
        save: writes a torch model as a transformers directory.
        build: writes an ONNX model, appends to the log, tells its progress, and returns the writer.
        gate: compares a written model with the merged one.
    """

    save: Callable[[BaseModel, Path], None] = save_model
    build: Callable[[Build, Path, Progress], str] = build
    gate: Callable[[Candidate, Reference, Progress], GateReport] = gate


@dataclass(frozen=True, eq=False)
class _Job:
    """One export in progress.

    Args:
        work: the hidden folder where everything is built, beside the log.
        reference: the run's model and the held-out examples; merged before the first gate.
        calibration: token ids of other examples, for calibrated recipes.
        remarks: sentences that every quantized model shall carry.
    """

    run: FinishedRun
    reference: Reference
    calibration: tuple[tuple[int, ...], ...]
    work: Path
    options: ExportOptions
    tools: ExportTools
    display: Display
    remarks: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Returns the path of the log, which outlives the hidden folder."""
        return self.work.parent / LOG

    def reason(self, error: Exception) -> str:
        """Returns an error's text without the hidden folder, which is gone when somebody reads it."""
        return str(error).replace(f"{self.work}/", "")

    def save(self, name: str) -> Path:
        """Writes the run's network, as it is now, as a transformers directory."""
        self.tools.save(self.run.base, self.work / name)
        return self.work / name

    def build(self, source: Path, out: Path, form: Format, recipe: Recipe, adapter: Path | None = None) -> str:
        """Writes a model, and returns the writer."""
        options = self.options
        wanted = Build(source, out, form, recipe, options.provider, options.builder, adapter, self.calibration)
        return self.tools.build(wanted, self.log, self._watch(form))

    def gate(self, directory: Path, form: Format, recipe: Recipe, adapter: Path | None = None) -> GateReport:
        """Compares a written model with the merged one, and shows the result."""
        options = self.options
        candidate = Candidate(directory, form, options.max_drop, options.max_rise, options.provider, adapter)
        report = self.tools.gate(candidate, self.reference, self._watch(form))
        self.display.note(_verdict(form, recipe, report))
        return report

    def _watch(self, form: Format) -> Progress:
        return lambda task, done, count: self.display.progress(f"{form}: {task}", done, count)

    def provenance(self, recipe: Recipe, writer: str, remarks: Sequence[str]) -> dict[str, Any]:
        """Returns the manifest's entry about the origin of a written model."""
        return {
            **self.run.provenance,
            "recipe": recipe.name,
            "beside": recipe.beside,
            "remarks": list(remarks),
            "writer": writer,
            "provider": self.options.provider,
            "grid": asdict(recipe.grid) if recipe.grid else None,
            "calibration_examples": len(self.calibration) if recipe.calibrated else 0,
            "builder_options": dict(self.options.builder),
            "versions": versions(),
        }


def export_request(request: ExportRequest, display: Display, tools: ExportTools | None = None) -> list[Exported]:
    """Exports a finished run: merged models, or its adapter alone.

    Args:
        request: a request that has passed its checks.

    Raises:
        InputError: the provider is missing, the base model or the adapter is not the run's, or another export works in
            the same folder.
        RunError: the model could not be written, or no format passed its gate; nothing was published.
    """
    provider_name(request.options.provider)
    run = open_run(request.run)
    checked, calibration = split_examples(run, request.options)
    remarks = too_few_to_calibrate(calibration)
    for remark in (*too_few_to_check(checked), *remarks):
        display.note(remark)
    with workplace(request.out) as work:
        job = _Job(
            run,
            Reference(run.base, checked),
            () if remarks else calibration,
            work,
            request.options,
            tools or ExportTools(),
            display,
            remarks,
        )
        return [_export_adapter(job, request)] if request.adapter_only else _export_models(job, request)


def _export_models(job: _Job, request: ExportRequest) -> list[Exported]:
    """Writes the model in each format, or in the next larger one that passes; all are published, or none."""
    # Before the adapter is merged, since a base in int4 keeps its codes only without it.
    apart = job.save("reference") if "int4" in request.wanted and job.run.job.model.quantization == "int4" else None
    merge(job.run)
    sources = _Sources(job.save("merged"), apart)
    passed: dict[Format, _Passed] = {}
    for form in request.wanted:
        done = _first_that_passes(form, lambda each: _export_format(job, each, sources), passed, job)
        passed[done.form] = done
    for form, done in passed.items():
        if (request.out / form).exists() and not job.options.force:
            raise ExportError(f"{request.out / form}: exists already; choose another --out, or replace it with --force")
        name = job.run.path.resolve().name
        description = Description("model", name, form, job.provenance(done.recipe, done.writer, done.remarks))
        describe_model(done.directory, job.run, description, done.report)
    for form, done in passed.items():
        publish(done.directory, request.out / form)
    return [done.exported(request.out / form) for form, done in passed.items()]


@dataclass(frozen=True, eq=False)
class _Passed:
    """A written model that has passed its gate, not published yet.

    Args:
        directory: the model's folder; of an adapter's base, too.
        writer: "" for a base that was published before.
        file: the adapter apart from the base; None for a merged model.
    """

    directory: Path
    form: Format
    recipe: Recipe
    writer: str
    report: GateReport
    remarks: tuple[str, ...]
    file: Path | None = None

    def exported(self, path: Path) -> Exported:
        """Returns the entry about the model at its final path."""
        return Exported(path, self.form, self.recipe.name, self.report, self.remarks)


@dataclass(frozen=True)
class _Sources:
    """The transformers directories of the merged model, and of the base alone where its codes are kept."""

    merged: Path
    apart: Path | None


def _first_that_passes(
    wanted: Format, attempt: Callable[[Format], _Passed], passed: Mapping[Format, _Passed], job: _Job
) -> _Passed:
    """Returns the wanted format, or the next larger one that passes, with the reasons as remarks.

    Raises:
        RunError: none passes.
    """
    reasons: list[str] = []
    for form in FORMATS[FORMATS.index(wanted) :]:
        try:
            done = passed[form] if form in passed else attempt(form)
        except RunError as error:
            reasons.append(job.reason(error))
            job.display.note(reasons[-1])
            continue
        if not reasons:
            return done
        remark = f"{wanted} was asked for and gave way to {form}: {'; '.join(reasons)}"
        job.display.note(remark)
        return replace(done, remarks=(*done.remarks, remark))
    raise RunError(f"{job.run.job.model.base}: {'; '.join(reasons)}; nothing was exported; the log is {job.log}")


def _recipes(job: _Job, form: Format, kept: bool) -> list[Recipe]:
    """Returns the recipes of a format: first the one that keeps the base's own codes, where the job trained on such."""
    recipes = [KEPT, *RECIPES[form]] if form == "int4" and kept else list(RECIPES[form])
    if not job.calibration:
        recipes = [each.uncalibrated() for each in recipes]
    if job.options.exact_products:
        recipes = [each.exact_products() for each in recipes]
    return list(dict.fromkeys(recipes))


def _export_format(job: _Job, form: Format, sources: _Sources) -> _Passed:
    """Writes the model by each recipe until one passes the gate.

    Raises:
        RunError: none passes; the message has the last one's reason.
    """
    directory, reason = job.work / form, ""
    for recipe in _recipes(job, form, sources.apart is not None):
        shutil.rmtree(directory, ignore_errors=True)
        try:
            writer = _write_model(job, directory, form, recipe, sources)
            report = job.gate(directory, form, recipe)
        except (RunError, ModelError) as error:  # some graphs and providers refuse a grid; the next recipe may not
            reason = job.reason(error)
            job.display.note(f"{form} ({recipe.name}): {reason}; the log is {job.log}")
            continue
        if report.passed:
            return _Passed(directory, form, recipe, writer, report, _remarks_on(job, recipe, report))
        reason = f"it differs from the merged model: {'; '.join(report.failures)}"
    shutil.rmtree(directory, ignore_errors=True)
    raise RunError(f"{form}: {reason}")


def _write_model(job: _Job, directory: Path, form: Format, recipe: Recipe, sources: _Sources) -> str:
    if not recipe.beside:
        return job.build(sources.merged, directory, form, recipe)
    assert sources.apart is not None
    writer = job.build(sources.apart, directory, form, recipe, job.run.path / ADAPTER)
    adapters.fill_in(directory, job.run)
    return writer


def _remarks_on(job: _Job, recipe: Recipe, report: GateReport) -> tuple[str, ...]:
    """Returns the sentences that a passed model shall carry; float weights need no calibration."""
    calibrated = job.remarks if recipe.grid else ()
    unlike = unlike_the_run(job.run, float(np.log(report.reference_perplexity)))
    for remark in unlike:
        job.display.note(remark)
    return (*too_few_to_check(job.reference.examples), *calibrated, *unlike)


def _export_adapter(job: _Job, request: ExportRequest) -> Exported:
    """Writes the run's adapter, and its base too unless there is one that takes it."""
    (target,), (form,) = request.targets, request.wanted
    source = job.save("reference")
    merge(job.run)
    done = _first_that_passes(form, lambda each: _export_adapter_for(job, request, each, source), {}, job)
    assert done.file is not None
    if done.writer:
        provenance = job.provenance(done.recipe, done.writer, done.remarks)
        provenance |= {"modules": adapters.modules(job.run.layout)}
        name = f"{request.run.resolve().name}-base"
        describe_model(done.directory, job.run, Description("adapter-base", name, done.form, provenance), done.report)
        publish(done.directory, request.out / f"base-{done.form}")
    publish_adapter(done.file, target, job.run, done.form, done.report)
    return done.exported(target)


def _export_adapter_for(job: _Job, request: ExportRequest, form: Format, source: Path) -> _Passed:
    """Writes the adapter for a base of one format, and the base by each recipe until one passes the gate.

    Raises:
        RunError: none passes; the message has the last one's reason.
    """
    directory, file, reason = job.work / f"base-{form}", job.work / request.targets[0].name, ""
    recipes = _recipes(job, form, job.run.job.model.quantization == "int4")
    if held := _usable_base(request.out / f"base-{form}", job, form):
        directory = request.out / f"base-{form}"
        recipes = [Recipe(read_manifest(directory).provenance["recipe"])]
    for recipe in recipes:
        writer = "" if held else _write_base(job, source, directory, form, recipe)
        adapters.write_adapter(file, directory, job.run)
        report = job.gate(directory, form, recipe, file)
        if report.passed:
            return _Passed(directory, form, recipe, writer, report, _remarks_on(job, recipe, report), file)
        reason = f"it differs from the merged model: {'; '.join(report.failures)}"
    raise RunError(f"{form}: {reason}")


def _write_base(job: _Job, source: Path, directory: Path, form: Format, recipe: Recipe) -> str:
    """Writes the base with the adapter's factors as inputs; returns its writer.

    Raises:
        OnlyMergedError: no format of this base takes adapters.
        RunError: the base could not be written.
    """
    shutil.rmtree(directory, ignore_errors=True)
    try:
        writer = job.build(source, directory, form, recipe, job.run.path / ADAPTER)
        adapters.open_inputs(directory, job.run.layout)
    except OnlyMergedError as error:
        raise OnlyMergedError(f"{job.run.job.model.base}: {job.reason(error)}; leave out --adapter-only") from error
    return writer


def _usable_base(base: Path, job: _Job, form: str) -> bool:
    """Returns whether there is an exported base already that takes this run's adapter, as the options want it.

    Raises:
        ExportError: the exported base has another base model or layout, or, without --force, was made otherwise.
    """
    if not base.exists():
        return False
    manifest = read_manifest(base)
    mine = (job.run.base.digest, adapters.modules(job.run.layout), form)
    theirs = (manifest.provenance.get("base_digest"), manifest.provenance.get("modules"), manifest.format)
    if manifest.kind != "adapter-base" or mine != theirs:
        raise ExportError(f"{base}: a base for other adapters than this run's; choose another --out")
    if not (difference := _made_otherwise(manifest.provenance, job.options)):
        job.display.note(f"{base}: is there already and takes this adapter; only the adapter is written")
        return True
    if not job.options.force:
        raise ExportError(f"{base}: {difference}; change that, choose another --out, or replace the base with --force")
    job.display.note(f"{base}: {difference}; it is replaced, and the other adapters beside it were not checked on it")
    return False


def _made_otherwise(provenance: Mapping[str, Any], options: ExportOptions) -> str:
    """Returns how the making of an exported base differs from what the options want; "" if it does not."""
    if (grid := provenance.get("grid")) and (grid.get("level") == 1) != options.exact_products:
        made, wanted = ("without", "has") if options.exact_products else ("with", "lacks")
        return f"was exported {made} --exact-products, which this export {wanted}"
    if (provider := provenance.get("provider")) != options.provider:
        return f"was exported with --provider {provider}, this export has {options.provider}"
    theirs, mine = (
        " ".join(sorted(f"{key}={value}" for key, value in given.items())) or "none"
        for given in (provenance.get("builder_options") or {}, options.builder)
    )
    return "" if theirs == mine else f"was exported with --option {theirs}, this export has {mine}"


def _verdict(form: str, recipe: Recipe, report: GateReport) -> str:
    state = "passed" if report.passed else f"refused: {'; '.join(report.failures)}"
    return (
        f"{form} ({recipe.name}): exact match {report.exact_match:.1%} (merged {report.reference_exact_match:.1%}), "
        f"perplexity {report.perplexity:.3f} (merged {report.reference_perplexity:.3f}), "
        f"argmax {report.argmax_agreement:.2%}, max logit error {report.max_logit_error:.2g}, "
        f"{format_bytes(report.bytes)}, {report.decode_tokens_per_second:,.0f} tokens/s: {state}"
    )
