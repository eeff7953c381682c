"""The merged model: a run's adapter added to the same base values that it was trained against.

    W' = Ŵ + s · B · A          Ŵ: the base's weight after quantization and back, in float32; s = alpha / sqrt(R)

Merging into the original weights would give a model that was neither trained nor evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedtune.core.adapter.adapter_files import load_adapter
from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import Job
from fedtune.model.adapted_model import adapter_layout
from fedtune.model.base_model import BaseModel, load_base, quiet
from fedtune.server.export.request import read_finished
from fedtune.server.run_directory import ADAPTER, JOB, read_rounds


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run with an adapter, and the reference base that the adapter belongs to.

    Args:
        base: the base model in float32 on the CPU, not merged yet.
        provenance: the entry of the export's manifest about the model's origin.
    """

    path: Path
    job: Job
    base: BaseModel
    layout: AdapterLayout
    adapter: Vector
    provenance: Mapping[str, Any]


def open_run(path: Path) -> FinishedRun:
    """Loads a run's base and adapter, and checks both against the digests that the run recorded.

    Raises:
        RunDirectoryError, ExportError: see `read_finished`.
        ModelError: the base model or the adapter is not the one of the run.
    """
    job, summary = read_finished(path)
    base = load_base(job.model, weights="dequantized", precision="fp32", device="cpu")
    if base.digest != summary["base_digest"]:
        raise ModelError(
            f"{job.model.base}: not the base model of this run: digest {base.digest[:12]}…, "
            f"expected {summary['base_digest'][:12]}…"
        )
    layout = adapter_layout(base, job.adapter)
    adapter = load_adapter(path / ADAPTER, layout)
    digest = adapter_digest(adapter)
    if digest != summary["adapter_digest"]:
        raise ModelError(
            f"{path / ADAPTER}: not the adapter that the run wrote: digest {digest[:12]}…, "
            f"expected {summary['adapter_digest'][:12]}…"
        )
    clients = {client["id"] for line in read_rounds(path) for client in line["clients"] if not client["dropped"]}
    provenance = {
        "base": job.model.base,
        "base_digest": base.digest,
        "base_license": base_license(base),
        "quantization": job.model.quantization,
        "adapter_digest": digest,
        "rank": layout.rank,
        "job_sha256": hashlib.sha256((path / JOB).read_bytes()).hexdigest(),
        "rounds": summary["rounds"],
        "clients": len(clients) or summary["clients"],
        "privacy": summary.get("privacy"),
    }
    return FinishedRun(path, job, base, layout, adapter, provenance)


def merge(run: FinishedRun) -> None:
    """Adds the adapter to the run's base in place; it must be called once only."""
    with torch.no_grad():
        for name, (lora_a, lora_b) in run.layout.pairs(run.adapter).items():
            weight = run.base.network.get_submodule(name).weight
            product = torch.from_numpy(lora_b) @ torch.from_numpy(lora_a)
            weight.add_(product.to(weight.device), alpha=run.layout.scaling)


def save_model(base: BaseModel, directory: Path) -> None:
    """Writes the network and the tokenizer as a directory that transformers' `from_pretrained` loads."""
    with quiet():
        base.network.save_pretrained(directory, state_dict=_original_names(base))
        base.tokenizer.save_pretrained(directory)


def base_license(base: BaseModel) -> str:
    """Returns the licence in the front matter of the base's model card; "not stated" if there is none."""
    card = Path(base.network.config._name_or_path) / "README.md"
    try:
        head = card.read_text(encoding="utf-8").partition("\n---")[0]
    except (OSError, UnicodeDecodeError):
        return "not stated"
    for line in head.splitlines()[1:]:
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip()
    return "not stated"


def _original_names(base: BaseModel) -> dict[str, torch.Tensor]:
    """Returns the state dict as the architecture stores it; GPT-2 and similar ones store their matrices transposed."""
    state = dict(base.network.state_dict())
    with torch.device("meta"):
        blank: nn.Module = AutoModelForCausalLM.from_config(base.network.config)  # type: ignore[no-untyped-call]
    for name, module in blank.named_modules():
        if isinstance(module, Conv1D):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    return state
