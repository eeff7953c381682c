"""MODEL_CARD.md: what an exported model is, in words and one table, for whoever finds the directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.server.export.gate import GateReport

_PLACES = {
    "model": "The adapter was merged\ninto those quantized values, the ones it was trained against.",
    "adapter-base": (
        "The weights are those\nquantized values; adapters come in files of their own. Figures are with this one."
    ),
}


def model_card(kind: str, name: str, form: str, provenance: Mapping[str, Any], report: GateReport) -> str:
    """The card's text."""
    license_line = provenance["base_license"]
    stated = "its directory states no licence" if license_line == "not stated" else f"licence {license_line}"
    return f"""---
library_name: onnxruntime-genai
pipeline_tag: text-generation
license: {"other" if license_line == "not stated" else license_line}
---

# {name}

A language model fine-tuned by federated learning, exported to ONNX with a KV cache: {form} ({provenance["recipe"]}).
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

The base digest names the base's original weights and how they were quantized for training. {_PLACES[kind]}

## Measured before it was released

On {report.prompts} held-out examples ({report.positions:,} positions), against the merged model in torch, float32:

| | merged model | this export |
|---|---|---|
| exact match | {report.reference_exact_match:.1%} | {report.exact_match:.1%} |
| token accuracy | {report.reference_token_accuracy:.2%} | {report.token_accuracy:.2%} |
| argmax agreement | | {report.argmax_agreement:.3%} |
| max logit error | | {report.max_logit_error:.3g} |
| answers generated alike | | {report.generated_equal:.0%} |
| size of the weights | | {report.bytes:,} bytes |
| prefill, decode | | {report.prefill_tokens_per_second:,.0f}, {report.decode_tokens_per_second:,.0f} tokens/s |

Speeds are of one stream on the machine that exported it.

## What to know before using it

It answers what its clients taught it, in their words, and is no better than their examples. It was checked on the run's
own held-out examples and on nothing else: not for safety, bias or truth.

`fedtune.json` lists the SHA-256 of every file; `fedtune serve` refuses the directory when one differs.
"""
