"""Executes examples/notebook/federation.ipynb and writes its outputs into it, without times and paths of this machine.

    pip install nbclient ipykernel
    python tools/notebook.py

tests/unit/test_notebook.py checks what is committed, and its slow test runs the cells again.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook" / "federation.ipynb"


def main() -> None:
    """Rewrites the notebook; an error in a cell leaves the file as it was."""
    nbformat, nbclient = import_module("nbformat"), import_module("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, with a path, where ipywidgets is missing
    nbclient.NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
