"""The tokenizer of an edge pack, with those methods of transformers' tokenizers that prepare examples.

examples, report = prepare(records, EdgeTokenizer(directory, facts), sequence_length=256)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from fedtune.core.errors import ModelError
from fedtune.data.chat_template import read_chat_template
from fedtune.edge.pack_facts import REMEDY, TOKENIZER, PackFacts


class EdgeTokenizer:
    """Encodes texts, and renders conversations.

    Args:
        directory: the pack's, with a `tokenizer.json`.
        facts: the pack's.

    Raises:
        ModelError: the tokenizer cannot be read.

    Attributes:
        chat_template: the template that renders conversations; None where the base has none.
        bos_token_id: the token in front of a text; None where the tokenizer puts none there.
        eos_token_id: the token that ends a text.
    """

    def __init__(self, directory: Path, facts: PackFacts) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
        except Exception as error:  # the library's errors are of this type itself
            raise ModelError(f"{directory / TOKENIZER}: not a tokenizer: {error}; {REMEDY}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.chat_template = read_chat_template(directory)
        start = facts.start_tokens
        self.bos_token_id = start[0] if start else None
        self.eos_token_id = facts.end_token

    def __call__(
        self, texts: str | list[str], /, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, list[int] | list[list[int]]]:
        """Returns {"input_ids": ids}, of one text or of each text."""
        del verbose  # of transformers' warnings about long texts
        if isinstance(texts, str):
            return {"input_ids": self._tokenizer.encode(texts, add_special_tokens=add_special_tokens).ids}
        found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in found]}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], /, *, tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation.

        Raises:
            ValueError: tokens are wanted, or there is no template.
        """
        if tokenize or self.chat_template is None:
            raise ValueError("expected a tokenizer with a chat template, and text as its result")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
