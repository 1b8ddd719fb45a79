"""Execute a notebook's ``.py`` half and keep code and outputs in its ``.ipynb`` half.

Example:
    python notebooks/execute.py quickstart
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

__all__ = ["NAMES", "execute", "store"]

NAMES = (
    *("quickstart", "dynamical_isometry", "density_theory", "deep_networks", "pruning_methods"),
    *("convolutions_and_taps", "faster_with_blocks", "attention", "many_devices"),
    "reinforcement_learning",
)
FOLDER = Path(__file__).resolve().parent


def execute(name: str, parameters: Mapping[str, Any] | None = None) -> Any:
    """Return a notebook with its outputs, executed by a kernel of its own.

    Args:
        name: One of :data:`NAMES`.
        parameters: Values that replace those of the cell tagged ``parameters``, by name.

    Returns:
        The notebook, without the times and the identities that executing leaves in it.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py")
    if parameters is not None:
        # By hand: papermill writes a tuple as a string, and metadata into every cell.
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        place = next(index for index, names in enumerate(tags) if "parameters" in names)
        source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"  # random by default, so that every run would be a change
    notebook.metadata.pop("language_info", None)
    return notebook


def store(name: str) -> Path:
    """Execute a notebook at its default size, save it and return its path."""
    path = FOLDER / f"{name}.ipynb"
    notebook = execute(name)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    for given in parser.parse_args().names:
        print(store(given).relative_to(FOLDER.parent))
