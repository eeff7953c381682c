"""Training examples: records cleaned and tokenised, with the prompt masked.

    examples, report = prepare(records, base.tokenizer, sequence_length=256)

Prompt and completion are tokenised separately, so that no token spans both, and then joined:

    [BOS] prompt completion EOS         BOS where the tokenizer puts one; the loss counts completion and EOS only

The last message of a conversation is its completion; the tokenizer's chat template renders the rest as the prompt.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import DataError, ModelError
from fedtune.core.seeds import generator
from fedtune.core.text import nfc
from fedtune.data.records import Message, Record, check_field, read_records
from fedtune.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised record.

    Args:
        ids: int32, (tokens,).
        first_target: index of the first token that the loss counts, at least 1; the loss counts all later tokens too.
        label: number of its class among the client's, by which local training is balanced; 0 where it is not.
    """

    ids: npt.NDArray[np.int32]
    first_target: int
    label: int = 0

    @property
    def target_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return len(self.ids) - self.first_target


@dataclass(frozen=True)
class CleaningReport:
    """The counts of the records of a data set by the result of their cleaning.

    Args:
        read: lines that were read, bad ones included.
        bad: lines that were no record and were skipped.
        empty: records without anything to learn.
        duplicate: records equal to an earlier one.
        too_long: records whose completion leaves no room for the prompt.
        truncated: examples whose prompt was cut at the beginning.
        continued: examples that continue a text longer than the sequence length.
        kept: examples; read = bad + empty + duplicate + too_long + kept - continued.
    """

    read: int = 0
    bad: int = 0
    empty: int = 0
    duplicate: int = 0
    too_long: int = 0
    truncated: int = 0
    continued: int = 0
    kept: int = 0

    def __add__(self, other: CleaningReport) -> CleaningReport:
        return CleaningReport(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)}
        )

    def __str__(self) -> str:
        counts = dataclasses.asdict(self)
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count) or "nothing"


def load_examples(
    path: Path, tokenizer: Tokenizer, sequence_length: int, *, skip_bad: bool = False, balance: str | None = None
) -> tuple[list[Example], CleaningReport]:
    """Reads and prepares the examples of one file.

    Args:
        balance: see `prepare`.

    Raises:
        DataError: `read_records` raises it, a record lacks the field to balance by, or no record is usable.
    """
    records, bad = read_records(path, skip_bad=skip_bad)
    if balance is not None:
        check_field(records, balance, path)
    try:
        examples, report = prepare(records, tokenizer, sequence_length, balance)
    except ModelError as error:
        raise DataError(path, str(error)) from error
    report += CleaningReport(read=bad, bad=bad)
    if not examples:
        raise DataError(path, f"no usable example ({report}); at most {sequence_length} tokens were allowed")
    return examples, report


def prepare(
    records: Sequence[Record], tokenizer: Tokenizer, sequence_length: int, balance: str | None = None
) -> tuple[list[Example], CleaningReport]:
    """Cleans and tokenises records.

    Text is normalised to Unicode's NFC. A prompt that is too long for the sequence length is cut at its beginning. A
    completion is never cut: a record whose completion does not fit is dropped. Plain text, which has no prompt, is cut
    into several examples.

    Args:
        sequence_length: largest number of tokens of an example.
        balance: field, which every record has, whose values are the classes of the examples; None for one class.

    Raises:
        ModelError: there are conversations, but the tokenizer has no chat template.
    """
    cleaned, report = _clean(records)
    prompts, completions = render(cleaned, tokenizer)
    start, end = start_tokens(tokenizer), _end_token(tokenizer)
    labels = _labels(cleaned, balance)
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    for record, label, prompt, completion in zip(
        cleaned, labels, _tokenise(prompts, tokenizer), _tokenise(completions, tokenizer), strict=True
    ):
        front = [] if record.messages else start  # a template writes its own start tokens
        # A template also writes text after the end of a turn, which would never be generated.
        target = [*completion[: completion.index(end)], end] if end in completion else [*completion, end]
        if prompt:
            room = sequence_length - len(front) - len(target)
            if room < 1:
                counts["too_long"] += 1
                continue
            pieces = [_example([*front, *prompt[-room:]], target)]
            counts["truncated"] += len(prompt) > room
        else:
            pieces = _pieces(front, target, sequence_length)
            counts["empty"] += not pieces
            counts["continued"] += max(len(pieces) - 1, 0)
        examples += [dataclasses.replace(piece, label=label) for piece in pieces]
    return examples, report + CleaningReport(kept=len(examples), **counts)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits off a client's held-out examples, the same ones for the same seed.

    Args:
        share: share of the examples; above 0 at least one is held out, as long as one is left for training.

    Returns:
        Training examples and held-out examples, both in their original order.
    """
    count = min(max(round(share * len(examples)), 1), len(examples) - 1) if share > 0 and examples else 0
    held = set(generator(seed, "holdout").permutation(len(examples))[:count].tolist())
    training = [example for index, example in enumerate(examples) if index not in held]
    return training, [examples[index] for index in sorted(held)]


def render(records: Sequence[Record], tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Returns prompts and completions as the model sees them, conversations by the tokenizer's chat template.

    Raises:
        ModelError: there are conversations, but the tokenizer has no chat template, or it refuses them.
    """
    if any(record.messages for record in records) and not tokenizer.chat_template:
        raise ModelError(
            'the data holds {"messages"}, but the base model\'s tokenizer has no chat template; '
            'expected {"prompt", "completion"} or {"text"}'
        )
    prompts, completions = [], []
    for record in records:
        prompt, completion = _converse(record, tokenizer) if record.messages else (record.prompt, record.completion)
        prompts.append(prompt)
        completions.append(completion)
    return prompts, completions


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns [BOS] if the tokenizer puts it in front of a text, otherwise nothing."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _example(context: list[int], target: list[int]) -> Example:
    return Example(np.array(context + target, dtype=np.int32), max(len(context), 1))


def _pieces(front: list[int], text: list[int], sequence_length: int) -> list[Example]:
    """Cuts a text into examples in which every token is a target once.

    Where `front` is empty, the first token is no target, and each piece begins with the previous one's last token.
    """
    step = sequence_length - max(len(front), 1)
    if front:
        return [_example(front, text[first : first + step]) for first in range(0, len(text), step)]
    return [_example([], text[first : first + step + 1]) for first in range(0, len(text) - 1, step)]


def _clean(records: Sequence[Record]) -> tuple[list[Record], CleaningReport]:
    seen: set[tuple[str, str, tuple[Message, ...]]] = set()
    kept = []
    empty = duplicate = 0
    for record in records:
        normal = Record(
            completion=nfc(record.completion),
            prompt=nfc(record.prompt),
            messages=tuple(Message(turn.role, nfc(turn.content)) for turn in record.messages),
            fields=record.fields,
        )
        identity = (normal.prompt, normal.completion, normal.messages)
        if not normal.completion.strip():
            empty += 1
        elif identity in seen:
            duplicate += 1
        else:
            seen.add(identity)
            kept.append(normal)
    return kept, CleaningReport(read=len(records), empty=empty, duplicate=duplicate)


def _labels(records: Sequence[Record], balance: str | None) -> list[int]:
    """Returns the number of each record's class, in the order of their names."""
    if balance is None:
        return [0] * len(records)
    names = [record.fields[balance] for record in records]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def _converse(record: Record, tokenizer: Tokenizer) -> tuple[str, str]:
    before = [{"role": turn.role, "content": turn.content} for turn in record.messages]
    whole = [*before, {"role": "assistant", "content": record.completion}]
    try:
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        text = str(tokenizer.apply_chat_template(whole, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise ModelError(f"the tokenizer's chat template refuses a conversation: {error}") from error
    # Some templates begin the assistant's turn differently when they prompt for it (an empty thought, say).
    return prompt, text[len(prompt) :] if text.startswith(prompt) else record.completion


def _tokenise(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _end_token(tokenizer: Tokenizer) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError("the tokenizer has no end-of-sequence token; completions could never end")
    return end
