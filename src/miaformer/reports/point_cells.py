"""What a policy spent at a budget, as cells of a table: on the terminal and on pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FORMATS = {
    "macs_fraction": "{:.3f}",
    "macs_fraction_p95": "{:.3f}",
    "macs_fraction_max": "{:.3f}",
    "depth_kept": "{:.2f}",
    "heads_kept": "{:.2f}",
    "tokens_kept": "{:.2f}",
}


def spent_cells(point: Mapping[str, Any]) -> list[str]:
    """Of a point of a report of `evaluate`: mean MACs, their 95th percentile and most; blocks, heads and tokens."""
    return [shown.format(point[name]) for name, shown in _FORMATS.items()]


DENSE_CELLS = spent_cells(dict.fromkeys(_FORMATS, 1.0))
