"""Execute a notebook in a folder of its own and keep its outputs, with a digest of the code that they are of.

    python tools/execute_notebook.py notebooks/quickstart.ipynb

tests/test_notebook.py executes it the same way, and fails where a cell fails or the outputs are of other code.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

DIGEST = "outputs_of"  # in the notebook's metadata


def code_digest(notebook: NotebookNode) -> str:
    cells = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(cells.encode()).hexdigest()


def executed(notebook: NotebookNode, folder: str | Path, timeout_s: float = 600) -> NotebookNode:
    """The same with the outputs of its cells, which find themselves in `folder`.

    Raises nbclient's CellExecutionError, with the cell and its traceback, where a cell fails.
    """
    notebook = nbformat.from_dict(notebook)
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # tqdm warns where the widgets that it would like are not installed.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.metadata[DIGEST] = code_digest(notebook)
    return notebook


def main() -> None:
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(nbformat.read(path, as_version=4), folder)
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
