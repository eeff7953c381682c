"""Local training without torch, with the same bits on every machine, for recorded adapters.

A client pulls the adapter a tenth of the way towards a target of its own and adds noise. Only single IEEE operations on
float32 and numpy's promised random streams are used, so that a digest recorded on one processor holds on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.client.trainer import LocalResult, LocalTask, Trainer
from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Vector, factor_letters
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.round_records import Evaluation
from fedtune.core.seeds import generator
from fedtune.data.examples import Example

LAYOUT = LoraLayout((AdaptedModule("q", 24, 20), AdaptedModule("up", 20, 44), AdaptedModule("down", 44, 24)), 16, 32.0)
_SHAPES = {module.name: (module.d_out, module.d_in) for module in LAYOUT.modules}
CORE_LAYOUT = CoreLayout.between(
    LAYOUT.modules,
    16,
    32.0,
    lambda name: generator(5, "golden-weight", name).uniform(-1, 1, _SHAPES[name]).astype(np.float32),
)
DIGEST = "ab" * 32
FIRST_CLIENTS_EXAMPLES = 6


def load_examples(client: str, trainer: Trainer, sequence_length: int) -> list[Example]:
    """Returns a client's examples; later names have more."""
    del trainer, sequence_length
    count = FIRST_CLIENTS_EXAMPLES + 3 * int(client)
    return [Example(np.arange(4 + index % 5, dtype=np.int32), 2) for index in range(count)]


@dataclass(frozen=True)
class NumpyTrainer:
    """A trainer without torch."""

    layout: AdapterLayout = LAYOUT
    digest: str = DIGEST
    name: str = "golden"
    tokenizer: Any = None

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Returns the update that the task asks for: float32, zero for indices that the client does not own."""
        layout = self.layout
        segment = layout.segment(task.work.factors)
        size = segment.stop - segment.start
        target = generator(len(examples), "golden-target").uniform(-0.2, 0.2, layout.size).astype(np.float32)[segment]
        noise = generator(task.seed, "golden-noise").uniform(-0.02, 0.02, size).astype(np.float32)
        update = (target - received[segment]) * np.float32(0.125) + noise
        if task.owned is not None:
            owned = np.zeros(size, dtype=np.bool_)
            for letter in factor_letters(task.work.factors):
                start = layout.segment(letter).start - segment.start
                owned[start + layout.coordinates(letter, np.asarray(task.owned, dtype=np.intp))] = True
            update = np.where(owned, update, np.float32(0.0))
        tokens = sum(example.target_tokens for example in examples)
        return LocalResult(
            update.astype(np.float32), len(examples), tokens, 1.5, task.work.local_steps or 1, 8 * tokens, 0.0
        )

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Returns no score, since the recorded jobs hold no examples back."""
        raise NotImplementedError
