"""A chat in the terminal; with piped input, each line is a prompt and gets one line as its answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from fedtune.client.inference.exported_model import ExportedModel, PromptError, Sampling
from fedtune.client.inference.scheduler import Scheduler

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends"


def answers(
    scheduler: Scheduler, turns: list[dict[str, str]], sampling: Sampling, adapter: str | None = None
) -> Iterator[str]:
    """Yields the answer to a conversation, piece by piece; leaving the loop early cancels it.

    Args:
        sampling: settings of the answer; `max_tokens` is cut to the space left in the context.

    Raises:
        PromptError: the conversation is longer than the context.
    """
    model = scheduler.model
    ids = model.encode_chat(turns)
    room = min(sampling.max_tokens, model.check_prompt(ids))
    return scheduler.answer(ids, replace(sampling, max_tokens=room), model.acquire(adapter or model.name))


def converse(
    model: ExportedModel, sampling: Sampling, *, remember: bool, source: TextIO = sys.stdin, sink: TextIO = sys.stdout
) -> None:
    """Reads prompts and writes answers until the input ends.

    Args:
        remember: whether earlier turns are part of the prompt; the oldest are dropped when the context is full.
    """
    scheduler = Scheduler(model, slots=1, queue=1)
    terminal = source.isatty()
    turns: list[dict[str, str]] = []
    if terminal:
        print(f"{model.name} ({model.manifest.format}); {HELP}", file=sink)
    try:
        while (line := _ask(source, sink, terminal)) is not None:
            if line == "/quit":
                break
            if line == "/reset":
                turns = []
            if not line or line == "/reset":
                continue
            turns = [*turns, {"role": "user", "content": line}] if remember else [{"role": "user", "content": line}]
            turns = _answer(scheduler, turns, sampling, sink)
    finally:
        scheduler.close()


def _answer(
    scheduler: Scheduler, turns: list[dict[str, str]], sampling: Sampling, sink: TextIO
) -> list[dict[str, str]]:
    said = ""
    while True:
        try:
            for text in answers(scheduler, turns, sampling):
                said += text
                print(text, end="", file=sink, flush=True)
            print(file=sink, flush=True)
            return [*turns, {"role": "assistant", "content": said}]
        except KeyboardInterrupt:
            print(" (stopped)", file=sink, flush=True)
            return [*turns, {"role": "assistant", "content": said}]
        except PromptError as error:
            if len(turns) == 1:
                print(f"({error})", file=sink, flush=True)
                return []
            turns = turns[2:]  # drops a question and its answer


def _ask(source: TextIO, sink: TextIO, terminal: bool) -> str | None:
    try:
        if terminal:
            print("> ", end="", file=sink, flush=True)
        line = source.readline()
    except KeyboardInterrupt:
        line = ""
    if not line and terminal:
        print(file=sink)
    return line.strip() if line else None
