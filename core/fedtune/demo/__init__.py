"""The bundled demo: a small base model, and households with devices whose calls it has not learned yet.

`python -m fedtune.demo.pretrain` trains the base model; all other modules need only the standard library.
"""

from pathlib import Path

from fedtune.demo.households import Household, Row, make_evaluation, make_households, write_federation
from fedtune.demo.skills import SEPARATOR, format_prompt

BASE_DIRECTORY = Path(__file__).parent / "base"
"""A transformers directory with model and tokenizer; `model.base = "demo"` means this one."""

JOB = Path(__file__).parent / "job.toml"
"""The job that `fedtune simulate` runs by default."""

FLEET = Path(__file__).parent / "fleet.toml"
"""A fleet of phones, single-board computers, laptops and edge servers, for simulations of time."""

__all__ = [
    "BASE_DIRECTORY",
    "FLEET",
    "JOB",
    "SEPARATOR",
    "Household",
    "Row",
    "format_prompt",
    "make_evaluation",
    "make_households",
    "write_federation",
]
