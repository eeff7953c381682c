"""A pack that is not whole, not for this base or not for this machine is refused in words that name the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from fedtune.client.onnx.edge_network import check_runtime
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.plan.backend import WrongBaseError
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.core.protocol.model_manifest import MANIFEST, list_files
from fedtune.data.job_inputs import PACK_FACTS
from fedtune.edge.pack import open_pack
from fedtune.edge.pack_facts import BACKWARD, FORWARD, HEAD, TOKENIZER, WEIGHTS, read_facts
from fedtune.edge.pack_writer import write_pack
from fedtune.model.base_model import load_base
from fedtune.model.shape import shape_of
from fedtune.server import cli

MakeModel = Callable[..., Path]
LORA = AdapterSettings(rank=4)
REMEDY = "pull the pack again, or write it again with: fedtune edge pack BASE --out DIR"


@pytest.fixture
def copied(demo_pack: Path, tmp_path: Path) -> Path:
    """Gives a copy of a pack that the test may damage."""
    return Path(shutil.copytree(demo_pack, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def list_again(directory: Path, **changes: Any) -> None:
    """Gives the manifest the digests of files that the test has changed, and other changes."""
    files = {name: asdict(entry) for name, entry in list_files(directory).items()}
    edit(directory / MANIFEST, **({"files": files} | changes))


def test_a_pack_carries_its_base_s_digest(demo_pack: Path) -> None:
    base = load_base(ModelSettings(), precision="fp32")
    trainer = open_trainer(demo_pack, LORA, base.digest)
    assert (trainer.digest, trainer.name) == (base.digest, base.name)


def test_weights_are_mapped_and_cannot_be_changed(demo_pack: Path) -> None:
    tensors = open_pack(demo_pack).tensors
    assert all(not tensor.flags.writeable and not tensor.flags.owndata for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.uint8), np.dtype(np.float32)}


def test_a_pack_for_another_base_is_refused(demo_pack: Path) -> None:
    with pytest.raises(WrongBaseError):
        open_trainer(demo_pack, LORA, "0" * 64)


@pytest.mark.parametrize("name", [FORWARD, BACKWARD, HEAD, WEIGHTS, "tokenizer.json"])
def test_a_changed_file_is_refused(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: was changed .*{REMEDY}"):
        open_pack(copied)


def test_a_file_cut_short_is_refused(copied: Path) -> None:
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: is incomplete, or was changed .*{REMEDY}"):
        open_pack(copied)


def test_a_missing_file_is_refused(copied: Path) -> None:
    (copied / BACKWARD).unlink()
    with pytest.raises(ModelError, match=rf"{BACKWARD}: cannot be read: .*{REMEDY}"):
        open_pack(copied)


def test_a_pack_that_was_half_copied_is_refused_before_its_weights_are_read(copied: Path) -> None:
    weights = copied / WEIGHTS
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: is incomplete, or was changed .*{REMEDY}"):
        read_facts(copied)


def test_a_pack_without_a_manifest_is_half_written(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(ModelError, match=rf"it has no {MANIFEST}; {REMEDY}"):
        open_pack(copied)


def test_a_pack_with_one_more_file_is_refused(copied: Path) -> None:
    (copied / "more.py").write_text("print()", encoding="utf-8")
    with pytest.raises(ModelError, match=r"more\.py: is not part of the export"):
        open_pack(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 4}', '{"schema": 4, "layers": "two"}'])
def test_facts_that_are_none_are_refused(copied: Path, text: str) -> None:
    (copied / PACK_FACTS).write_text(text, encoding="utf-8")
    list_again(copied)
    with pytest.raises(ModelError, match="not the facts of an edge pack"):
        open_pack(copied)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'])
def test_weights_that_are_none_are_refused_though_the_manifest_names_them(copied: Path, content: bytes) -> None:
    (copied / WEIGHTS).write_bytes(content)
    list_again(copied)
    with pytest.raises(ModelError, match=f"not a file of weights: .*{REMEDY}"):
        open_pack(copied)


MODULE = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "name", [f"{MODULE}.codes", f"{MODULE}.scale_mean", "nf4.pairs", "rope.frequencies", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named_though_the_digests_are_right(copied: Path, name: str) -> None:
    tensors = load_file(copied / WEIGHTS)
    del tensors[name]
    save_file(tensors, copied / WEIGHTS)
    list_again(copied)
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: has no tensor {name}.*; {REMEDY}"):
        open_pack(copied)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{MODULE}.codes", lambda codes: codes[:-1]),
        (f"{MODULE}.codes", lambda codes: codes.astype(np.float32)),
        (f"{MODULE}.scale_steps", lambda steps: np.concatenate([steps, steps])),
        ("model.embed_tokens.weight", lambda weight: weight.T.copy()),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_named(copied: Path, name: str, change: Any) -> None:
    tensors = load_file(copied / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, copied / WEIGHTS)
    list_again(copied)
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: {name} is .*; expected .* of shape .*; {REMEDY}"):
        open_pack(copied)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.layers.1.input_layernorm.weight", None, f"{FORWARD}: the graph and the pack's tensors differ in"),
        ("model.layers.0.extra.weight", np.ones(3, dtype=np.float32), "differ in extra.weight"),
        ("model.norm.weight", np.ones(3, dtype=np.float32), rf"{HEAD}: weight is .* of shape \(3,\); the graph takes"),
        ("rope.frequencies", np.ones(3, dtype=np.float32), f"{FORWARD}: cosines is .*; the graph takes"),
    ],
)
def test_a_graph_that_does_not_fit_the_tensors_is_refused(copied: Path, name: str, change: Any, words: str) -> None:
    tensors = load_file(copied / WEIGHTS)
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    save_file(tensors, copied / WEIGHTS)
    list_again(copied)
    with pytest.raises(ModelError, match=f"{words}.*{REMEDY}"):
        open_trainer(copied, LORA)


def test_a_graph_whose_weights_are_in_another_file_is_refused(copied: Path) -> None:
    graph = onnx.load(copied / HEAD)
    graph.graph.initializer.append(numpy_helper.from_array(np.ones(4096, dtype=np.float32), "more"))
    onnx.save(graph, copied / HEAD, save_as_external_data=True, location="outside.bin", size_threshold=64)
    list_again(copied)
    with pytest.raises(ModelError, match=f"{HEAD}: refers to weights in another file.*{REMEDY}"):
        open_pack(copied)


@pytest.mark.parametrize("content", [b"\x3a\x7f", b"\x3c", b"\x0a" + b"\xff" * 12])
def test_a_graph_that_is_none_is_refused(copied: Path, content: bytes) -> None:
    (copied / FORWARD).write_bytes(content)
    list_again(copied)
    with pytest.raises(ModelError, match=f"{FORWARD}: not a graph: .*{REMEDY}"):
        open_pack(copied)


def test_facts_whose_sizes_contradict_each_other_are_refused(copied: Path) -> None:
    shape = json.loads((copied / PACK_FACTS).read_text(encoding="utf-8"))["shape"]
    edit(copied / PACK_FACTS, shape={**shape, "layers": shape["layers"] + 1})
    list_again(copied)
    with pytest.raises(ModelError, match=f"not those of 4 blocks that are alike; {REMEDY}"):
        open_pack(copied)
    edit(copied / PACK_FACTS, shape={**shape, "linear": shape["linear"][:-1]})
    list_again(copied)
    with pytest.raises(ModelError, match=f"not those of 3 blocks that are alike; {REMEDY}"):
        open_pack(copied)


def test_a_tokenizer_that_is_none_is_refused(copied: Path) -> None:
    (copied / TOKENIZER).write_text("{}", encoding="utf-8")
    list_again(copied)
    with pytest.raises(ModelError, match=rf"{TOKENIZER}: not a tokenizer: .*{REMEDY}"):
        open_trainer(copied, LORA)


def test_its_facts_have_the_sizes_of_the_base(demo_pack: Path) -> None:
    ours, theirs = read_facts(demo_pack).shape, shape_of(ModelSettings())
    assert ours == replace(theirs, linear=ours.linear, file_bytes=(demo_pack / WEIGHTS).stat().st_size)
    assert sorted(ours.linear, key=str) == sorted(theirs.linear, key=str)


def test_what_needs_the_model_itself_says_so_of_a_pack(demo_pack: Path) -> None:
    with pytest.raises(ModelError, match="an edge pack, on which devices train; expected the model"):
        shape_of(ModelSettings(str(demo_pack)))


def test_a_manifest_of_something_else_or_with_names_outside_is_refused(copied: Path) -> None:
    files = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))["files"]
    list_again(copied, files={**files, "../outside": files[WEIGHTS]})
    with pytest.raises(ModelError, match="is not a file's name inside the directory"):
        open_pack(copied)
    list_again(copied, kind="model")
    with pytest.raises(ModelError, match="lists only a part"):
        open_pack(copied)
    (copied / HEAD).unlink()
    list_again(copied)
    with pytest.raises(ModelError, match="lists only a part"):
        open_pack(copied)


def test_a_pack_of_another_version_is_refused(copied: Path) -> None:
    edit(copied / PACK_FACTS, schema=1)
    list_again(copied)
    with pytest.raises(ModelError, match="has schema 1; expected 4"):
        open_pack(copied)


def test_an_onnxruntime_that_is_too_old_is_refused(demo_pack: Path) -> None:
    pack = open_pack(demo_pack)
    with pytest.raises(ModelError, match=r"needs onnxruntime 1\.19 or later.*pip install 'onnxruntime>=1\.19'"):
        check_runtime(pack, "1.9.0")
    check_runtime(pack, "1.19.0+cpu")
    check_runtime(pack, "2.0")


def test_an_adapter_that_does_not_fit_the_base_is_refused(demo_pack: Path) -> None:
    with pytest.raises(ModelError, match="matches no linear layer"):
        open_trainer(demo_pack, AdapterSettings(target_modules=("conv",)))
    with pytest.raises(ModelError, match="rank"):
        open_trainer(demo_pack, AdapterSettings(kind="core", rank=1024))


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("gpt2", {}, "gpt2 has no edge pack; expected"),
        ("gpt_neox", {}, "gpt_neox has no edge pack; expected"),
        ("llama", {"attention_dropout": 0.1}, "expected attention_dropout = 0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type dynamic"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
            "blocks differ",
        ),
    ],
)
def test_a_base_without_a_pack_is_refused_by_name(
    make_model: MakeModel, tmp_path: Path, architecture: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        write_pack(ModelSettings(str(make_model(architecture, **settings))), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_the_command_refuses_a_base_in_one_line(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["edge", "pack", str(make_model("gpt2")), "--out", str(tmp_path / "pack")])
    assert caught.value.code == 2
    assert "gpt2 has no edge pack; expected gemma, llama" in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_pack_is_written_in_nf4_to_a_new_directory(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='expected "nf4"'):
        write_pack(ModelSettings(str(make_model()), quantization="int4"), tmp_path / "pack")
    (tmp_path / "kept").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="has files already; expected a new directory"):
        write_pack(ModelSettings(str(make_model())), tmp_path)
