"""The prompts that a run shows of its evaluation data, in the form that the model sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import DataSettings
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.server.job_model import ModelEvaluator


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    job = load_job(None)
    return adapt(load_base(job.model), job.adapter)


def shown(model: AdaptedModel, path: Path, *rows: Any) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluator = ModelEvaluator(model, replace(DataSettings(), evaluation=str(path)))
    answers = evaluator.answer(model.layout.initial(0))
    assert len(answers) == len(evaluator.shown)
    return [each.prompt for each in evaluator.shown]


def test_a_conversation_is_shown_through_the_chat_template(model: AdaptedModel, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = model.base.tokenizer
    turns = [{"role": "user", "content": "oven on"}, {"role": "assistant", "content": "{}"}]
    expected = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert shown(model, tmp_path / "eval.jsonl", {"messages": turns}) == [expected]


def test_prompts_are_spread_over_the_file_and_plain_text_has_none(model: AdaptedModel, tmp_path: Path) -> None:
    rows = [{"prompt": f"oven {number} =>", "completion": "{}"} for number in range(30)]
    assert shown(model, tmp_path / "eval.jsonl", *rows) == ["oven 0 =>", "oven 10 =>", "oven 20 =>"]
    assert shown(model, tmp_path / "text.jsonl", {"text": "the oven is on"}) == []
