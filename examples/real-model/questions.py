"""Prints the first questions of a JSONL file, each on a line with a tab and the expected answer.

python questions.py eval.jsonl
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

COUNT = 3


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        for line in islice(file, COUNT):
            print("\t".join(" ".join(text.split()) for text in question(json.loads(line))))


def question(record: dict[str, Any]) -> tuple[str, str]:
    """Returns a record's last question and its answer."""
    if "messages" in record:
        asked, answered = record["messages"][-2:]
        return asked["content"], answered["content"]
    return record["prompt"], record["completion"]


if __name__ == "__main__":
    main()
