"""Models for ONNX Runtime and others: one file that skips at run time, or one with a fixed policy and no control flow.

`files` writes both, `session` runs them. The adaptive file: `graph` writes nodes; `blocks` writes a block, with
`weights` in float32 or 8-bit integers, `adaptive` what decides around it, `sizes` the choice of a resolution. `static`:
a model without decisions, which `parts` has PyTorch's exporter write, as the rest. `dense`: the backbone, also in 8-bit
integers. `engines`: what runs a model, these files or PyTorch, behind one interface.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaformer.export.files import export_onnx, export_static
    from miaformer.export.session import open_session, run_file, run_session

__all__ = ["export_onnx", "export_static", "open_session", "run_file", "run_session"]

# Imported when first used: running a file needs none of what writing one does.
_HOME = {
    "export_onnx": "files",
    "export_static": "files",
    "open_session": "session",
    "run_file": "session",
    "run_session": "session",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
