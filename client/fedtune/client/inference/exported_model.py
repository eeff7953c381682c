"""An exported model in memory, with its tokenizer, chat template and adapters; every file is checked first.

model = ExportedModel(Path("runs/first/onnx/int4"))
ids = model.encode_chat([{"role": "user", "content": "water the lavender"}])
generator = model.generator(ids, Sampling(max_tokens=64))
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # type: ignore[import-untyped]
from tokenizers import Tokenizer

from fedtune.core.errors import ExportError, InputError
from fedtune.core.protocol.model_manifest import ADAPTER_SUFFIX, MAX_MANIFEST_BYTES, digest_file, parse_manifest, verify
from fedtune.core.text import nfc
from fedtune.data.chat_template import read_chat_template

MAX_ADAPTERS = 64
_LOADED = ("library", "lib_path", "backend_path")  # keys of onnxruntime-genai and execution providers contain these


class PromptError(InputError):
    """A prompt cannot be answered: too long, or a conversation that the template refuses."""


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of an answer.

    Args:
        max_tokens: number of tokens after which the answer is cut.
        temperature: 0 takes the likeliest token.
        top_p: cumulative probability of the tokens to draw from.
        seed: equal seeds give equal answers; None uses a new seed each time.
        stop: strings before which the answer ends.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(eq=False)
class Adapter:
    """A loaded adapter; `users` counts the streams that use it, and it leaves memory after the last of them."""

    name: str
    key: str
    sha256: str
    users: int = 0
    retired: bool = False


class ExportedModel:
    """Loads a directory that `fedtune export` wrote.

    Args:
        directory: exported directory; every file in it is first checked against the manifest.
        name: name of the model; by default the manifest's.
        adapters: folder of `.onnx_adapter` files that may be loaded by name, for an exported base.
        threads: threads for one token; by default onnxruntime's choice, the physical cores.

    Raises:
        ExportError: it is not an exported directory, or a file was changed; the message names it.
    """

    def __init__(
        self, directory: Path, name: str | None = None, adapters: Path | None = None, threads: int | None = None
    ) -> None:
        if directory.is_symlink():
            directory = directory.resolve()  # a link may move to another version while files are read
        self.manifest = verify(directory)
        if self.manifest.kind not in ("model", "adapter-base"):
            raise ExportError(f"{directory}: holds {self.manifest.kind}; expected a model")
        self.name = name or self.manifest.name
        self._folder = adapters
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            whole = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
            _refuse_libraries(whole, directory / "genai_config.json")
            config = whole["model"]
            self._model = onnxruntime_genai.Model(_engine(directory, threads))
            ends = config["eos_token_id"]
            self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
            self.context = int(config["context_length"])
            self._vocabulary = int(config["vocab_size"])
            self._template = read_chat_template(directory)
        except ExportError:
            raise
        except Exception as error:  # tokenizers and onnxruntime may raise any exception
            reason = str(error).strip() or type(error).__name__
            raise ExportError(f"{directory}: cannot be loaded: {reason.splitlines()[0]}") from error
        self._pool: Any = onnxruntime_genai.Adapters(self._model) if adapters is not None else None
        self._adapters: dict[str, Adapter] = {}
        self._loads = 0
        self._lock = threading.Lock()

    @property
    def adapters(self) -> dict[str, str]:
        """The names of the loaded adapters, each with the SHA-256 digest of its file."""
        with self._lock:
            return {name: adapter.sha256 for name, adapter in sorted(self._adapters.items())}

    def encode(self, text: str) -> list[int]:
        """Encodes a prompt as in training: in NFC, after the start tokens."""
        ids: list[int] = self._tokenizer.encode(nfc(text), add_special_tokens=False).ids
        start = list(self.manifest.start_tokens)
        return ids if start and ids[: len(start)] == start else start + ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes a conversation as the model's chat template renders it.

        Raises:
            PromptError: there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise PromptError(f"{self.name} has no chat template; use /v1/completions")
        turns = [{**turn, "content": nfc(turn["content"])} for turn in messages]
        try:
            text = self._template.render(turns, add_generation_prompt=True)
        except Exception as error:  # a template is code of the model's author and may raise any exception
            raise PromptError(f"the chat template refuses the conversation: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Decodes tokens to text, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def check_prompt(self, ids: Sequence[int], max_tokens: int | None = None) -> int:
        """Returns the number of tokens that may follow a prompt.

        Raises:
            PromptError: it is empty, has unknown tokens, or is too long for the context.
        """
        if not ids:
            raise PromptError("the prompt is empty; expected at least one token")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise PromptError(f"the prompt has a token outside 0 to {self._vocabulary - 1}")
        room = self.context - len(ids)
        if room < (max_tokens or 1):
            asked = f" and max_tokens {max_tokens:,}" if max_tokens else ""
            raise PromptError(
                f"the prompt has {len(ids):,} tokens{asked}; the model's context is {self.context:,} for both together"
            )
        return max_tokens or room

    def generator(self, prompt_tokens: int, sampling: Sampling, adapter: Adapter | None = None) -> Any:
        """Returns an onnxruntime-genai generator without a prompt; `read` feeds it."""
        params = onnxruntime_genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": prompt_tokens + sampling.max_tokens, "do_sample": False}
        if sampling.temperature > 0:
            options |= {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": self._vocabulary,
            }
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed
        params.set_search_options(**options)
        generator = onnxruntime_genai.Generator(self._model, params)
        if adapter is not None:
            generator.set_active_adapter(self._pool, adapter.key)
        return generator

    def load_adapter(self, name: str) -> None:
        """Loads NAME.onnx_adapter, or replaces it by its newer file; streams that use the old one finish with it.

        Raises:
            ExportError: there is no such file, its description does not fit, or it belongs to another base.
        """
        path = self._adapter_path(name)
        try:
            described = path.with_suffix(".json").read_bytes()[: MAX_MANIFEST_BYTES + 1]
            entry = digest_file(path)
        except OSError as error:
            raise ExportError(
                f"adapter {name}: cannot be read: {error.strerror}; expected {path.name} and {name}.json"
            ) from error
        manifest = parse_manifest(described, f"adapter {name}")
        if manifest.kind != "adapter" or manifest.files.get(path.name) != entry:
            raise ExportError(f"adapter {name}: {path.name} was changed after the export")
        for key in ("base_digest", "modules"):
            if manifest.provenance.get(key) != self.manifest.provenance.get(key):
                raise ExportError(f"adapter {name}: belongs to another base model or layout ({key} differs)")
        with self._lock:
            if name not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
                raise ExportError(f"adapter {name}: {MAX_ADAPTERS} adapters are loaded; unload one first")
            self._loads += 1
            adapter = Adapter(name, f"{name}#{self._loads}", entry.sha256)
            try:
                self._pool.load(str(path), adapter.key)
            except Exception as error:  # as above
                raise ExportError(f"adapter {name}: cannot be loaded: {error}") from error
            self._retire(self._adapters.get(name))
            self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter; streams that use it finish with it.

        Raises:
            ExportError: it is not loaded.
        """
        with self._lock:
            if name not in self._adapters:
                raise ExportError(f"adapter {name}: is not loaded")
            self._retire(self._adapters.pop(name))

    def acquire(self, name: str) -> Adapter | None:
        """Returns the adapter of that model name, held until `release`; None for the model itself.

        Raises:
            KeyError: there is no model or adapter of that name.
        """
        if name == self.name:
            return None
        with self._lock:
            adapter = self._adapters[name]
            adapter.users += 1
            return adapter

    def release(self, adapter: Adapter | None) -> None:
        """Ends a use of `acquire`."""
        if adapter is None:
            return
        with self._lock:
            adapter.users -= 1
            if adapter.retired and not adapter.users:
                self._pool.unload(adapter.key)

    def _retire(self, adapter: Adapter | None) -> None:
        if adapter is None:
            return
        adapter.retired = True
        if not adapter.users:
            self._pool.unload(adapter.key)

    def _adapter_path(self, name: str) -> Path:
        if self._folder is None or self.manifest.kind != "adapter-base":
            raise ExportError(
                "this server takes no adapters; it needs a base of `fedtune export --adapter-only` and --adapters"
            )
        if not name or name == self.name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
            raise ExportError(f"adapter {name!r}: not a name; expected that of a file in the adapters' folder")
        return self._folder / f"{name}{ADAPTER_SUFFIX}"


def read(generator: Any, ids: Sequence[int]) -> None:
    """Feeds a piece of the prompt to a generator."""
    generator.append_tokens(np.array(ids, dtype=np.int32))


def _engine(directory: Path, threads: int | None) -> Any:
    config = onnxruntime_genai.Config(str(directory))
    if threads is not None:
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
    return config


def _refuse_libraries(config: Any, path: Path) -> None:
    """Refuses a configuration that names a shared library, which onnxruntime-genai would load and run.

    Raises:
        ExportError: the configuration names one.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if any(word in key.lower() for word in _LOADED):
                raise ExportError(f"{path}: {key} would run code of the model's author; expected none")
            _refuse_libraries(value, path)
    elif isinstance(config, list):
        for value in config:
            _refuse_libraries(value, path)
