"""fedtune export publishes only complete models that passed the gate, and names mistakes."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_helpers import HERE, MakeRun, export_adapter, export_run

from fedtune.core.errors import ExportError, InputError, ModelError, RunDirectoryError, RunError
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.protocol.model_manifest import Format, manifest_digest, verify
from fedtune.server import cli
from fedtune.server.export.builder import Build, Recipe, build
from fedtune.server.export.exporter import ExportTools
from fedtune.server.export.gate import Candidate, GateReport, Reference, above, gate
from fedtune.server.export.grid_graph import Grid, Progress, rewrite
from fedtune.server.export.held_out import held_out_examples, split_examples
from fedtune.server.export.merge import merge, open_run
from fedtune.server.export.request import ExportOptions, ExportRequest, export
from fedtune.server.run_display import Silent

LENIENT = ExportOptions(max_drop=100.0, max_rise=1e9)  # random weights have nothing to lose


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


def test_int4_holds_four_bit_products_and_a_head_of_eight(exported: Path) -> None:
    assert product_bits(exported / "int4") == {4, 8}


def test_a_graph_whose_head_is_no_constant_product_is_refused(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        make("MatMul", ["x", "weight"], ["hidden"]),
        make("MatMul", ["hidden", "x"], ["products"], name="head"),
        make("Tanh", ["products"], ["logits"]),
    ]
    x, logits = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4]) for name in ("x", "logits"))
    weight = onnx.numpy_helper.from_array(torch.zeros(4, 4).numpy(), "weight")
    graph = onnx.helper.make_graph(nodes, "graph", [x], [logits], [weight])
    onnx.save_model(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match="the head, MatMul head, cannot be quantized; expected a MatMul with"):
        rewrite(tmp_path, Grid(4), (), "cpu", Silent().progress)


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


def test_where_no_format_passes_nothing_looks_exported(make_run: MakeRun, tmp_path: Path) -> None:
    refused = []

    def closed(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
        refused.append(candidate.form)
        return replace(gate(candidate, reference, watch), failures=("it is worse",))

    with pytest.raises(RunError, match="fp32: it differs from the merged model: it is worse; nothing was exported"):
        export_run(make_run(), ["fp16"], tmp_path / "out", tools=replace(HERE, gate=closed))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.log"]
    assert refused == ["fp16", "fp32"]


def test_a_format_that_cannot_pass_gives_way_to_the_next_larger_and_says_why(make_run: MakeRun, tmp_path: Path) -> None:
    tried = []

    def picky(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
        report = gate(candidate, reference, watch)
        tried.append(candidate.form)
        return replace(report, failures=("perplexity rose",)) if candidate.form == "int4" else report

    options = replace(LENIENT, force=True)
    done = export_run(make_run(), ["int4", "int8"], tmp_path, options, replace(HERE, gate=picky))
    assert [each.format for each in done] == ["int8"]
    assert tried == ["int4", "int4", "int8"]
    reason = "int4 was asked for and gave way to int8: int4: it differs from the merged model: perplexity rose"
    manifest, card = verify(tmp_path / "int8"), (tmp_path / "int8" / "MODEL_CARD.md").read_text()
    for remarks in (done[0].remarks, manifest.provenance["remarks"], [card]):
        assert any(reason in remark for remark in remarks)
    with pytest.raises(ExportError, match="int8: exists already"):
        export_run(make_run(), ["int4"], tmp_path, LENIENT, replace(HERE, gate=picky))


@pytest.mark.parametrize(("form", "larger"), [("int4", "int8"), ("int8", "fp16")])
def test_no_export_gives_up_speed_by_itself(make_run: MakeRun, tmp_path: Path, form: Format, larger: Format) -> None:
    """Products in float32 decode many times slower than fp32; only --exact-products asks for them."""
    built: list[Recipe] = []

    def note(wanted: Build, log: Path, watch: Progress) -> str:
        built.append(wanted.recipe)
        return HERE.build(wanted, log, watch)

    def picky(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
        report = gate(candidate, reference, watch)
        return replace(report, failures=("it is worse",)) if candidate.form == form else report

    run = make_run("llama", quantization="int4", tie_word_embeddings=True)
    (done,) = export_run(run, [form], tmp_path / "out", LENIENT, ExportTools(build=note, gate=picky))
    assert done.format == larger
    assert all(recipe.grid is None or recipe.grid.level == 4 for recipe in built)


def test_int4_that_fails_gets_more_bits_before_it_is_given_up(make_run: MakeRun, tmp_path: Path) -> None:
    tries = []

    def picky(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
        report = gate(candidate, reference, watch)
        tries.append(report.bytes)
        return report if len(tries) == 2 else replace(report, failures=("not yet",))

    (done,) = export_run(make_run(), ["int4"], tmp_path, LENIENT, replace(HERE, gate=picky))
    assert "the most sensitive third" in done.recipe
    assert tries[0] < tries[1]
    assert verify(done.path).provenance["recipe"] == done.recipe


def test_the_gate_refuses_a_rise_of_perplexity_where_nothing_is_exact(make_run: MakeRun, exported: Path) -> None:
    """Untrained models answer nothing exactly, so exact match has nothing to lose."""
    run = open_run(make_run())
    reference = Reference(run.base, held_out_examples(run, None))  # not merged, hence another perplexity

    def check(allowed: float) -> GateReport:
        return gate(Candidate(exported / "fp32", "int8", 100.0, allowed), reference, Silent().progress)

    whole = check(1e9)
    assert whole.passed
    assert whole.reference_exact_match == whole.exact_match == 0
    rise = 100 * (whole.perplexity / whole.reference_perplexity - 1)
    assert abs(rise) > 0.01
    assert check(rise + 0.001).passed
    refused = check(rise - 0.001)
    shown = above(rise, rise - 0.001)
    assert refused.failures == (f"perplexity rose by {shown}%; expected at most {rise - 0.001:g}%",)


@pytest.mark.parametrize(("value", "shown"), [(2.34, "2.3"), (1.04, "1.04"), (1.0003, "1.0003"), (math.nan, "nan")])
def test_a_refusal_shows_that_its_figure_is_above_the_limit(value: float, shown: str) -> None:
    assert above(value, 1.0) == shown


def test_the_gate_refuses_logits_that_are_not_finite(make_run: MakeRun, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported / "fp32", tmp_path / "fp32")
    model = onnx.load(copy / "model.onnx")
    (norm,) = [each for each in model.graph.initializer if "layers.0.input_layernorm" in each.name]
    norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * math.nan, norm.name))
    (copy / "model.onnx.data").unlink()
    onnx.save_model(model, copy / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    run = open_run(make_run())
    reference = Reference(run.base, held_out_examples(run, None)[:2])
    report = gate(Candidate(copy, "int8", 100.0, 1e9), reference, Silent().progress)
    assert "a logit is not finite" in report.failures
    assert report.max_logit_error == math.inf


def test_a_model_that_onnxruntime_refuses_gives_way_like_one_that_is_worse(make_run: MakeRun, tmp_path: Path) -> None:
    def broken(wanted: Build, log: Path, watch: Progress) -> str:
        writer = HERE.build(wanted, log, watch)
        if wanted.format == "fp16":
            (wanted.out / "model.onnx").write_bytes(b"no model")
        return writer

    (done,) = export_run(make_run(), ["fp16"], tmp_path / "out", tools=replace(HERE, build=broken))
    assert done.format == "fp32"
    assert "fp16: onnxruntime cannot run the written model: InvalidProtobuf" in done.remarks[-1]


def test_perplexity_is_that_of_the_completion_s_tokens(make_run: MakeRun, exported: Path) -> None:
    run = open_run(make_run())
    merge(run)
    examples = held_out_examples(run, None)[:3]
    report = gate(Candidate(exported / "fp32", "fp32", 0.0, 0.0), Reference(run.base, examples), Silent().progress)
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.ids.astype("int64"))
        with torch.no_grad():
            likely = run.base.network(ids[None]).logits[0].log_softmax(-1)
        losses += [-float(likely[at - 1, ids[at]]) for at in range(example.first_target, len(ids))]
    expected = math.exp(sum(losses) / len(losses))
    assert report.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.reference_perplexity == pytest.approx(expected, rel=1e-4)


class Notes(Silent):
    """Keeps what an export says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: dict[str, tuple[int, int]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, task: str, done: int, count: int) -> None:
        self.tasks[task] = (done, count)


def test_an_export_shows_its_progress_and_compensates_errors_on_examples_of_its_own(
    make_run: MakeRun, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    rows = [{"prompt": f"turn off the fan in room {room}", "completion": f" fan {room} off"} for room in range(90)]
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reports = []
    for data in (many, None):
        display, out = Notes(), tmp_path / str(data is None)
        options = replace(LENIENT, data=data, prompts=20)
        (done,) = export(ExportRequest(make_run(), ("int4",), out, options), display, HERE)
        reports.append(done.report)
        small = [note for note in display.notes if "The calibration set is too small" in note]
        assert bool(small) == (data is None)
        assert ("least squares" in done.recipe) == (data is None)
        assert verify(done.path).provenance["calibration_examples"] == (70 if data else 0)
        wanted = {"int4: writing the float graph", "int4: quantizing", "int4: comparing with the merged model"}
        assert wanted | ({"int4: calibrating"} if data else set()) == set(display.tasks)
        assert all(done == count for done, count in display.tasks.values())
    assert reports[0].prompts == 20


def test_calibration_ends_with_the_example_that_reaches_its_most_tokens(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"room {room}", "completion": " on"}) + "\n" for room in range(60)))
    run, options = open_run(make_run()), ExportOptions(data=many, prompts=20)
    checked, whole = split_examples(run, options)
    monkeypatch.setattr("fedtune.server.export.held_out.MOST_TOKENS", sum(map(len, whole[:3])) + 1)
    assert (len(checked), len(whole)) == (20, 40)
    assert split_examples(run, options)[1] == whole[:4]


def test_examples_of_another_task_are_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = shutil.copytree(make_run(), tmp_path / "run-0")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"eval_after": {"loss": 0.5}}))
    (done,) = export_run(run, ["fp32"], tmp_path / "out")
    remark = done.remarks[-1]
    assert "look unlike the run's own" in remark
    assert "give examples of the run's task: --data FILE" in remark


@pytest.mark.parametrize(("prompts", "few"), [(1, True), (20, False)])
def test_a_check_on_few_examples_is_said(make_run: MakeRun, tmp_path: Path, prompts: int, few: bool) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"room {room}", "completion": " on"}) + "\n" for room in range(60)))
    display, options = Notes(), ExportOptions(data=many, prompts=prompts)
    (done,) = export(ExportRequest(make_run(), ("fp32",), tmp_path / "out", options), display, HERE)
    words = "The check is on few held-out examples: 1, expected 20 or more"
    for said in (display.notes, done.remarks, verify(done.path).provenance["remarks"]):
        assert any(words in each for each in said) == few


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_in_int4_is_served_with_the_numbers_it_was_trained_with(
    make_run: MakeRun, tmp_path: Path, tied: bool
) -> None:
    run = make_run("llama", quantization="int4", tie_word_embeddings=tied)
    exact = replace(LENIENT, exact_products=True)
    (done,) = export_run(run, ["int4"], tmp_path / "beside", exact)
    apart = export_adapter(run, "int4", tmp_path / "apart", exact)
    for report in (done.report, apart.report):
        assert report.max_logit_error < 1e-4
        assert report.argmax_agreement == 1.0
    graph = onnx.load(done.path / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "GatherBlockQuantized" for node in graph.node) == tied


@pytest.mark.parametrize("key", ["block_size", "accuracy_level"])
def test_options_about_quantization_are_refused(make_run: MakeRun, tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"--option {key}: fedtune quantizes by its own recipes"):
        export_run(make_run(), ["int4"], tmp_path / "out", ExportOptions(builder={key: "16"}))


@pytest.mark.parametrize("limit", [math.nan, math.inf, -1.0])
def test_limits_that_are_none_are_refused(make_run: MakeRun, tmp_path: Path, limit: float) -> None:
    with pytest.raises(InputError, match=f"--max-rise {limit:g}: expected a percentage, 0 or more and finite"):
        export_run(make_run(), ["int4"], tmp_path / "out", ExportOptions(max_rise=limit))
    with pytest.raises(InputError, match=f"--max-drop {limit:g}: expected points from 0 to 100"):
        export_run(make_run(), ["int4"], tmp_path / "out", ExportOptions(max_drop=limit))


def test_a_full_disk_leaves_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="the disk is full; nothing was exported"):
        export_run(make_run(), ["int4"], tmp_path / "out", tools=replace(HERE, save=full))
    assert not (tmp_path / "out").exists()


def test_folders_of_killed_exports_go_and_a_running_export_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / ".export-killed" / "merged").mkdir(parents=True)

    def busy(wanted: Build, log: Path, watch: Progress) -> str:
        assert not (tmp_path / ".export-killed").exists()
        with pytest.raises(ExportError, match="another export works here; wait for its end, or choose another --out"):
            export_run(make_run(), ["int4"], tmp_path, LENIENT)
        assert wanted.source.is_dir()
        return HERE.build(wanted, log, watch)

    export_run(make_run(), ["fp32"], tmp_path, tools=replace(HERE, build=busy))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.log", "fp32"]
    verify(tmp_path / "fp32")


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
    wanted = Build(tmp_path / "nowhere", tmp_path / "out", "fp32", Recipe("float32"))
    with pytest.raises(RunError, match="the ONNX model could not be written: OSError"):
        build(wanted, tmp_path / "log", Silent().progress)
    assert "Traceback" in (tmp_path / "log").read_text()


def test_what_an_export_says_of_a_failure_leads_nowhere_that_is_gone(make_run: MakeRun, tmp_path: Path) -> None:
    def failing(wanted: Build, log: Path, watch: Progress) -> str:
        log.write_text("the builder's words")
        if wanted.format == "fp32":
            return HERE.build(wanted, log, watch)
        raise RunError(f"{wanted.source}/config.json is not supported")

    tools, out = replace(HERE, build=failing), tmp_path / "out"
    (done,) = export_run(make_run(), ["fp16"], out, LENIENT, tools)
    assert done.remarks[-1] == "fp16 was asked for and gave way to fp32: fp16: merged/config.json is not supported"
    shutil.rmtree(out)

    def refused(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
        raise RunError("it does not run")

    with pytest.raises(RunError, match="nothing was exported; the log is") as caught:
        export_run(make_run(), ["fp16"], out, LENIENT, replace(tools, gate=refused))
    assert Path(str(caught.value).rpartition("the log is ")[2]).read_text()
    assert ".export-" not in str(caught.value)


def test_an_architecture_whose_adapters_can_only_be_merged_says_so_once(make_run: MakeRun, tmp_path: Path) -> None:
    request = ExportRequest(make_run("gpt2"), ("int4",), tmp_path / "out", LENIENT, adapter_only=True)
    tools = ExportTools()  # the child must tell this error from others
    with pytest.raises(ModelError, match="its adapters can only be merged; leave out --adapter-only") as caught:
        export(request, Silent(), tools)
    assert str(caught.value).count("merged") == 1
    assert ".export-" not in str(caught.value)


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


def test_a_base_that_was_made_otherwise_is_replaced_only_by_force(make_run: MakeRun, tmp_path: Path) -> None:
    def adapter(options: ExportOptions) -> list[str]:
        display = Notes()
        export(ExportRequest(make_run(), ("int8",), tmp_path, options, adapter_only=True), display, HERE)
        return display.notes

    def level() -> int:
        return int(verify(tmp_path / "base-int8").provenance["grid"]["level"])

    plain, exact = LENIENT, replace(LENIENT, exact_products=True)
    adapter(plain)
    before = manifest_digest(tmp_path / "base-int8")
    (tmp_path / "run-0.onnx_adapter").unlink()
    words = "was exported without --exact-products, which this export has; .* or replace the base with --force"
    with pytest.raises(ExportError, match=words):
        adapter(exact)
    with pytest.raises(ExportError, match="was exported with --option none, this export has fuse_qkv=false"):
        adapter(replace(plain, builder={"fuse_qkv": "false"}))
    notes = adapter(replace(plain, force=True))
    assert any("is there already and takes this adapter" in note for note in notes)
    assert manifest_digest(tmp_path / "base-int8") == before
    assert level() == 4
    adapter(replace(exact, force=True))
    assert level() == 1


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
