"""The tokenizer interface: the methods of transformers' tokenizers with which examples are made.

transformers' own tokenizers have them, and so has `fedtune.client.onnx.edge_tokenizer.EdgeTokenizer`, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Encodes texts, and renders conversations."""

    @property
    def chat_template(self) -> Any:
        """The template that renders conversations; None where the base has none."""

    @property
    def bos_token_id(self) -> Any:
        """The id of the token in front of a text, or None."""

    @property
    def eos_token_id(self) -> Any:
        """The id of the token that ends a text, or None."""

    def __call__(
        self, text: str | list[str], /, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Returns {"input_ids": ids}, of one text or of each text."""

    def apply_chat_template(
        self, conversation: Any, /, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> Any:
        """Returns the text of a conversation, a sequence of {"role": ..., "content": ...}, for `tokenize` false."""
