"""What users import: public names, modules by their old names, and what stands at the top of the package."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import miaformer

MOVED = {
    "decisions": "engine.decisions",
    "explanation": "prediction.explanation",
    "images": "data.images",
    "policy": "model.policy",
    "predictor": "prediction.predictor",
}


@pytest.mark.parametrize("name", miaformer.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(miaformer, name) is not None
    assert name in dir(miaformer)


@pytest.mark.parametrize("old_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_modules_are_found_by_their_old_names_too(old_first: bool) -> None:
    """The very modules, whichever is imported first, and nothing of theirs changes."""
    code = ["import sys, miaformer"]
    for old, new in MOVED.items():
        code += [f"import miaformer.{name}" for name in ((old, new) if old_first else (new, old))]
        code += [
            f"new = sys.modules['miaformer.{new}']",
            f"assert sys.modules['miaformer.{old}'] is miaformer.{old} is new",
            f"assert new.__name__ == new.__spec__.name == 'miaformer.{new}'",
        ]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, timeout=120)


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"miaformer\.polices"):
        importlib.import_module("miaformer.polices")


def test_twelve_packages_stand_at_the_top() -> None:
    top = Path(miaformer.__file__).parent
    entries = {path.name for path in top.iterdir() if path.name not in ("__init__.py", "__main__.py", "py.typed")}
    assert len(entries - {"__pycache__"}) <= 12, sorted(entries)
