"""The prompts that a run shows of its evaluation data, in the form that the model sees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import DataError, RunError
from fedtune.core.job.job_file import load_job
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.scoring import Piece
from fedtune.server.evaluation import HeldOut, HeldOutEvaluator, in_this_process
from fedtune.server.run_rounds import ShownPrompt


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    job = load_job(None)
    return adapt(load_base(job.model), job.adapter)


def quiet(done: int, count: int) -> None:
    """Shows no progress."""


def shown(model: AdaptedModel, path: Path, *rows: Any) -> list[ShownPrompt]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = HeldOut(model, load_job(None, [f"data.evaluation={path}"]))
    evaluator = HeldOutEvaluator(held_out, in_this_process(model))
    answers = evaluator.answer(model.layout.initial(0), quiet)
    assert len(answers) == len(evaluator.shown)
    return list(evaluator.shown)


def test_of_a_conversation_people_see_the_last_message_and_the_model_what_the_template_writes(
    model: AdaptedModel, tmp_path: Path
) -> None:
    tokenizer: PreTrainedTokenizerBase = model.base.tokenizer
    system, user = {"role": "system", "content": "You are kind."}, {"role": "user", "content": "oven on"}
    expected = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    rows = {"messages": [system, user, {"role": "assistant", "content": "{}"}]}
    assert shown(model, tmp_path / "eval.jsonl", rows) == [ShownPrompt("oven on", str(expected), "{}")]


def test_prompts_are_spread_over_the_file_and_plain_text_has_none(model: AdaptedModel, tmp_path: Path) -> None:
    rows = [{"prompt": f"oven {number} =>", "completion": "{}"} for number in range(30)]
    prompts = [each.prompt for each in shown(model, tmp_path / "eval.jsonl", *rows)]
    assert prompts == ["oven 0 =>", "oven 10 =>", "oven 20 =>"]
    assert shown(model, tmp_path / "text.jsonl", {"text": "the oven is on"}) == []


def test_a_loss_that_is_no_number_ends_the_run_with_the_remedy(model: AdaptedModel) -> None:
    evaluator = HeldOutEvaluator(HeldOut(model, load_job(None)), in_this_process(model))
    nowhere = np.full(model.layout.size, 1e30, dtype=np.float32)
    with pytest.raises(RunError, match=r"no finite loss.*expected a smaller training\.learning_rate"):
        evaluator.evaluate(nowhere, quiet)


def test_pieces_that_are_done_out_of_order_give_the_same_evaluation_bit_for_bit(model: AdaptedModel) -> None:
    here, adapter = in_this_process(model), model.layout.initial(3)
    held_out = HeldOut(model, load_job(None))
    seen: list[tuple[int, int]] = []

    def backwards(adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        for index, result in here(adapter, pieces[::-1]):
            yield len(pieces) - 1 - index, result

    forwards = HeldOutEvaluator(held_out, here).evaluate(adapter, lambda done, count: seen.append((done, count)))
    assert HeldOutEvaluator(held_out, backwards).evaluate(adapter, quiet) == forwards
    pieces = len(held_out.batches)
    assert pieces > 3
    assert seen == [(done, pieces) for done in range(pieces + 1)]


@pytest.mark.parametrize("metric", ["token-f1", "rouge-l"])
def test_free_text_is_judged_by_generated_answers_spread_like_all_other_work(
    model: AdaptedModel, tmp_path: Path, metric: str
) -> None:
    rows = [{"prompt": f"turn on lamp {number} =>", "completion": " the lamp is on"} for number in range(20)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "nobody asks for this"}]))
    job = load_job(None, [f"data.evaluation={path}", f"evaluation.metric={metric}", "evaluation.answer_tokens=8"])
    held_out = HeldOut(model, job)
    here = in_this_process(model)
    computed: list[list[str]] = []

    def parrot(adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        for index, result in here(adapter, pieces):
            if index < 2:  # answers come before scores
                computed.append(result)
            yield index, [list(held_out.references[:16]), list(held_out.references[16:]), result][min(index, 2)]

    adapter = model.layout.initial(0)
    plain = HeldOutEvaluator(held_out, here).evaluate(adapter, quiet)
    right = HeldOutEvaluator(held_out, parrot).evaluate(adapter, quiet)
    assert plain is not None
    assert right is not None
    assert plain.score is not None
    assert right.score is not None
    assert plain.score < 0.9 < right.score
    assert right.metric == metric
    assert right.examples == 21
    assert (plain.loss, plain.exact_match) == (right.loss, right.exact_match)
    assert [len(answers) for answers in computed] == [16, 4]
    assert right.figures()[0][1] == "100.0%"


def test_a_metric_of_answers_needs_prompts_to_answer(model: AdaptedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the oven is on"}\n')
    job = load_job(None, [f"data.evaluation={path}", "evaluation.metric=rouge-l"])
    with pytest.raises(DataError, match=r"text\.jsonl: no example has a prompt, but evaluation\.metric is"):
        HeldOut(model, job)
