"""The example notebook: complete outputs, nothing of the machine that wrote them, and cells that run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "federation.ipynb"
PATHS = re.compile(r"(?<![\w.])/(home|root|Users|tmp|var|work|opt|usr|mnt|private)/|[A-Za-z]:\\\\|site-packages")


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    found: list[dict[str, Any]] = notebook["cells"]
    return found


def test_every_code_cell_was_executed_in_order_and_has_an_output_and_none_has_an_error() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell["outputs"], "".join(cell["source"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])


def test_the_notebook_says_nothing_of_the_machine_that_executed_it() -> None:
    for cell in cells():
        assert cell["metadata"] == {}  # no times
        for output in cell.get("outputs", ()):
            shown = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            assert not PATHS.search(json.dumps([shown, output.get("text")]))
        assert not PATHS.search("".join(cell["source"]))


@pytest.mark.slow
def test_the_cells_run_from_the_first_to_the_last(tmp_path: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    program = tmp_path / "federation.py"
    program.write_text(f'import matplotlib\n\nmatplotlib.use("agg")\n{code}\nprint(run.path)\n', encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^round (\d+): loss", done.stdout, re.MULTILINE) == [str(number) for number in range(1, 9)]
