"""The export as a whole: merge, write, gate, describe, publish. Nothing appears under its name before all gates opened.

exported = export_run(Path("runs/first"), ["int4", "fp32"], Path("runs/first/onnx"), display)
# runs/first/onnx/int4/, runs/first/onnx/fp32/
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtune.core.errors import DataError, ExportError, InputError, ModelError, RunError
from fedtune.core.host.private_files import sync_directory
from fedtune.core.protocol.model_manifest import CARD, MANIFEST, Manifest, list_files, read_manifest
from fedtune.data.examples import Example, load_examples, prepare, start_tokens
from fedtune.data.population import evaluation_records
from fedtune.server.export import adapters
from fedtune.server.export.builder import FORMATS, RECIPES, Build, Format, Recipe, build
from fedtune.server.export.card import model_card
from fedtune.server.export.gate import GateReport, gate, provider_name
from fedtune.server.export.merge import FinishedRun, merge, open_run, save_model
from fedtune.server.run_display import Display, format_bytes
from fedtune.server.run_facts import versions
from fedtune.server.run_files import plain_errors, write_json, write_text

LOG = "export.log"
WORKPLACE = ".export-"  # how the hidden folder of an export in progress begins
MAX_DROP = 1.0
_NEEDED = ("tokenizer.json", "genai_config.json", "model.onnx")


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Args:
        provider: the execution provider to build and check for: "cpu", "cuda", "dml", ...
        builder: options handed to onnxruntime-genai's model builder, over the recipe's own.
        max_drop: points of exact match and token accuracy that int4, int8 and fp16 may lose.
        data: held-out examples for the gate, instead of the job's own evaluation data.
        force: replaces an earlier export.
    """

    provider: str = "cpu"
    builder: dict[str, str] = field(default_factory=dict)
    max_drop: float = MAX_DROP
    data: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """One published directory or adapter file."""

    path: Path
    format: str
    recipe: str
    report: GateReport


def export_run(
    run_path: Path, formats: Sequence[str], out: Path, display: Display, options: ExportOptions | None = None
) -> list[Exported]:
    """Exports a finished run's merged model in several formats, each into `out`/FORMAT.

    Raises:
        InputError: an unknown format, a run without an adapter, another base model, something in the way, no data.
        RunError: the model could not be written, or a gate stayed closed; nothing was published.
    """
    options = options or ExportOptions()
    wanted = _known(formats)
    provider_name(options.provider)
    _check_free(out, [out / form for form in wanted], options.force)
    run = open_run(run_path)
    examples = held_out_examples(run, options.data)
    merge(run)
    exported = []
    with _workplace(out) as work:
        source = work / "merged"
        save_model(run.base, source)
        display.note(f"writing {', '.join(wanted)}")
        first = [_build_of(form, RECIPES[form][0], source, work, options) for form in wanted]
        for form, writer in zip(wanted, build(first, _log(work)), strict=True):
            exported.append(_export_format(run, form, writer, source, work, examples, display, options))
        for done in exported:
            publish(done.path, out / done.format)
    return [replace(done, path=out / done.format) for done in exported]


def export_adapter(
    run_path: Path, form: str, out: Path, display: Display, options: ExportOptions | None = None
) -> Exported:
    """Exports only the adapter, for devices that hold the base: `out`/NAME.onnx_adapter, NAME being the run's.

    The base itself goes to `out`/base-FORMAT once; later runs on the same base and layout add only their adapter.

    Raises:
        InputError, RunError: as `export_run`.
    """
    options = options or ExportOptions()
    (wanted,) = _known([form])
    provider_name(options.provider)
    run = open_run(run_path)
    examples = held_out_examples(run, options.data)
    name = run_path.resolve().name
    target, base = out / f"{name}{adapters.SUFFIX}", out / f"base-{wanted}"
    _check_free(out, [target], options.force)
    held = _usable_base(base, run, wanted)
    with _workplace(out) as work:
        if not held:
            source = work / "reference"
            save_model(run.base, source)
        merge(run)
        recipes = RECIPES[wanted] if not held else (Recipe(read_manifest(base).provenance["recipe"]),)
        for recipe in recipes:
            directory = base
            if not held:
                directory = work / "base"
                shutil.rmtree(directory, ignore_errors=True)
                display.note(f"{wanted}: writing the base with the adapter's factors as inputs ({recipe.name})")
                wish = Build(source, directory, wanted, recipe, options.provider, options.builder, run.path / "adapter")
                writer = build([wish], _log(work))[0]
                adapters.open_inputs(directory, run.layout)
            file = work / target.name
            adapters.write_adapter(file, directory, run)
            report = gate(directory, run.base, examples, wanted, options.max_drop, options.provider, file)
            display.note(_verdict(wanted, recipe, report))
            if report.passed:
                break
        else:
            raise RunError(_closed(wanted, report))
        if not held:
            provenance = _provenance(run, recipe, writer, options) | {"modules": adapters.modules(run.layout)}
            _finish(directory, run, f"{name}-base", wanted, "adapter-base", provenance, report)
            publish(directory, base)
        publish_adapter(file, target, run, wanted, report)
    return Exported(target, wanted, recipe.name, report)


def held_out_examples(run: FinishedRun, data: Path | None) -> list[Example]:
    """What the gate asks: the job's evaluation data, or the given file.

    Raises:
        InputError: there are none; an export is never published unchecked.
    """
    tokenizer, length = run.base.tokenizer, run.job.data.sequence_length
    if data is not None:
        return load_examples(data, tokenizer, length)[0]
    records = evaluation_records(run.job.data)
    if not records:
        raise InputError(
            f"{run.path}: the job has no data.evaluation to check the export on; give held-out examples: --data FILE"
        )
    examples, report = prepare(records, tokenizer, length)
    if not examples:
        raise DataError(Path(run.job.data.evaluation), f"no usable example ({report})")
    return examples


def publish(directory: Path, target: Path) -> None:
    """Moves a finished directory to its name, synced; an older one of that name is replaced."""
    for part in directory.rglob("*"):
        if part.is_file():
            with part.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    directory.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_adapter(file: Path, target: Path, run: FinishedRun, form: str, report: GateReport) -> None:
    """Moves an adapter to its name, with a JSON file beside it that says what it belongs to."""
    provenance = dict(run.provenance) | {"modules": adapters.modules(run.layout), "gate": report.to_json()}
    files = {target.name: list_files(file.parent)[file.name]}
    manifest = Manifest("adapter", target.name.removesuffix(adapters.SUFFIX), form, provenance, files)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.replace(target)
    write_json(target.with_suffix(".json"), manifest.to_json())


def _export_format(
    run: FinishedRun,
    form: Format,
    writer: str,
    source: Path,
    work: Path,
    examples: Sequence[Example],
    display: Display,
    options: ExportOptions,
) -> Exported:
    """Gates what the first recipe wrote, and tries the others until one's gate opens."""
    directory = work / form
    for recipe in RECIPES[form]:
        if not directory.exists():
            try:
                writer = build([_build_of(form, recipe, source, work, options)], _log(work))[0]
            except RunError as error:  # quantizers refuse some shapes; the next recipe may not
                display.note(f"{form} ({recipe.name}): {error}")
                shutil.rmtree(directory, ignore_errors=True)
                continue
        report = gate(directory, run.base, examples, form, options.max_drop, options.provider)
        display.note(_verdict(form, recipe, report))
        if report.passed:
            provenance = _provenance(run, recipe, writer, options)
            _finish(directory, run, run.path.resolve().name, form, "model", provenance, report)
            return Exported(directory, form, recipe.name, report)
        shutil.rmtree(directory)
    raise RunError(_closed(form, report))


def _build_of(form: Format, recipe: Recipe, source: Path, work: Path, options: ExportOptions) -> Build:
    return Build(source, work / form, form, recipe, options.provider, options.builder)


def _finish(
    directory: Path,
    run: FinishedRun,
    name: str,
    form: str,
    kind: str,
    provenance: dict[str, Any],
    report: GateReport,
) -> None:
    """Adds card and manifest to a written model."""
    for needed in _NEEDED:
        if not (directory / needed).is_file():
            raise ModelError(f"{run.job.model.base}: the export has no {needed}; expected a tokenizer that saves one")
    write_text(directory / CARD, model_card(kind, name, form, provenance, report))
    manifest = Manifest(
        kind=kind,
        name=name,
        format=form,
        provenance=provenance | {"gate": report.to_json()},
        files=list_files(directory),
        start_tokens=tuple(start_tokens(run.base.tokenizer)),
        context=int(run.base.network.config.max_position_embeddings),
    )
    write_json(directory / MANIFEST, manifest.to_json())


def _provenance(run: FinishedRun, recipe: Recipe, writer: str, options: ExportOptions) -> dict[str, Any]:
    return {
        **run.provenance,
        "recipe": recipe.name,
        "writer": writer,
        "provider": options.provider,
        "builder_options": {**recipe.options, **options.builder},
        "versions": versions(),
    }


def _usable_base(base: Path, run: FinishedRun, form: str) -> bool:
    """Whether a base exported earlier takes this run's adapter.

    Raises:
        ExportError: it is of another base model or layout.
    """
    if not base.exists():
        return False
    manifest = read_manifest(base)
    mine = (run.base.digest, adapters.modules(run.layout), form)
    theirs = (manifest.provenance.get("base_digest"), manifest.provenance.get("modules"), manifest.format)
    if manifest.kind != "adapter-base" or mine != theirs:
        raise ExportError(f"{base}: a base for other adapters than this run's; choose another --out")
    return True


def _known(formats: Sequence[str]) -> list[Format]:
    unknown = [form for form in formats if form not in FORMATS]
    if unknown or not formats:
        named = ", ".join(unknown) or "nothing"
        raise InputError(f"--format {named}: unknown; expected some of {', '.join(FORMATS)}")
    return [form for form in FORMATS if form in formats]


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


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A hidden folder inside `out`, gone afterwards whatever happens; on a failure the log stays beside it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with plain_errors(), tempfile.TemporaryDirectory(prefix=WORKPLACE, dir=out) as name:
            try:
                yield Path(name)
            finally:
                if _log(Path(name)).is_file():
                    _log(Path(name)).replace(out / LOG)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise RunError(f"{out}: {reason}; nothing was exported") from error
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _log(work: Path) -> Path:
    return work / LOG


def _verdict(form: str, recipe: Recipe, report: GateReport) -> str:
    state = "passed" if report.passed else f"refused: {'; '.join(report.failures)}"
    return (
        f"{form} ({recipe.name}): exact match {report.exact_match:.1%} (merged {report.reference_exact_match:.1%}), "
        f"argmax {report.argmax_agreement:.2%}, max logit error {report.max_logit_error:.2g}, "
        f"{format_bytes(report.bytes)}, {report.decode_tokens_per_second:,.0f} tokens/s: {state}"
    )


def _closed(form: str, report: GateReport) -> str:
    tried = len(RECIPES[form])  # type: ignore[index]
    return (
        f"{form}: the export differs from the merged model: {'; '.join(report.failures)}; "
        f"{tried} {'recipe was' if tried == 1 else 'recipes were'} tried and nothing was exported"
    )
