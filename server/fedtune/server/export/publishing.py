"""The last steps of an export: a card for people, a manifest for programs, and the directory's final name.

MODEL_CARD.md describes the model in words and one table for whoever finds the directory; fedtune.json has the SHA-256
of every file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import ModelError
from fedtune.core.host.private_files import sync_directory
from fedtune.core.protocol.model_manifest import ADAPTER_SUFFIX, CARD, MANIFEST, Manifest, list_files
from fedtune.data.examples import start_tokens
from fedtune.server.export import adapters
from fedtune.server.export.gate import GateReport
from fedtune.server.export.merge import FinishedRun
from fedtune.server.privacy_statement import guarantee
from fedtune.server.run_files import sync_tree, write_json, write_text

NO_GUARANTEE = "It was trained without differential privacy: it may tell about single examples of its clients."
_NEEDED = ("tokenizer.json", "genai_config.json", "model.onnx")
_PLACES = {
    "model": "The adapter was merged\ninto those quantized values, the ones it was trained against.",
    "beside": "The adapter's\nfactors are beside those quantized values, the ones it was trained against, in float32.",
    "adapter-base": (
        "The weights are those\nquantized values; adapters come in files of their own. Figures are with this one."
    ),
}


@dataclass(frozen=True)
class Description:
    """The statements that an exported directory makes about itself.

    Args:
        kind: "model", or "adapter-base" for a base into which adapters are loaded.
        name: the model's name in requests.
        format: "int4", ...
        provenance: the model's origin, and how it was written.
    """

    kind: str
    name: str
    format: str
    provenance: Mapping[str, Any]


def describe_model(directory: Path, run: FinishedRun, description: Description, report: GateReport) -> None:
    """Adds the card and the manifest to a written model.

    Raises:
        ModelError: the tokenizer cannot be saved as the single file that devices read.
    """
    for needed in _NEEDED:
        if not (directory / needed).is_file():
            raise ModelError(f"{run.job.model.base}: the export has no {needed}; expected a tokenizer that saves one")
    write_text(directory / CARD, _card(description, report))
    manifest = Manifest(
        kind=description.kind,
        name=description.name,
        format=description.format,
        provenance={**description.provenance, "gate": report.to_json()},
        files=list_files(directory),
        start_tokens=tuple(start_tokens(run.base.tokenizer)),
        context=int(run.base.network.config.max_position_embeddings),
    )
    write_json(directory / MANIFEST, manifest.to_json())


def publish(directory: Path, target: Path) -> None:
    """Syncs a finished directory and moves it to its final name; an older one of that name is replaced."""
    sync_tree(directory)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    directory.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_adapter(file: Path, target: Path, run: FinishedRun, form: str, report: GateReport) -> None:
    """Moves an adapter to its final name, with a JSON file beside it that names its base."""
    provenance = dict(run.provenance) | {"modules": adapters.modules(run.layout), "gate": report.to_json()}
    files = {target.name: list_files(file.parent)[file.name]}
    manifest = Manifest("adapter", target.name.removesuffix(ADAPTER_SUFFIX), form, provenance, files)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.replace(target)
    write_json(target.with_suffix(".json"), manifest.to_json())


def _card(description: Description, report: GateReport) -> str:
    """Returns the text of MODEL_CARD.md."""
    provenance = description.provenance
    license_line = provenance["base_license"]
    place = "beside" if description.kind == "model" and provenance["beside"] else description.kind
    form = f"{description.format} ({provenance['recipe']})"
    stated = "its directory states no licence" if license_line == "not stated" else f"licence {license_line}"
    return f"""---
library_name: onnxruntime-genai
pipeline_tag: text-generation
license: {"other" if license_line == "not stated" else license_line}
---

# {description.name}

A language model fine-tuned by federated learning, exported to ONNX with a KV cache: {form}.
`fedtune serve` and `fedtune chat` run this directory without torch; `onnxruntime` and `onnxruntime_genai` load it.

## Where it comes from

| | |
|---|---|
| base | {provenance["base"]}, {stated}; this model is a derivative of it |
| base digest | `{provenance["base_digest"]}` ({provenance["quantization"]}) |
| adapter digest | `{provenance["adapter_digest"]}`, rank {provenance["rank"]} |
| trained in | {provenance["rounds"]} rounds with {provenance["clients"]} clients, whose examples stayed with them |
| job | SHA-256 `{provenance["job_sha256"]}` |
| written by | fedtune {provenance["versions"]["fedtune"]} with {provenance["writer"]} for {provenance["provider"]} |

The base digest names the base's original weights and how they were quantized for training. {_PLACES[place]}

{guarantee(provenance["privacy"]) if provenance["privacy"] else NO_GUARANTEE}

## Measured before it was released

On {report.prompts} held-out examples ({report.positions:,} positions), against the merged model in torch, float32:

| | merged model | this export |
|---|---|---|
| exact match | {report.reference_exact_match:.1%} | {report.exact_match:.1%} |
| token accuracy | {report.reference_token_accuracy:.2%} | {report.token_accuracy:.2%} |
| perplexity of completions | {report.reference_perplexity:.4g} | {report.perplexity:.4g} |
| perplexity of all tokens | {report.reference_text_perplexity:.4g} | {report.text_perplexity:.4g} |
| argmax agreement | | {report.argmax_agreement:.3%} |
| max logit error | | {report.max_logit_error:.3g} |
| answers generated alike | | {report.generated_equal:.0%} |
| size of the weights | | {report.bytes:,} bytes |
| prefill, decode | | {report.prefill_tokens_per_second:,.0f}, {report.decode_tokens_per_second:,.0f} tokens/s |

Speeds are of one stream on the machine that exported it.
{_remarks(provenance)}
## What to know before using it

It answers what its clients taught it, in their words, and is no better than their examples. It was checked on the run's
own held-out examples and on nothing else: not for safety, bias or truth.

`fedtune.json` lists the SHA-256 of every file; `fedtune serve` refuses the directory when one differs.
"""


def _remarks(provenance: Mapping[str, Any]) -> str:
    """Returns a paragraph for each remark that the export made."""
    return "".join(f"\n{remark}.\n" for remark in provenance["remarks"])
