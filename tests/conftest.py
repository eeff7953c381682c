"""Fixtures of tiny random-weight models of many architectures, written to disk like a user's model directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.manifest.job_terms import JobTerms

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads make such small models slower

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt_neox", "gpt2")
CORPUS = [
    f"turn {state} the {thing} in room {room}"
    for state in ("on", "off")
    for thing in ("lamp", "fan", "oven")
    for room in range(20)
]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,  # not a whole number of NF4 blocks
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MakeTokenizer = Callable[..., Any]
MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Gives make_tokenizer(pad_token=None, ...), which makes a byte-level BPE with the tokens <pad>, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)

    def make(**settings: Any) -> Any:
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | settings
        given = {key: value for key, value in named.items() if value is not None}
        wrap: Any = PreTrainedTokenizerFast
        return wrap(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **given)

    return make


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: MakeTokenizer) -> MakeModel:
    """Gives make_model("qwen3", hidden_size=32, ...), which writes a model of random weights and its tokenizer.

    The same arguments give the same directory, whose content no test may change.
    """
    import torch
    import transformers

    library: Any = transformers
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **settings: Any) -> Path:
        key = f"{architecture} {sorted(settings.items())}"
        if key not in made:
            library.logging.disable_progress_bar()
            tokenizer = make_tokenizer()
            config = library.CONFIG_MAPPING[architecture](**(SHAPE | {"vocab_size": len(tokenizer)} | settings))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            directory = tmp_path_factory.mktemp(architecture)
            network.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            library.logging.enable_progress_bar()
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Gives each of the architectures that fedtune is tested on."""
    return str(request.param)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives small_disk(300), which makes a file system of that many kilobytes or skips the test where it cannot."""
    mounted: list[Path] = []

    def make(kilobytes: int) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode:
            pytest.skip(f"a small file system may not be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the same random numbers in all jobs of one seed, so that only what their settings change differs.

    Otherwise jobs of different terms draw different ones, on purpose.
    """
    monkeypatch.setattr(JobTerms, "seed", property(lambda terms: terms.job.training.seed))
