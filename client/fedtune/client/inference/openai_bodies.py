"""OpenAI's request and response bodies, as far as a text model can honour them; others are refused, not ignored.

A refusal is {"error": {"message", "type", "param", "code"}}, which OpenAI's own clients turn into exceptions.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.client.inference.exported_model import Sampling

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 512
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chats may fill the context
Body = TypeVar("Body", bound=BaseModel)
# Characters at which Python clients split lines, beside the control characters that JSON escapes anyway.
_LINE_ENDS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}
_Text = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]

# Features that change an answer, and the values that leave them off.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),  # this and the next ones are not OpenAI's, but other servers have them
    "top_k": (-1, 0),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class ApiError(Exception):
    """A refusal, with its HTTP status.

    Args:
        kind: OpenAI's type, e.g. "invalid_request_error".
        param: the invalid field.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        """Returns the refusal as a JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: _Text


class ChatMessage(BaseModel):
    """One turn of a conversation; its content may have several parts, all of them text."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[_Part], Field(max_length=MAX_MESSAGES)]

    def turn(self) -> dict[str, str]:
        """Returns the turn as a chat template expects it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(BaseModel):
    """The options of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """Returns the sampling settings; OpenAI's default temperature is 1."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % (1 << 31),
            stop=stop,
        )


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(_Request):
    """POST /v1/completions; one prompt, as text or as tokens."""

    prompt: (
        _Text
        | Annotated[list[int], Field(min_length=1, max_length=MAX_BODY_BYTES)]
        | Annotated[list[_Text], Field(min_length=1, max_length=1)]
    )


class AdapterRequest(BaseModel):
    """POST /v1/adapters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(min_length=1, max_length=256)]


def parse(kind: type[Body], body: bytes) -> Body:
    """Reads a request's body.

    Raises:
        ApiError: 400; the message names the field and what was expected.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"][:3] if not str(part).startswith("constrained"))
        raise ApiError(400, f"{place or 'body'}: {detail['msg']}", param=place or None) from None
    for name, value in (request.model_extra or {}).items():
        if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
            raise ApiError(400, f"{name}: not supported by this server", param=name, code="unsupported_parameter")
    return request


class Answer:
    """Makes the bodies of one answer: whole, or as the chunks of a stream."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self._model, self._chat, self._prompt_tokens = model, chat, prompt_tokens
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, finish: str, tokens: int) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, [choice]) | {"usage": self.usage(tokens)}

    def opening(self) -> dict[str, Any] | None:
        """Returns a chat's first chunk, which names the role."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        """Returns one chunk of a stream."""
        return self._chunk({"content": text} if text else {}, finish) if self._chat else self._chunk(text, finish)

    def closing(self, tokens: int) -> dict[str, Any]:
        """Returns the chunk with the token counts, where requested."""
        return self._body(self._kind, []) | {"usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        """Returns the token counts of prompt and answer."""
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, content: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish, "logprobs": None}
        return self._body(self._kind, [choice | {"delta" if self._chat else "text": content}])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def event(body: Mapping[str, Any]) -> bytes:
    """Encodes one server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).translate(_LINE_ENDS).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
