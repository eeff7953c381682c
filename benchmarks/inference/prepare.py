"""Preparation of one model for the contestants: every export, the merged model for transformers, and the prompts.

python benchmarks/inference/prepare.py demo|llama-100m FOLDER [RUN_DIR]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.core.adapter.adapter_files import save_adapter
from fedtune.core.adapter.layout import adapter_digest
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.protocol.model_manifest import FORMATS
from fedtune.demo import BASE_DIRECTORY, JOB
from fedtune.model.adapted_model import adapter_layout
from fedtune.model.base_model import load_base
from fedtune.server.export.held_out import held_out_examples
from fedtune.server.export.merge import merge, open_run, save_model
from fedtune.server.export.request import ExportOptions, ExportRequest, export
from fedtune.server.run_directory import RunDirectory
from fedtune.server.run_display import Terminal
from fedtune.server.simulation.simulate import simulate

DEMO_PROMPTS, DEMO_TOKENS = 20, 48
LLAMA_PROMPTS, LLAMA_TOKENS, LLAMA_PROMPT_TOKENS = 4, 64, 256
CHECKED = 1  # number of examples for the gate; random weights need no check
# 107 million parameters: 65 million in linear layers, 41 million in embeddings and head.
LLAMA: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 14,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Fills FOLDER/onnx, FOLDER/merged and FOLDER/prompts.json."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    with Terminal() as display:
        if model == "demo":
            run = Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "run"
            if not run.exists():
                simulate(load_job(JOB, ["export.formats=[]"]), run, display)
            options = ExportOptions()
        else:
            run = random_run(folder)
            options = ExportOptions(max_drop=100.0, max_rise=1e9)
        export(ExportRequest(run, FORMATS, folder / "onnx", options), display)
    finished = open_run(run)
    examples = held_out_examples(finished, None)
    merge(finished)
    save_model(finished.base, folder / "merged")
    if model == "demo":
        prompts = [example.ids[: example.first_target].tolist() for example in examples[:DEMO_PROMPTS]]
        tokens = DEMO_TOKENS
    else:
        random = np.random.default_rng(0)
        prompts = random.integers(2, LLAMA["vocab_size"], (LLAMA_PROMPTS, LLAMA_PROMPT_TOKENS)).tolist()
        tokens = LLAMA_TOKENS
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "tokens": tokens}))


def random_run(folder: Path) -> Path:
    """Makes a run that looks finished: a Llama with random weights and a random adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    network: Any = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=torch.float32)  # type: ignore[no-untyped-call]
    network.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(BASE_DIRECTORY).save_pretrained(folder / "base")
    data = folder / "eval.jsonl"
    rows = [{"prompt": f"turn on lamp {number} =>", "completion": " on"} for number in range(CHECKED)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: Job = load_job(None, [f'model.base="{folder / "base"}"', f'data.evaluation="{data}"'])
    base = load_base(job.model, weights="dequantized", precision="fp32", device="cpu")
    layout = adapter_layout(base, job.adapter)
    vector = (np.random.default_rng(0).standard_normal(layout.size) * 0.01).astype(np.float32)
    directory = RunDirectory.create(folder / "run", job, base.digest)
    save_adapter(directory.path / "adapter", layout, vector, job.model.base)
    digests = {"base_digest": base.digest, "adapter_digest": adapter_digest(vector)}
    directory.write_summary({"status": "finished", "rounds": 1, "clients": 1, **digests})
    directory.close()
    return directory.path


if __name__ == "__main__":
    main()
