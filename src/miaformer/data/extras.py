"""Modules that only some data sources need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, install: str = "miaformer[data]") -> Any:
    """Import `module`, or raise an `ImportError` that says what to install for it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this data needs {package}, which is not installed: pip install '{install}'") from error
