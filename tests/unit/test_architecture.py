"""docs/architecture.md says what the code does: its drawing is the imports', its tables are the code's."""

from __future__ import annotations

from house import DOCUMENT, rewritten


def test_the_drawing_has_exactly_the_arrows_of_the_code() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == rewritten(document), "run `make house`"
