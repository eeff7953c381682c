"""The parity gate: every export is compared with the merged model on held-out examples.

    reference R: the merged torch model, float32            candidate C: the ONNX model, run by onnxruntime

    max logit error     max |R(x) - C(x)| over every position of every example and the whole vocabulary
    argmax agreement    share of positions where both predict the same next token
    exact match         share of examples whose whole completion is the likeliest, token by token (model/scoring.py)
    token accuracy      share of completion tokens that are the likeliest
    perplexity          exp of the mean negative log-likelihood of the completion tokens; of all tokens for the report

fp32 must agree to `FP32_LOGIT_ERROR` and in every argmax, and generate the same text with its cache. The others may
lose `max_drop` points of exact match and of token accuracy, and their perplexity may rise by `max_rise` percent: a
model that answers nothing exactly yet has only that to lose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # type: ignore[import-untyped]
import torch

from fedtune.core.errors import InputError
from fedtune.data.examples import Example
from fedtune.model.base_model import BaseModel
from fedtune.model.shape import SMALL_MODEL
from fedtune.server.export.grid_graph import Progress
from fedtune.server.export.onnx_model import Ids, OnnxModel, Values, running

FP32_LOGIT_ERROR = 1e-3
GENERATED_PROMPTS = 8
GENERATED_TOKENS = 32
SPEED_TOKENS = 64


@dataclass(frozen=True)
class GateReport:
    """The measurements of the gate.

    Args:
        exact_match, token_accuracy, perplexity: scores of the candidate; with `reference_`, of the merged torch model.
        text_perplexity: of all tokens, the prompts' included.
        generated_equal: share of prompts that the candidate, decoding with its cache, answers as the reference does.
        bytes: size of the model's files.
        prefill_tokens_per_second, decode_tokens_per_second: speeds of one stream on this machine.
        failures: the reasons why the candidate fails; empty when it passes.
    """

    prompts: int
    positions: int
    max_logit_error: float
    argmax_agreement: float
    exact_match: float
    reference_exact_match: float
    token_accuracy: float
    reference_token_accuracy: float
    perplexity: float
    reference_perplexity: float
    text_perplexity: float
    reference_text_perplexity: float
    generated_equal: float
    bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    max_drop_points: float
    max_rise_percent: float
    failures: tuple[str, ...] = ()

    @property
    def rise_percent(self) -> float:
        """The rise of perplexity on completions, in percent of the merged model's."""
        return 100 * (self.perplexity / self.reference_perplexity - 1)

    @property
    def passed(self) -> bool:
        """True if the model may be published."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Returns the report as the manifest stores it."""
        return {**asdict(self), "failures": list(self.failures)}


@dataclass(frozen=True)
class Candidate:
    """A written model that the gate examines.

    Args:
        form: the format; "fp32" has the strict rule.
        max_drop: points (hundredths) of exact match and token accuracy that the other formats may lose.
        max_rise: percent by which the other formats' perplexity may rise.
        provider: the execution provider it is run on: "cpu", "cuda", ...
        adapter: an `.onnx_adapter` file that makes the base equal to the reference; None for a merged model.
    """

    directory: Path
    form: str
    max_drop: float
    max_rise: float
    provider: str = "cpu"
    adapter: Path | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """The merged torch model with which a candidate is compared.

    Args:
        base: the merged model, float32.
        examples: held-out examples.
    """

    base: BaseModel
    examples: Sequence[Example]


def gate(candidate: Candidate, reference: Reference, watch: Progress) -> GateReport:
    """Compares a written model with the merged torch model, and tells `watch` about every example.

    Raises:
        InputError: there is no example, or the provider is missing.
        RunError: onnxruntime cannot run the written model.
    """
    if not reference.examples:
        raise InputError("there is no held-out example to check the export on")
    if reference.base.network.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    compared = _compare(candidate, reference, watch)
    generator = _Generator(candidate.directory, candidate.adapter)
    generated = _generated_equal(generator, reference)
    prefill, decode = generator.speed()
    report = GateReport(
        prompts=compared.examples,
        positions=compared.positions,
        max_logit_error=compared.error,
        argmax_agreement=compared.same / compared.positions,
        exact_match=compared.exact[1] / compared.examples,
        reference_exact_match=compared.exact[0] / compared.examples,
        token_accuracy=compared.right[1] / compared.targets,
        reference_token_accuracy=compared.right[0] / compared.targets,
        perplexity=_perplexity(compared.loss[1], compared.targets),
        reference_perplexity=_perplexity(compared.loss[0], compared.targets),
        text_perplexity=_perplexity(compared.text_loss[1], compared.positions - compared.examples),
        reference_text_perplexity=_perplexity(compared.text_loss[0], compared.positions - compared.examples),
        generated_equal=generated,
        bytes=sum(path.stat().st_size for path in candidate.directory.glob("model.onnx*")),
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        max_drop_points=0.0 if candidate.form == "fp32" else candidate.max_drop,
        max_rise_percent=0.0 if candidate.form == "fp32" else candidate.max_rise,
    )
    failures = _strict(report) if candidate.form == "fp32" else _lenient(report)
    return replace(report, failures=tuple(failures))


@dataclass
class _Compared:
    """Counts over all examples; a pair has the reference's count first and the candidate's second.

    Args:
        error: the largest difference of two logits; infinite where a logit is not finite.
        same: positions where both predict the same next token.
        targets: number of completion tokens.
        exact: completions of which every token is the likeliest.
        right: completion tokens that are the likeliest.
        loss: negative log-likelihood of the completion tokens, summed.
        text_loss: the same of all tokens but the first of each example.
    """

    error: float = 0.0
    examples: int = 0
    positions: int = 0
    same: int = 0
    targets: int = 0
    exact: tuple[int, int] = (0, 0)
    right: tuple[int, int] = (0, 0)
    loss: tuple[float, float] = (0.0, 0.0)
    text_loss: tuple[float, float] = (0.0, 0.0)


def _compare(candidate: Candidate, reference: Reference, watch: Progress) -> _Compared:
    """Runs both models once on every example."""
    model = OnnxModel(candidate.directory, candidate.provider, candidate.adapter)
    counts = _Compared()
    for done, example in enumerate(reference.examples):
        watch("comparing with the merged model", done, len(reference.examples))
        ids = example.ids.astype(np.int64)
        pair = (_reference_logits(reference.base, ids), model.logits(ids))
        said = [logits.argmax(axis=1) for logits in pair]
        wanted = ids[example.first_target :]
        hits = [each[example.first_target - 1 : -1] == wanted for each in said]
        error = float(np.max(np.abs(pair[0] - pair[1])))
        counts.error = max(counts.error, error if np.isfinite(error) else np.inf)  # max() would pass over NaN
        counts.examples += 1
        counts.positions += len(ids)
        counts.same += int((said[0] == said[1]).sum())
        counts.targets += len(wanted)
        counts.exact = (counts.exact[0] + bool(hits[0].all()), counts.exact[1] + bool(hits[1].all()))
        counts.right = (counts.right[0] + int(hits[0].sum()), counts.right[1] + int(hits[1].sum()))
        losses = [_losses(logits, ids) for logits in pair]
        first = example.first_target - 1
        counts.loss = (counts.loss[0] + losses[0][first:].sum(), counts.loss[1] + losses[1][first:].sum())
        counts.text_loss = (counts.text_loss[0] + losses[0].sum(), counts.text_loss[1] + losses[1].sum())
    watch("comparing with the merged model", len(reference.examples), len(reference.examples))
    return counts


def _losses(logits: Values, ids: Ids) -> Values:
    """Returns the negative log-likelihood of each token but the first: (tokens, vocabulary) -> (tokens - 1,)."""
    likely = torch.from_numpy(logits[:-1])
    losses: Values = torch.nn.functional.cross_entropy(likely, torch.from_numpy(ids[1:]), reduction="none").numpy()
    return losses


def _perplexity(loss: float, tokens: int) -> float:
    return float(np.exp(min(loss / max(tokens, 1), 700.0)))


def _strict(report: GateReport) -> list[str]:
    failures = []
    if not report.max_logit_error <= FP32_LOGIT_ERROR:
        error = above(report.max_logit_error, FP32_LOGIT_ERROR, "g")
        failures.append(f"max logit error {error}; expected at most {FP32_LOGIT_ERROR:g}")
    if report.argmax_agreement < 1:
        failures.append(f"argmax agreement {report.argmax_agreement:.4%}; expected all {report.positions:,} positions")
    if report.generated_equal < 1:
        failures.append(f"only {report.generated_equal:.0%} of the generated answers equal the merged model's")
    return failures


def _lenient(report: GateReport) -> list[str]:
    failures = []
    for name in ("exact_match", "token_accuracy"):
        lost = 100 * (getattr(report, f"reference_{name}") - getattr(report, name))
        if lost > report.max_drop_points + 1e-9:
            shown = above(lost, report.max_drop_points)
            failures.append(
                f"{name.replace('_', ' ')} lost {shown} points; expected at most {report.max_drop_points:g}"
            )
    if not report.rise_percent <= report.max_rise_percent + 1e-9:
        shown = above(report.rise_percent, report.max_rise_percent)
        failures.append(f"perplexity rose by {shown}%; expected at most {report.max_rise_percent:g}%")
    if not np.isfinite(report.max_logit_error):
        failures.append("a logit is not finite")
    return failures


def above(value: float, limit: float, kind: str = "f") -> str:
    """Returns a number with as many digits, at least one, as show that it is above a limit."""
    texts = (f"{value:.{digits}{kind}}" for digits in range(1, 17))
    return next((text for text in texts if float(text) > limit), f"{value:g}")


@torch.no_grad()
def _reference_logits(reference: BaseModel, ids: Ids) -> Values:
    logits = reference.network(torch.from_numpy(ids)[None].to(reference.device)).logits[0]
    array: Values = logits.float().cpu().numpy()
    return array


class _Generator:
    """Greedy decoding under onnxruntime-genai with the cache, as the model will be served."""

    def __init__(self, directory: Path, adapter: Path | None) -> None:
        with running():
            self._model = onnxruntime_genai.Model(str(directory))
        config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context = int(config["context_length"])
        self._vocabulary = int(config["vocab_size"])
        self._adapters: Any = None
        if adapter is not None:
            with running():
                self._adapters = onnxruntime_genai.Adapters(self._model)
                self._adapters.load(str(adapter), "adapter")

    def start(self, prompt: Sequence[int], tokens: int, at_least: int = 0) -> Any:
        params = onnxruntime_genai.GeneratorParams(self._model)
        length = min(len(prompt) + tokens, self.context)
        params.set_search_options(max_length=length, min_length=len(prompt) + at_least, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, params)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, "adapter")
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        return generator

    @running()
    def answer(self, prompt: Sequence[int], tokens: int) -> list[int]:
        generator = self.start(prompt, tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    @running()
    def speed(self) -> tuple[float, float]:
        """Measures prefill and decode tokens a second, in the second of two runs on random tokens with no end token."""
        tokens = min(SPEED_TOKENS, self.context // 4)
        prompt = np.random.default_rng(0).integers(self._vocabulary, size=2 * tokens)
        for _ in range(2):
            began = time.perf_counter()
            generator = self.start(prompt.tolist(), tokens, at_least=tokens)
            generator.generate_next_token()
            filled = time.perf_counter()
            written = 1
            while not generator.is_done():
                generator.generate_next_token()
                written += 1
            ended = time.perf_counter()
        return len(prompt) / (filled - began), max(written - 1, 1) / max(ended - filled, 1e-9)


@torch.no_grad()
def _generated_equal(generator: _Generator, reference: Reference) -> float:
    """Returns the share of the first prompts that both models continue alike."""
    equal = asked = 0
    ends = _end_tokens(reference.base)
    for example in reference.examples[:GENERATED_PROMPTS]:
        prompt = example.ids[: example.first_target].tolist()
        tokens = min(GENERATED_TOKENS, generator.context - len(prompt))
        if tokens < 1:
            continue
        asked += 1
        said = _reference_answer(reference.base, prompt, tokens, ends)
        equal += _before_end(generator.answer(prompt, tokens), ends) == _before_end(said, ends)
    return equal / asked if asked else 1.0


def _reference_answer(reference: BaseModel, prompt: list[int], tokens: int, ends: set[int]) -> list[int]:
    said: list[int] = []
    feed, cache = prompt, None
    while len(said) < tokens and (not said or said[-1] not in ends):
        ids = torch.tensor([feed], device=reference.device)
        output = reference.network(ids, past_key_values=cache, use_cache=True)
        said.append(int(output.logits[0, -1].argmax()))
        feed, cache = said[-1:], output.past_key_values
    return said


def _end_tokens(reference: BaseModel) -> set[int]:
    ends = reference.network.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {reference.tokenizer.eos_token_id}
    return {int(token) for token in found if isinstance(token, int)}


def _before_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Returns the tokens before the first end token."""
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])
