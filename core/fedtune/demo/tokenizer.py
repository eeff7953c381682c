"""The base model's tokenizer: byte-level BPE learnt from the pretraining corpus."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedtune.demo import vocabulary as words
from fedtune.demo.corpus import draw_document
from fedtune.demo.skills import SEPARATOR

VOCABULARY = 1_792
CONTEXT = 256
"""Longest sequence, in tokens; a demo request with its call takes at most 64."""
DOCUMENTS = 40_000
WORD_REPEATS = 300
"""How often the trainer sees each known word alone, so that it becomes one token with and without a space."""
EOS = "</s>"
PAD = "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['content'].endswith('" + SEPARATOR + "') %}{{ message['content'] }}"
    "{% else %}{{ message['content'] + '" + SEPARATOR + "' }}{% endif %}{% endfor %}"
)
"""A user's turn becomes a prompt (`skills.format_prompt`), an assistant's turn a completion with its end."""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the corpus: every digit is a token of its own, a word carries the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"{seed}/tokenizer")
    documents = (draw_document(rng) for _ in range(DOCUMENTS))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for document in documents for text in (document.prompt, document.completion)]
    known_words = [form for word in words.NOUNS + words.HOUSE_WORDS for form in (word, f" {word}")]
    tokenizer.train_from_iterator(texts + known_words * WORD_REPEATS, trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT, padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
