"""Cleaning, tokenising and holding out of examples, with counts of kept and dropped records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fedtune.core.errors import DataError, ModelError
from fedtune.data.examples import CleaningReport, Example, hold_out, load_examples, prepare, render
from fedtune.data.records import Message, Record

Tokenizer = Any
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = 2


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer()


def decoded(tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    first = example.first_target
    return tokenizer.decode(example.ids[:first]), tokenizer.decode(example.ids[first:])


def test_prompt_and_completion_are_joined_and_ended_and_only_the_completion_counts(tokenizer: Tokenizer) -> None:
    [example], report = prepare([Record(" on it", prompt="turn on")], tokenizer, 64)
    assert decoded(tokenizer, example) == ("turn on", " on it</s>")
    assert example.ids.tolist() == [*tokenizer("turn on")["input_ids"], *tokenizer(" on it")["input_ids"], END]
    assert report == CleaningReport(read=1, kept=1)


def test_a_tokenizer_that_starts_texts_starts_examples(make_tokenizer: Callable[..., Tokenizer]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    [example], _ = prepare([Record("on", prompt="turn")], tokenizer, 64)
    assert decoded(tokenizer, example) == ("<s>turn", "on</s>")
    [text], _ = prepare([Record("turn on")], tokenizer, 64)
    assert decoded(tokenizer, text) == ("<s>", "turn on</s>")
    [cut], _ = prepare([Record("on", prompt="turn on the lamp in room 7")], tokenizer, 8)
    assert cut.ids[0] == 1
    assert len(cut.ids) == 8


def test_plain_text_counts_from_its_second_token(tokenizer: Tokenizer) -> None:
    [example], _ = prepare([Record("turn on the lamp")], tokenizer, 64)
    assert example.first_target == 1
    assert decoded(tokenizer, example)[1].endswith("lamp</s>")


def test_a_conversation_goes_through_the_chat_template(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    turns = (Message("user", "hi"), Message("assistant", "ho"), Message("user", "turn on"))
    [example], _ = prepare([Record("done", messages=turns)], tokenizer, 64)
    prompt, completion = decoded(tokenizer, example)
    assert prompt == "<|user|>hi<|assistant|>ho</s>\n<|user|>turn on<|assistant|>"
    assert completion == "done</s>"


def test_conversations_need_a_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = Record("done", messages=(Message("user", "hi"),))
    with pytest.raises(ModelError, match="no chat template"):
        prepare([record], tokenizer, 64)
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"chat\.jsonl: .*no chat template"):
        load_examples(path, tokenizer, 64)


def test_a_chat_template_that_refuses_says_so(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no system messages') }}")
    with pytest.raises(ModelError, match="no system messages"):
        render([Record("x", messages=(Message("system", "y"),))], tokenizer)


def test_text_is_normalised_before_duplicates_are_dropped(tokenizer: Tokenizer) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    examples, report = prepare([Record("x", prompt=composed), Record("x", prompt=decomposed)], tokenizer, 64)
    assert tokenizer.decode(examples[0].ids).startswith(composed)
    assert report == CleaningReport(read=2, duplicate=1, kept=1)


def test_nothing_to_learn_is_dropped(tokenizer: Tokenizer) -> None:
    _, report = prepare([Record("  \n", prompt="turn on"), Record("")], tokenizer, 64)
    assert report == CleaningReport(read=2, empty=2)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_drops_its_example(tokenizer: Tokenizer) -> None:
    record = Record(" on the lamp", prompt="turn on the lamp in room 7 and turn")
    [whole], _ = prepare([record], tokenizer, 64)
    [cut], report = prepare([record], tokenizer, len(whole.ids) - 3)
    assert report == CleaningReport(read=1, truncated=1, kept=1)
    assert cut.ids.tolist() == whole.ids.tolist()[3:]
    assert cut.target_tokens == whole.target_tokens
    none, report = prepare([record], tokenizer, whole.target_tokens)
    assert (none, report) == ([], CleaningReport(read=1, too_long=1))


def test_a_long_text_is_cut_into_examples_that_lose_nothing(tokenizer: Tokenizer) -> None:
    text = "turn on the lamp in room 7 " * 9
    examples, report = prepare([Record(text)], tokenizer, 16)
    targets = [token for example in examples for token in example.ids[example.first_target :]]
    assert [examples[0].ids[0], *targets] == [*tokenizer(text)["input_ids"], END]
    assert report == CleaningReport(read=1, continued=len(examples) - 1, kept=len(examples))
    assert {example.first_target for example in examples} == {1}


def test_the_end_of_a_text_is_learned_wherever_it_is_cut(tokenizer: Tokenizer) -> None:
    for length in range(8, 20):
        examples, _ = prepare([Record("7" * 16)], tokenizer, length)
        targets = [token for example in examples for token in example.ids[example.first_target :].tolist()]
        assert len(targets) == 16  # all but the first token, and the end
        assert (examples[-1].ids[-1], targets.count(END)) == (END, 1)


def test_a_completion_ends_at_its_first_end(tokenizer: Tokenizer) -> None:
    [example], _ = prepare([Record(" on</s> and on", prompt="turn")], tokenizer, 64)
    assert decoded(tokenizer, example) == ("turn", " on</s>")
    assert prepare([Record("</s>")], tokenizer, 64) == ([], CleaningReport(read=1, empty=1))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(8, 40))
def test_every_example_fits_and_every_record_is_counted(tokenizer: Tokenizer, data: st.DataObject, length: int) -> None:
    text = st.text(alphabet="onlamp 7\u00e9\u0301", max_size=60)
    records = [Record(c, prompt=p) for c, p in data.draw(st.lists(st.tuples(text, text), max_size=12))]
    examples, report = prepare(records, tokenizer, length)
    assert (
        report.read
        == len(records)
        == report.empty + report.duplicate + report.too_long + report.kept - report.continued
    )
    for example in examples:
        assert 2 <= len(example.ids) <= length
        assert 1 <= example.first_target < len(example.ids)
        assert END not in example.ids[:-1]
    assert sum(example.ids[-1] == END for example in examples) >= report.kept - report.continued


def test_a_file_without_a_usable_example_says_what_became_of_its_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    long = "turn on the lamp in room 7 please"
    path.write_text(f'{{"text": ""}}\n{{"prompt": "a", "completion": "{long}"}}\nbroken\n')
    with pytest.raises(DataError, match=r"no usable example \(3 read, 1 bad, 1 empty, 1 too long\); at most 8 tokens"):
        load_examples(path, tokenizer, 8, skip_bad=True)


def test_reports_add_up() -> None:
    assert str(CleaningReport(read=2, kept=1) + CleaningReport(read=1, too_long=1)) == "3 read, 1 too long, 1 kept"


@given(count=st.integers(0, 40), share=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_holding_out_loses_no_example_and_leaves_one_to_train_on(count: int, share: float, seed: int) -> None:
    import numpy as np

    examples = [Example(np.array([index, END], dtype=np.int32), 1) for index in range(count)]
    training, held = hold_out(examples, share, seed)
    assert sorted([*training, *held], key=lambda example: int(example.ids[0])) == examples
    assert len(training) >= min(1, count)
    assert bool(held) == (share > 0 and count > 1)
    assert [id(example) for example in hold_out(examples, share, seed)[1]] == [id(example) for example in held]
