"""The list of mutants agrees with the sources."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_every_mutant_still_finds_the_check_that_it_removes() -> None:
    assert runpy.run_path(str(Path(__file__).with_name("mutation.py")))["inapplicable"]() == []
