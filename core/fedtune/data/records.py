"""The reader of data files: JSONL, CSV or Parquet -> records; errors name the file and line of every bad record.

Each line or row is one object:

    {"prompt": "...", "completion": "..."}                  loss on the completion
    {"messages": [{"role": "user", "content": "..."}, ...]} loss on the last message, which the assistant says
    {"text": "..."}                                         loss on everything

Further keys are kept as text, for partitions and balance by a field.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtune.core.errors import DataError

MAX_LINE_BYTES = 4 << 20
EXPECTED = 'expected {"prompt", "completion"}, {"messages"} or {"text"}'
_EXPECTED_TURNS = 'expected turns {"role", "content"}, a question first and the assistant\'s answer last'
_CONTENT_KEYS = frozenset({"prompt", "completion", "messages", "text"})


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One line of a data file.

    Args:
        completion: text that the model learns to write.
        prompt: text before it; empty for plain text.
        messages: turns before the completion; empty where there is no conversation.
        fields: other scalar values of the line, as text.
        line: number of the line in its file, from 1, for messages; 0 for a record of no file.
    """

    completion: str
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    line: int = field(default=0, compare=False)

    @property
    def asked(self) -> str:
        """The prompt for people: the last message before the completion, or the prompt itself."""
        return self.messages[-1].content if self.messages else self.prompt


def read_records(path: Path, skip_bad: bool = False) -> tuple[list[Record], int]:
    """Reads a data file; its format follows from its ending: .csv, .parquet, and JSONL for any other.

    Args:
        skip_bad: whether bad lines are counted and skipped; otherwise the first one is an error.

    Returns:
        The records, and the number of bad lines.

    Raises:
        DataError: the file is missing, unreadable or empty, or has a bad line.
    """
    records: list[Record] = []
    bad = 0
    for line in read_lines(path):
        if isinstance(line, Record):
            records.append(line)
        elif skip_bad:
            bad += 1
        else:
            raise line
    return records, bad


def read_lines(path: Path) -> Iterator[Record | DataError]:
    """Yields each line of a data file as a record, or as the error that names it and says what was expected.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    lines = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_lines)
    empty = True
    try:
        for line, value in lines(path):
            empty = False
            try:
                if isinstance(value, _BadLineError):
                    raise value
                yield replace(_record(value), line=line)
            except _BadLineError as error:
                yield DataError(path, str(error), line)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}; expected a data file") from error
    if empty:
        raise DataError(path, "is empty; expected one object a line")


def check_field(records: Iterable[Record], name: str, source: Path) -> None:
    """Checks that every record has the field by which a job balances.

    Raises:
        DataError: one lacks it; the error names the line, the fields that it has, and the remedy.
    """
    for record in records:
        if name not in record.fields:
            known = ", ".join(f'"{key}"' for key in record.fields)
            only = f", only {known}" if known else ""
            remedy = "add it to every record, with a text or a number as its value, or leave data.balance out"
            problem = f'data.balance is "{name}", but the record has no such field{only}; {remedy}'
            raise DataError(source, problem, record.line or None)


class _BadLineError(Exception):
    """A line is not a record; the message has the reason."""


def _record(value: object) -> Record:
    if not isinstance(value, dict):
        raise _BadLineError(f"is {type(value).__name__}, not an object; {EXPECTED}")
    fields = {
        _whole(key, "a key"): _whole(str(scalar), key)
        for key, scalar in value.items()
        if key not in _CONTENT_KEYS and isinstance(scalar, str | int | float | bool)
    }
    if "messages" in value and value["messages"] is not None:
        *turns, last = _messages(value["messages"])
        return Record(last.content, messages=tuple(turns), fields=fields)
    if "completion" in value:
        return Record(_text(value, "completion"), prompt=_text(value, "prompt"), fields=fields)
    if "text" in value:
        return Record(_text(value, "text"), fields=fields)
    raise _BadLineError(f"has the keys {', '.join(map(str, value)) or '(none)'}; {EXPECTED}")


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or len(value) < 2:
        raise _BadLineError(f'"messages" is not a list of two or more turns; {_EXPECTED_TURNS}')
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise _BadLineError(f'"messages" has a turn that is not an object; {_EXPECTED_TURNS}')
        turns.append(Message(_text(turn, "role"), _text(turn, "content")))
    if turns[-1].role != "assistant":
        raise _BadLineError(f'the last message is by "{turns[-1].role}"; expected "assistant"')
    return turns


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        found = "missing" if text is None else type(text).__name__
        raise _BadLineError(f'"{key}" is {found}; expected text')
    return _whole(text, key)


def _whole(text: str, key: str) -> str:
    """Returns the text if it is one; JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise _BadLineError(f'"{key}" has half of a surrogate pair, {half}, at {error.start}; expected text') from None
    return text


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield number, _BadLineError(f"is longer than {MAX_LINE_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
            elif line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _BadLineError(f"is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return _BadLineError(f"is not JSON: {error.msg} at column {error.colno}; {EXPECTED}")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with too many digits
        return _BadLineError(f"is not JSON: {type(error).__name__}; {EXPECTED}")


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                row: dict[Any, Any] = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(path, f"is not CSV: {error}", reader.line_num) from error
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(path, "Parquet files need pyarrow. Install it with: pip install pyarrow") from error
    if not path.is_file():
        raise DataError(path, "cannot be read: no such file; expected a data file")
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(path, f"is not Parquet: {error}") from error
