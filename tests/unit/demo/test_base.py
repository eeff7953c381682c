"""The bundled base model as it is in the repository."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.demo import BASE_DIRECTORY, make_evaluation, make_households
from fedtune.demo.corpus import Document, public_call
from fedtune.demo.pretrain import build_model, build_tokenizer, evaluate, save, train

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(BASE_DIRECTORY)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BASE_DIRECTORY, dtype=torch.float32)


def test_the_base_directory_is_at_most_eight_megabytes_and_has_a_card() -> None:
    assert sum(file.stat().st_size for file in BASE_DIRECTORY.rglob("*") if file.is_file()) <= 8 * MEGABYTE
    assert (BASE_DIRECTORY / "README.md").is_file()


def test_the_base_loads_in_bfloat16_and_knows_how_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE_DIRECTORY)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_tokenizer_is_the_one_that_the_script_builds(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer(seed=0).get_vocab() == tokenizer.get_vocab()


def test_digits_are_tokens_of_their_own_and_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("4096")) == 4
    for text in ('{"call":"lights.dim","percent":40}', "küche auf 21 grad, s'il te plaît ☕"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_demo_row_is_long(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row for household in make_households(10, 0) for row in household.rows]
    longest = max(len(tokenizer.encode(row["prompt"])) + len(tokenizer.encode(row["completion"])) + 1 for row in rows)
    assert longest <= 64


def test_the_chat_template_writes_the_prompt_format(tokenizer: PreTrainedTokenizerFast) -> None:
    row = make_evaluation(1, seed=0)[0]
    request = row["prompt"].removesuffix(" =>")
    user = {"role": "user", "content": request}
    assistant = {"role": "assistant", "content": row["completion"]}
    assert tokenizer.apply_chat_template([user], tokenize=False) == row["prompt"]
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert whole == row["prompt"] + row["completion"] + tokenizer.eos_token


def test_the_base_answers_public_requests_and_almost_no_federated_ones(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random("calls that pretraining did not draw")
    public = [public_call(rng) for _ in range(100)]
    federated = [Document(row["prompt"], row["completion"]) for row in make_evaluation(240, seed=0)]
    assert evaluate(model, tokenizer, public)[1] >= 0.9
    assert evaluate(model, tokenizer, federated)[1] <= 0.05


def test_teacher_forced_exact_match_is_what_greedy_decoding_gives(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random("some right, some wrong")
    documents = [public_call(rng) for _ in range(6)] + [
        Document(row["prompt"], row["completion"]) for row in make_evaluation(6, seed=1)
    ]
    for document in documents:
        target = [*tokenizer.encode(document.completion), tokenizer.eos_token_id]
        sequence = tokenizer.encode(document.prompt)
        for _ in target:
            sequence.append(int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()))
        greedy = sequence[-len(target) :] == target
        assert bool(evaluate(model, tokenizer, [document])[1]) is greedy


def test_pretraining_gives_the_same_files_from_the_same_seed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name in ("once", "again"):
        fresh = build_model(tokenizer, seed=3)
        train(fresh, tokenizer, steps=2, seed=3)
        save(fresh, tokenizer, tmp_path / name)
    once, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("once", "again"))
    assert once == again
    assert {name for name in once if name != "README.md"} == {
        file.name for file in BASE_DIRECTORY.iterdir() if file.name != "README.md"
    }
