"""Data files: three formats, and for each mistake a sentence with file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import DataError
from fedtune.data.records import MAX_LINE_BYTES, Message, Record, read_records

GOOD = '{"prompt": "a", "completion": "b"}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_three_kinds_of_line_become_records(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(
        tmp_path / "data.jsonl",
        '{"prompt": "a", "completion": "b", "skill": "lamp", "level": 3, "tags": []}',
        "",
        json.dumps({"messages": turns}),
        '{"text": "c"}',
    )
    records, bad = read_records(path)
    assert bad == 0
    assert records == [
        Record("b", prompt="a", fields={"skill": "lamp", "level": "3"}),
        Record("ho", messages=(Message("user", "hi"),)),
        Record("c"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[1]", "is list, not an object"),
        ('{"question": "a"}', 'has the keys question; expected {"prompt", "completion"}'),
        ("{}", r"has the keys \(none\)"),
        ('{"prompt": "a", "completion": 3}', '"completion" is int; expected text'),
        ('{"completion": "b"}', '"prompt" is missing'),
        ('{"text": null}', '"text" is missing'),
        (r'{"prompt": "\ud800", "completion": "b"}', r'"prompt" has half of a surrogate pair, .*ud800'),
        (r'{"text": "a", "topic": "x\udfff"}', r'"topic" has half of a surrogate pair, .*udfff.* at 1'),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]}', '"content"'),
        ('{"messages": "hi"}', "not a list of two or more turns"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "not a list of two or more turns"),
        ('{"messages": ["a", "b"]}', "a turn that is not"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}', 'by "user"'),
        ("[" * 100_000, "is not JSON: RecursionError"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=problem) as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    records, bad = read_records(path, skip_bad=True)
    assert (len(records), bad) == (1, 1)


def test_bytes_that_are_not_utf8_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r":2: is not UTF-8 at byte 10"):
        read_records(path)


def test_a_line_over_the_limit_is_bad_and_never_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, json.dumps({"text": "x" * (3 * MAX_LINE_BYTES)}), GOOD)
    with pytest.raises(DataError, match=f":2: is longer than {MAX_LINE_BYTES} bytes"):
        read_records(path)
    records, bad = read_records(path, skip_bad=True)
    assert (len(records), bad) == (2, 1)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.csv", "none.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        with pytest.raises(DataError, match=r"cannot be read: .*expected a data file"):
            read_records(tmp_path / name)


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.csv"):
        with pytest.raises(DataError, match="is empty"):
            read_records(write(tmp_path / name))


def test_csv_columns_are_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "prompt,completion,skill", '"a, b",c,lamp', "d,e,fan")
    records, _ = read_records(path)
    assert records[0] == Record("c", prompt="a, b", fields={"skill": "lamp"})
    with pytest.raises(DataError, match=r"data\.csv:2: .*expected"):
        read_records(write(path, "question,answer", "a,b"))
    with pytest.raises(DataError, match=r'data\.csv:3: "completion" is missing'):
        read_records(write(path, "prompt,completion", "a,b", "c"))


def test_parquet_rows_are_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None], "level": [1, 2]}), path)
    with pytest.raises(DataError, match=r':2: "completion" is missing'):
        read_records(path)
    records, bad = read_records(path, skip_bad=True)
    assert (records, bad) == ([Record("c", prompt="a", fields={"level": "1"})], 1)
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="is not Parquet"):
        read_records(path)


def test_parquet_without_pyarrow_prints_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_records(tmp_path / "data.parquet")


def test_records_cost_nothing_to_import() -> None:
    import subprocess

    program = "import sys, fedtune.data.records, fedtune.data.population; print('torch' in sys.modules)"
    output: Any = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
