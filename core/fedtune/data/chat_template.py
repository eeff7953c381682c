"""A tokenizer's chat template, rendered as transformers does, without transformers.

template = read_chat_template(directory)
text = template.render([{"role": "user", "content": "water the lavender"}], add_generation_prompt=True)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedtune.core.errors import ModelError

TEMPLATE = "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template, with the special tokens that it may write."""

    template: jinja2.Template
    special: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Returns the text of a conversation; a template is code of the model's author and may raise any exception."""
        return self.template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
        )


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """Reads the template of a tokenizer directory; None where it has none.

    Raises:
        ModelError: it is not a template.
    """
    file = directory / TEMPLATE
    config: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None
    special = {}
    for key in _SPECIAL:
        token = config.get(key)
        special[key] = str(token["content"] if isinstance(token, dict) else token or "")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return ChatTemplate(environment.from_string(source), special)
    except jinja2.TemplateError as error:
        raise ModelError(f"{directory}: its chat template is not a template: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
