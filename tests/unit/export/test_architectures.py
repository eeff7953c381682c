"""Every architecture's ONNX model equals the merged torch model, by the builder or, for others, by torch.onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai  # type: ignore[import-untyped]
import pytest
import torch
from export_helpers import build_here

from fedtune.core.protocol.model_manifest import Format
from fedtune.server.export.builder import RECIPES, Build, build
from fedtune.server.export.gate import Candidate, Reference, gate
from fedtune.server.export.held_out import held_out_examples
from fedtune.server.export.merge import FinishedRun, merge, open_run, save_model
from fedtune.server.run_display import Silent

BY_BUILDER = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma")
SETTINGS = {"phi3": {"original_max_position_embeddings": 256}}  # a different value would change the rotary embedding
DROP, RISE = 100.0, 1e9  # random weights have nothing to lose
ERRORS = {"fp16": 0.05, "int8": 0.5, "int4": 5.0}  # of logits that are a few units large

Written = tuple[dict[str, FinishedRun], Path, dict[Path, str]]


def write_all(make_run: Callable[..., Path], folder: Path, wanted: Sequence[tuple[str, Format]]) -> Written:
    """Writes (architecture, format) pairs; returns runs by architecture and writers by model."""
    runs: dict[str, FinishedRun] = {}
    writers: dict[Path, str] = {}
    for architecture, form in wanted:
        source = folder / architecture / "merged"
        if architecture not in runs:
            run = runs[architecture] = open_run(make_run(architecture, **SETTINGS.get(architecture, {})))
            merge(run)
            save_model(run.base, source)
        one = Build(source, folder / architecture / form, form, RECIPES[form][0])
        # The first in a child, as an export does it, and the others here, since a child takes seconds to start.
        writers[one.out] = (build if not writers else build_here)(one, folder / "log", Silent().progress)
    return runs, folder, writers


@pytest.fixture(scope="module")
def written(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    wanted: list[tuple[str, Format]] = [(name, "fp32") for name in (*BY_BUILDER, "gpt_neox")]
    wanted += [("llama", "int4"), ("llama", "int8"), ("llama", "fp16")]
    return write_all(make_run, tmp_path_factory.mktemp("written"), wanted)


def check(written: Written, name: str, form: Format) -> None:
    runs, folder, writers = written
    directory = folder / name / form
    run = runs[name]
    reference = Reference(run.base, held_out_examples(run, None))
    report = gate(Candidate(directory, form, DROP, RISE), reference, Silent().progress)
    assert report.passed, report.failures
    assert writers[directory] == ("onnxruntime-genai" if name in BY_BUILDER else "torch.onnx")
    if form == "fp32":
        assert report.argmax_agreement == report.generated_equal == 1.0
        assert report.max_logit_error < 1e-4
    else:
        assert 0 < report.max_logit_error < ERRORS[form]
        assert report.bytes < sum(path.stat().st_size for path in (folder / name / "fp32").glob("model.onnx*"))


@pytest.mark.parametrize("name", [*BY_BUILDER, "gpt_neox"])
def test_the_cache_gives_the_merged_models_logits_token_by_token(written: Written, name: str) -> None:
    runs, folder, _ = written
    (example, *_) = held_out_examples(runs[name], None)
    ids = example.ids.astype(np.int64)
    with torch.no_grad():
        wanted = runs[name].base.network(torch.from_numpy(ids)[None]).logits[0].numpy()
    model = onnxruntime_genai.Model(str(folder / name / "fp32"))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids))
    generator = onnxruntime_genai.Generator(model, params)
    for position, token in enumerate(ids):
        generator.append_tokens(np.array([token], dtype=np.int32))  # it knows the other tokens from its cache only
        assert np.abs(generator.get_logits().reshape(-1) - wanted[position]).max() < 1e-4


@pytest.mark.parametrize("name", [*BY_BUILDER, "gpt_neox"])
def test_float32_is_the_merged_model_in_every_position(written: Written, name: str) -> None:
    check(written, name, "fp32")


@pytest.mark.parametrize("form", ["fp16", "int8", "int4"])
def test_smaller_formats_come_close(written: Written, form: Format) -> None:
    check(written, "llama", form)


def test_gpt2_is_calibrated_and_its_tied_head_has_eight_bits(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Its products' inputs have no batch axis, and its graph transposes the embedding for the head."""
    run = open_run(make_run("gpt2"))
    merge(run)
    save_model(run.base, tmp_path / "merged")
    ids = tuple(tuple(example.ids.tolist()) for example in held_out_examples(run, None))
    one = Build(tmp_path / "merged", tmp_path / "int4", "int4", RECIPES["int4"][0], calibration=ids)
    assert build_here(one, tmp_path / "log", Silent().progress) == "torch.onnx"
    graph = onnx.load(one.out / "model.onnx", load_external_data=False).graph
    bits = {
        node.output[0]: attribute.i
        for node in graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    assert bits.pop("logits") == 8
    assert sorted(bits.values()) == [*[4] * 8, 8]  # four products in each of two layers, and the embedding
    report = gate(
        Candidate(one.out, "int4", DROP, RISE), Reference(run.base, held_out_examples(run, None)[:2]), Silent().progress
    )
    assert report.passed, report.failures
    assert report.max_logit_error < ERRORS["int4"]


def test_a_graph_of_the_builder_that_does_not_run_is_written_by_torch(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The builder's attention takes multiples of 8 as head size only, and says so when it is run."""
    run = open_run(make_run("llama", hidden_size=80, head_dim=20))
    merge(run)
    save_model(run.base, tmp_path / "merged")
    one = Build(tmp_path / "merged", tmp_path / "fp32", "fp32", RECIPES["fp32"][0])
    assert build_here(one, tmp_path / "log", Silent().progress) == "torch.onnx"
    reference = Reference(run.base, held_out_examples(run, None)[:2])
    assert gate(Candidate(one.out, "fp32", DROP, RISE), reference, Silent().progress).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_the_generic_path_has_every_format(make_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    forms: tuple[Format, ...] = ("fp32", "fp16", "int8", "int4")
    written = write_all(make_run, tmp_path, [(name, form) for form in forms])
    for form in forms:
        check(written, name, form)
