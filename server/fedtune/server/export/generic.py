"""ONNX export by `torch.onnx`, cache included, of architectures that onnxruntime-genai's builder does not know.

The graph has the same names and shapes as the builder's graphs, so onnxruntime-genai runs it as a plain decoder:

    input_ids, attention_mask, position_ids, past_key_values.N.key|value -> logits, present.N.key|value
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

OPSET = 20
_EXAMPLE = (2, 3, 5)  # batch, tokens and past of the traced call; tracing would treat 0 and 1 as constants


class CachedDecoder(nn.Module):
    """A causal LM whose cache is passed in and out as plain tensors of shape (batch, heads, past, head size)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.layers = int(network.config.num_hidden_layers)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns logits (batch, tokens, vocabulary), then each layer's keys and values."""
        cache = DynamicCache([(past[2 * layer], past[2 * layer + 1]) for layer in range(self.layers)])
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
        return (output.logits, *present)


def build(source: str, out: str) -> None:
    """Writes model.onnx with its weights, genai_config.json and the tokenizer into a new directory.

    Args:
        source: a transformers directory of float32 weights.
    """
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
    directory = Path(out)
    directory.mkdir(parents=True)
    model = _export(network.eval())
    _write_products_as_matmul(model)
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    (directory / "genai_config.json").write_text(json.dumps(_genai_config(network, tokenizer), indent=4) + "\n")
    tokenizer.save_pretrained(directory)


def _export(network: Any) -> onnx.ModelProto:
    decoder = CachedDecoder(network).eval()
    heads, head_size = _cache_shape(network)
    batch, tokens, past = _EXAMPLE
    cache = [torch.zeros(batch, heads, past, head_size) for _ in range(2 * decoder.layers)]
    arguments = (
        torch.ones(batch, tokens, dtype=torch.int64),
        torch.ones(batch, past + tokens, dtype=torch.int64),
        torch.arange(past, past + tokens)[None].expand(batch, tokens).contiguous(),
        *cache,
    )
    free = Dim.DYNAMIC
    shapes = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, tuple({0: free, 2: free} for _ in cache))
    parts = [f"{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)],
            output_names=["logits", *(f"present.{part}" for part in parts)],
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return program.model_proto


def _write_products_as_matmul(model: onnx.ModelProto) -> None:
    """Replaces Gemm(x, W) without bias and factors (GPT-2) by MatMul(x, W), the only product that is quantized."""
    for node in model.graph.node:
        given = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
        plain = not (given.get("transA") or given.get("transB")) and given.get("alpha", 1.0) == 1.0
        if node.op_type == "Gemm" and len(node.input) == 2 and plain:
            node.op_type = "MatMul"
            del node.attribute[:]


@torch.no_grad()
def _cache_shape(network: Any) -> tuple[int, int]:
    """Returns the number of key-value heads and their size, from a call since configurations name them differently."""
    layers = network(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values.layers
    shapes = {tuple(layer.keys.shape) for layer in layers} | {tuple(layer.values.shape) for layer in layers}
    if len(shapes) != 1:
        raise RuntimeError(f"keys and values have several shapes: {sorted(shapes)}")
    _, heads, _, size = shapes.pop()
    return int(heads), int(size)


def _genai_config(network: Any, tokenizer: Any) -> dict[str, Any]:
    config = network.config
    heads, head_size = _cache_shape(network)
    end = network.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
            "eos_token_id": end,
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False},
    }
