"""fedtune export publishes only complete models that passed the gate, and names mistakes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from export_helpers import HERE, MakeRun, export_adapter, export_run

from fedtune.core.errors import ExportError, InputError, ModelError, RunDirectoryError, RunError
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.protocol.model_manifest import manifest_digest, verify
from fedtune.server import cli
from fedtune.server.export.builder import Build, Recipe, build
from fedtune.server.export.gate import Candidate, GateReport, Reference, gate
from fedtune.server.export.request import ExportOptions, export

LENIENT = ExportOptions(max_drop=100.0)  # random weights have nothing to lose


@pytest.fixture(scope="module")
def exported(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a directory with fp32/ and int4/; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    export_run(make_run(), ["int4", "fp32"], out, LENIENT)
    return out


def test_an_export_is_whole_and_says_where_it_comes_from(exported: Path, make_run: MakeRun) -> None:
    manifest = verify(exported / "fp32")
    summary = json.loads((make_run() / "summary.json").read_text())
    assert manifest.provenance["base_digest"] == summary["base_digest"]
    assert manifest.provenance["adapter_digest"] == summary["adapter_digest"]
    assert (manifest.provenance["rounds"], manifest.provenance["clients"]) == (3, 5)
    assert manifest.provenance["gate"]["argmax_agreement"] == 1.0
    assert {"model.onnx", "tokenizer.json", "genai_config.json", "MODEL_CARD.md"} <= set(manifest.files)
    assert manifest.start_tokens == ()
    assert summary["base_digest"] in (exported / "fp32" / "MODEL_CARD.md").read_text()
    assert len(manifest_digest(exported / "fp32")) == 64
    assert sorted(path.name for path in exported.iterdir()) == ["export.log", "fp32", "int4"]


def product_bits(directory: Path) -> set[int]:
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    return {attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"}


def test_int4_holds_four_bit_products(exported: Path) -> None:
    assert product_bits(exported / "int4") == {4}


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "MODEL_CARD.md"])
def test_a_changed_file_is_named(exported: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(exported / "fp32", tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ExportError, match=f"{name}: was changed"):
        verify(copy)


def test_a_missing_and_an_added_file_are_named(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported / "fp32", tmp_path / "copy")
    (copy / "extra.so").write_bytes(b"")
    with pytest.raises(ExportError, match=r"extra\.so: is not part of the export"):
        verify(copy)
    (copy / "extra.so").unlink()
    (copy / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"model\.onnx\.data: cannot be read"):
        verify(copy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(schema=2),
        lambda manifest: manifest["files"].update({"../outside": manifest["files"]["model.onnx"]}),
        lambda manifest: manifest["files"].update({"/etc/passwd": manifest["files"]["model.onnx"]}),
        lambda manifest: manifest["files"]["model.onnx"].update(bytes="many"),
        lambda manifest: manifest.update(unknown=1),
        lambda manifest: manifest.update(files={}),
    ],
)
def test_a_broken_manifest_is_refused(exported: Path, tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    manifest = json.loads((exported / "fp32" / "fedtune.json").read_text())
    damage(manifest)
    (tmp_path / "fedtune.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"fedtune\.json: not a manifest"):
        verify(tmp_path)


def test_a_folder_above_exports_names_them(exported: Path) -> None:
    with pytest.raises(ExportError, match="expected one of its folders: fp32, int4"):
        verify(exported)


def test_a_closed_gate_leaves_nothing_that_looks_exported(make_run: MakeRun, tmp_path: Path) -> None:
    refused = []

    def closed(candidate: Candidate, reference: Reference) -> GateReport:
        report = gate(candidate, reference)
        refused.append(candidate.form)
        return replace(report, failures=("it is worse",)) if candidate.form == "int8" else report

    with pytest.raises(RunError, match="int8: the export differs from the merged model: it is worse; 2 recipes"):
        export_run(make_run(), ["fp32", "int8"], tmp_path / "out", tools=replace(HERE, gate=closed))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.log"]
    assert refused == ["int8", "int8"]


def test_int4_that_fails_is_quantized_better_before_it_is_given_up(make_run: MakeRun, tmp_path: Path) -> None:
    tries = []

    def picky(candidate: Candidate, reference: Reference) -> GateReport:
        report = gate(candidate, reference)
        tries.append(report.max_logit_error)
        return report if len(tries) == 4 else replace(report, failures=("not yet",))

    run = make_run("llama", intermediate_size=128)  # k-quant takes no odd number of blocks
    (done,) = export_run(run, ["int4"], tmp_path, LENIENT, replace(HERE, gate=picky))
    assert done.recipe == "4 bits, k-quant, blocks of 32; head and sensitive layers in 8 bits"
    assert len(tries) == 4
    assert product_bits(done.path) == {4, 8}
    assert verify(done.path).provenance["recipe"] == done.recipe


def test_a_full_disk_leaves_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="the disk is full; nothing was exported"):
        export_run(make_run(), ["int4"], tmp_path / "out", tools=replace(HERE, save=full))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kilobytes", [100, 300, 500, 700, 800])
def test_wherever_the_disk_fills_up_nothing_looks_exported(
    make_run: MakeRun, small_disk: Callable[[int], Path], kilobytes: int
) -> None:
    out = small_disk(kilobytes) / "onnx"
    with pytest.raises(RunError, match=r"disk is full|No space left"):
        export_run(make_run(), ["fp32"], out)
    assert not list(out.glob("**/fedtune.json"))
    assert [path.name for path in out.glob("*")] in ([], ["export.log"])


def test_an_earlier_export_is_replaced_only_by_force(exported: Path, make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(exported, out)
    with pytest.raises(ExportError, match="fp32: exists already; choose another --out"):
        export_run(make_run(), ["fp32"], out)
    (out / "fp32" / "model.onnx").write_bytes(b"broken")
    export_run(make_run(), ["fp32"], out, replace(LENIENT, force=True))
    verify(out / "fp32")
    (out / "fp16").mkdir()
    with pytest.raises(ExportError, match="it is not an export"):
        export_run(make_run(), ["fp16"], out, replace(LENIENT, force=True))


def test_what_cannot_be_exported_is_refused_with_the_reason(make_run: MakeRun, tmp_path: Path) -> None:
    def refused(run: Path, kind: type[Exception], words: str, options: ExportOptions | None = None) -> None:
        with pytest.raises(kind, match=words):
            export_run(run, ["fp32"], tmp_path / "out", options)
        assert not (tmp_path / "out").exists()

    with pytest.raises(InputError, match="--format int3: unknown; expected some of int4, int8, fp16, fp32"):
        export_run(make_run(), ["int3", "int4"], tmp_path / "out")
    refused(tmp_path, RunDirectoryError, "not a run directory")

    copy = shutil.copytree(make_run(), tmp_path / "no-adapter")
    shutil.rmtree(copy / "adapter")
    refused(copy, RunDirectoryError, "no adapter/adapter_model.safetensors")

    copy = shutil.copytree(make_run(), tmp_path / "unfinished")
    (copy / "summary.json").unlink()
    refused(copy, RunDirectoryError, "the run has not finished")

    copy = shutil.copytree(make_run(), tmp_path / "other-base")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"base_digest": "0" * 64}))
    refused(copy, ModelError, "not the base model of this run")
    (copy / "summary.json").write_text(json.dumps(summary | {"adapter_digest": "0" * 64}))
    refused(copy, ModelError, "not the adapter that the run wrote")

    copy = shutil.copytree(make_run(), tmp_path / "no-evaluation")
    text = (copy / "job.toml").read_text()
    evaluation = load_job(copy / "job.toml").data.evaluation
    (copy / "job.toml").write_text(text.replace(evaluation, ""))
    refused(copy, InputError, "no data.evaluation to check the export on")
    copy = shutil.copytree(make_run(), tmp_path / "flora")
    flora = (
        "adapter.kind=lora",
        'federation.aggregation="flora"',
        'compression.preset="none"',
        "secure_aggregation.enabled=false",
    )
    (copy / "job.toml").write_text(dump_job(load_job(make_run() / "job.toml", flora)))
    refused(copy, ExportError, 'a residual, and an export has the adapter only; expected a run with .* "flexlora"')
    refused(make_run(), InputError, "onnxruntime has no CUDAExecutionProvider", ExportOptions(provider="cuda"))


def test_a_builder_that_fails_gives_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the builder's log is"):
        build([Build(tmp_path / "nowhere", tmp_path / "out", "fp32", Recipe("float32"))], tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_adapters_apart_share_one_base(make_run: MakeRun, tmp_path: Path) -> None:
    first = export_adapter(make_run(), "int4", tmp_path, LENIENT)
    base = manifest_digest(tmp_path / "base-int4")
    second = export_adapter(make_run(seed=1), "int4", tmp_path, LENIENT)
    assert manifest_digest(tmp_path / "base-int4") == base
    assert (first.path.name, second.path.name) == ("run-0.onnx_adapter", "run-1.onnx_adapter")
    verify(tmp_path / "base-int4")
    described = json.loads((tmp_path / "run-1.json").read_text())
    assert described["provenance"]["base_digest"] == first_base_digest(tmp_path)
    with pytest.raises(ExportError, match="a base for other adapters"):
        export_adapter(make_run("qwen3"), "int4", tmp_path, replace(LENIENT, force=True))


def first_base_digest(out: Path) -> str:
    return str(verify(out / "base-int4").provenance["base_digest"])


def test_an_adapter_apart_is_exact_in_float32(make_run: MakeRun, tmp_path: Path) -> None:
    done = export_adapter(make_run(), "fp32", tmp_path)
    assert done.report.passed
    assert done.report.max_logit_error < 1e-4


def test_the_command_prints_json_and_refuses_in_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = cli.Programs(export=lambda request, display: export(request, display, HERE))

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main(["export", *arguments], programs)
        return int(caught.value.code or 0)

    assert run(str(make_run()), "--format", "fp32", "--out", str(tmp_path / "onnx"), "--json") == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert done["path"] == str(tmp_path / "onnx" / "fp32")
    assert run(str(make_run()), "--format", "fp33") == 2
    error = capsys.readouterr().err
    assert "fp33" in error
    assert error.count("\n") == 1
    assert run(str(make_run()), "--option", "block_size") == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err
