"""The quickstart runs as it is committed, without a network, and shows what it really gives."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import ROOT, load_script

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for needed in ("ipykernel", "accelerate", "sklearn", "matplotlib", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
MOST_BYTES = 400_000
Notebook = Any  # nbformat's, or a cell of it


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/execute_notebook.py")


@pytest.fixture(scope="module")
def committed() -> Notebook:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def of_one_cell(source: str) -> Notebook:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])


def shown(cell: Notebook) -> list[tuple[str, ...]]:
    """What a cell gives, its text and its pixels aside, and what libraries may warn of."""
    said = [one for one in cell.outputs if one.get("name") != "stderr"]
    return [(one.output_type, one.get("name", ""), *sorted(one.get("data", {}))) for one in said]


@pytest.mark.slow
def test_every_cell_runs_and_gives_what_is_committed(
    tool: ModuleType, committed: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "written"))
    (tmp_path / "written").mkdir()
    done = tool.executed(committed, tmp_path)
    assert [shown(cell) for cell in code_cells(done)] == [shown(cell) for cell in code_cells(committed)]
    assert done.metadata == committed.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["written"]  # and leaves no file where it is opened
    assert list(tmp_path.glob("written/*/digits/calibration.json"))


def test_the_committed_outputs_are_of_the_committed_code(tool: ModuleType, committed: Notebook) -> None:
    assert committed.metadata[tool.DIGEST] == tool.code_digest(committed), (
        "the code has changed: run tools/execute_notebook.py"
    )
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 2  # training and the like say nothing
    assert any("image/png" in one.get("data", {}) for cell in cells for one in cell.outputs)


def test_the_committed_notebook_is_small_and_tells_nothing_of_a_machine(committed: Notebook) -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    outputs = [str(one) for cell in code_cells(committed) for one in cell.outputs]
    texts = [text for text in outputs if "image/png" not in text]
    assert texts
    for text in texts:
        assert not [trace for trace in ("site-packages", "/tmp", "/home", "/root", "stderr") if trace in text], text


def test_a_cell_that_fails_and_a_changed_cell_are_found(tool: ModuleType, tmp_path: Path) -> None:
    notebook = of_one_cell("1 / 0")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        tool.executed(notebook, tmp_path)
    done = tool.executed(of_one_cell("1 / 2"), tmp_path)
    assert done.cells[0].outputs[0].data["text/plain"] == "0.5"
    done.cells[0].source = "1 / 4"
    assert done.metadata[tool.DIGEST] != tool.code_digest(done)
