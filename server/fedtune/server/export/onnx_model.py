"""A written ONNX model under plain onnxruntime, one sequence at a time, with an empty cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]

from fedtune.core.errors import InputError, RunError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class OnnxModel:
    """A model and its session.

    Args:
        directory: the folder of the model and of genai_config.json.
        provider: "cpu", "cuda", ...
        adapter: an `.onnx_adapter` file; None for a merged model.
        file: name of the model in the folder.

    Raises:
        RunError: onnxruntime cannot load the model.
    """

    def __init__(
        self, directory: Path, provider: str = "cpu", adapter: Path | None = None, file: str = "model.onnx"
    ) -> None:
        wanted = provider_name(provider)
        config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Its threads would spin while torch computes, between two calls of this session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with running():
            self._session = onnxruntime.InferenceSession(directory / file, options, providers=[wanted])
        heads, size = config["num_key_value_heads"], config["head_size"]
        inputs = {node.name: node.type for node in self._session.get_inputs()}
        self._past = {
            name: np.zeros((1, heads, 0, size), dtype=_DTYPES[kind])
            for name, kind in inputs.items()
            if name.startswith("past_key_values.")
        }
        self._positions = "position_ids" in inputs
        self._run_options: Any = None
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()
            with running():
                self._adapter.Load(str(adapter))
            self._run_options = onnxruntime.RunOptions()
            self._run_options.add_active_adapter(self._adapter)

    def logits(self, ids: Ids) -> Values:
        """ids (tokens,) -> (tokens, vocabulary)."""
        return self.outputs(ids, ["logits"])[0]

    def outputs(self, ids: Ids, names: Sequence[str]) -> list[Values]:
        """ids (tokens,) -> the named outputs, each (tokens, width), with or without a batch axis in the graph.

        Raises:
            RunError: onnxruntime cannot run the model.
        """
        feed: dict[str, Any] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
            **self._past,
        }
        if self._positions:
            feed["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
        with running():
            found = self._session.run(list(names), feed, self._run_options)
        return [np.asarray(values, dtype=np.float32).reshape(-1, values.shape[-1]) for values in found]


@contextmanager
def running() -> Iterator[None]:
    """Raises a RunError for whatever onnxruntime raises in the block; its errors share no base class."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise RunError(f"onnxruntime cannot run the written model: {type(error).__name__}: {reason}") from error


def provider_name(provider: str) -> str:
    """Returns onnxruntime's name of an execution provider.

    Raises:
        InputError: this machine's onnxruntime lacks the provider, so no model built for it could be checked.
    """
    wanted, available = _PROVIDERS.get(provider, provider), onnxruntime.get_available_providers()
    if wanted not in available:
        raise InputError(
            f"--provider {provider}: this machine's onnxruntime has no {wanted}, so the export could not be checked; "
            f"it has {', '.join(available)}"
        )
    return wanted
