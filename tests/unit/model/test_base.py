"""Loading a base: one digest for every form of its weights, and a clear sentence for every fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.core.errors import ModelError
from fedtune.core.job.settings import ModelSettings
from fedtune.model import int4
from fedtune.model.base_model import BaseModel, best_precision, linear_modules, load_base
from fedtune.model.nf4 import dequantize, quantize
from fedtune.model.packed import PackedLinear

MakeModel = Callable[..., Path]
IDS = torch.tensor([[5, 9, 17, 60, 33, 8]])


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = base.network(IDS).logits
    return output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["nf4", "int4"])
def test_packed_and_dequantized_bases_compute_the_same_bits(
    make_model: MakeModel, architecture: str, precision: Any, quantization: Any
) -> None:
    settings = ModelSettings(str(make_model(architecture)), quantization)
    packed = load_base(settings, weights="packed", precision=precision)
    dense = load_base(settings, weights="dequantized", precision=precision)
    assert (packed.weights, dense.weights) == ("packed", "dequantized")
    assert packed.digest == dense.digest
    assert torch.equal(logits(packed), logits(dense))


def test_bf16_stays_close_to_fp32(make_model: MakeModel, architecture: str) -> None:
    settings = ModelSettings(str(make_model(architecture)))
    exact, rounded = (logits(load_base(settings, precision=precision)).float() for precision in ("fp32", "bf16"))
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_linear_layers_hold_the_reference_values_and_head_and_embeddings_the_original_ones(
    make_model: MakeModel,
) -> None:
    directory = str(make_model("llama"))
    original = load_base(ModelSettings(directory, quantization="none"), precision="fp32").network
    quantized = load_base(ModelSettings(directory), weights="dequantized", precision="fp32").network
    names = {name for name, _ in linear_modules(original)}
    assert len(names) == 14
    for name, parameter in original.named_parameters():
        expected = parameter
        if name.removesuffix(".weight") in names:
            expected = dequantize(quantize(parameter), torch.float32)
        assert torch.equal(quantized.get_parameter(name), expected), name


@pytest.mark.parametrize("tied", [False, True])
def test_an_int4_base_holds_the_values_that_are_served_in_every_layer_and_the_head(
    make_model: MakeModel, tied: bool
) -> None:
    directory = str(make_model("llama", tie_word_embeddings=tied))
    original = load_base(ModelSettings(directory, quantization="none"), precision="fp32")
    base = load_base(ModelSettings(directory, quantization="int4"), weights="dequantized", precision="fp32")
    names = {f"{name}.weight": 4 for name, _ in linear_modules(original.network)}
    names["model.embed_tokens.weight" if tied else "lm_head.weight"] = 8
    for name, parameter in original.network.named_parameters():
        expected = parameter
        if name in names:
            expected = int4.dequantize(int4.quantize(parameter, names[name]), torch.float32)
        assert torch.equal(base.network.get_parameter(name), expected), name
    assert (base.head.weight is base.network.get_input_embeddings().weight) == tied


def test_packed_weights_are_an_eighth_of_float32(make_model: MakeModel) -> None:
    base = load_base(ModelSettings(str(make_model("llama"))), weights="packed", precision="fp32")
    layers = [module for module in base.network.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert not any(list(layer.parameters()) for layer in layers)


def test_the_digest_names_weights_and_quantization(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_model("llama")
    digest = load_base(ModelSettings(str(directory))).digest
    assert digest == load_base(ModelSettings(str(directory)), precision="fp32").digest
    assert digest != load_base(ModelSettings(str(directory), quantization="none")).digest
    assert digest != load_base(ModelSettings(str(directory), quantization="int4")).digest
    changed = tmp_path / "changed"
    shutil.copytree(directory, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert digest != load_base(ModelSettings(str(changed))).digest


def test_a_tokenizer_without_padding_pads_with_the_end(
    make_model: MakeModel, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    make_tokenizer(pad_token=None).save_pretrained(tmp_path)
    assert load_base(ModelSettings(str(tmp_path))).tokenizer.pad_token == "</s>"


def test_a_tokenizer_without_an_end_is_refused(
    make_model: MakeModel, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    make_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_base(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "a/b/c"])
def test_a_path_that_is_no_directory_is_refused_without_asking_a_hub(path: str) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        load_base(ModelSettings(path))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="not a directory"):
        load_base(ModelSettings(str(file)))


def test_a_directory_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_base(ModelSettings(str(tmp_path)))


def test_a_model_without_tokenizer_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_base(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "vit"},
    ],
)
def test_a_model_that_is_no_causal_language_model_is_refused(
    make_model: MakeModel, tmp_path: Path, config: dict[str, Any]
) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is not a causal language model"):
        load_base(ModelSettings(str(tmp_path)))


def test_a_config_that_is_not_readable_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match="not a readable model"):
        load_base(ModelSettings(str(tmp_path)))


def test_a_model_without_weights_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize("quantization", ["nf4", "int4", "none"])
def test_a_model_with_a_weight_that_is_no_number_names_it(
    make_model: MakeModel, tmp_path: Path, quantization: Any
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[name][1, 2] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} has values that are NaN or infinite; expected another copy"):
        load_base(ModelSettings(str(tmp_path), quantization))


def test_a_model_with_weights_missing_lists_them(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(ModelSettings(str(tmp_path)))


def test_packed_weights_of_an_unquantized_base_are_a_contradiction(make_model: MakeModel) -> None:
    with pytest.raises(ModelError, match="quantization is none"):
        load_base(ModelSettings(str(make_model("llama")), quantization="none"), weights="packed")


def test_loading_says_nothing_on_the_terminal(make_model: MakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(ModelSettings(str(make_model("llama"))), weights="packed")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_bf16_is_best_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda supported=supported: supported)
        assert best_precision(torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_gpus_take_bf16_from_ampere_on(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert best_precision(torch.device("cuda")) == expected
