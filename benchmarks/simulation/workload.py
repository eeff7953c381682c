"""The workload that every contestant of this benchmark gets, so that only the way of simulating differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.demo import BASE_DIRECTORY

SEED = 0
RANK = 16
ALPHA = 32.0
LEARNING_RATE = 2e-3
EXAMPLES_PER_CLIENT = 200
BATCH_EXAMPLES = 16  # the peer counts a batch in examples
BATCH_TOKENS = 808  # fedtune counts in tokens, padding included: 16 of the demo's examples on average
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}


@dataclass(frozen=True)
class Workload:
    """A federation to simulate.

    Args:
        clients: the population.
        cohort: clients a round.
        rounds: the number of rounds; the first one, which includes the start, is not measured.
        local_steps: optimizer steps a client takes in a round.
        base: a model directory; the bundled one by default.
    """

    clients: int
    cohort: int
    rounds: int
    local_steps: int
    base: str = str(BASE_DIRECTORY)


def make_large_base(folder: Path) -> str:
    """Writes a Llama of 86 million random parameters with the bundled tokenizer, and returns its directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(BASE_DIRECTORY)
    config.update({**LARGE, "num_key_value_heads": LARGE["num_attention_heads"]})
    torch.manual_seed(SEED)
    network: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers has no type
    network.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIRECTORY).save_pretrained(folder)
    return str(folder)
