"""The figures in README and docs are those of the committed results."""

from __future__ import annotations

from types import ModuleType

import pytest
from scripts import ROOT, load_script


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script("benchmarks/tables.py")


def test_every_table_is_that_of_its_results(tables: ModuleType) -> None:
    pages = [ROOT / name for name in tables.PAGES if (ROOT / name).exists()]
    assert pages
    assert sum(page.read_text().count("<!-- table ") for page in pages) >= 5
    for page in pages:
        assert tables.filled(page.read_text()) == page.read_text(), f"{page.name}: run benchmarks/tables.py"


def test_a_figure_changed_by_hand_is_found(tables: ModuleType) -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    changed = page.replace("| float32 | 1 | eager | depth | 0.5 | 0.", "| float32 | 1 | eager | depth | 0.5 | 1.", 1)
    assert changed != page
    assert tables.filled(changed) == page
