"""Accuracy over the radius of an attack: one panel a target, one line an attack, the worst of them bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miaformer.lab.attacks.evaluate import WORST
from miaformer.reports.style import new_figure, plain, save


def plot_robustness(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raises ValueError where no row has a radius."""
    rows = [row for row in rows if row["eps"] is not None]
    if not rows:
        raise ValueError("there is no attack with a radius to draw: patches have none")
    scale = 255 if rows[0].get("norm", "linf") == "linf" else 1
    targets = list(dict.fromkeys(row["target"] for row in rows))
    attacks = [name for name in dict.fromkeys(row["attack"] for row in rows) if name != WORST]
    figure, _ = new_figure(3.6 * len(targets) + 0.6, 3.6, axes=False)
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for panel, target in zip(panels, targets, strict=True):
        own = [row for row in rows if row["target"] == target]
        for place, attack in enumerate([*attacks, WORST]):
            line = sorted((row for row in own if row["attack"] == attack), key=lambda row: row["eps"])
            if not line:
                continue
            is_worst = attack == WORST
            x = [0.0, *(scale * row["eps"] for row in line)]
            y = [100 * line[0]["clean"], *(100 * row["robust"] for row in line)]
            style: dict[str, Any] = {"color": "black", "lw": 2.2} if is_worst else {"color": f"C{place}", "lw": 1.2}
            panel.plot(x, y, marker="o", ms=3.5, label=attack, **style)
            if is_worst:
                low, high = ([y[0], *(100 * row["robust_interval"][end] for row in line)] for end in (0, 1))
                panel.fill_between(x, low, high, color="black", alpha=0.12, lw=0)
        panel.set_title(target)
        panel.set_xlabel("radius, 1/255" if scale == 255 else "radius, L2, pixels from 0 to 1")
        panel.set_ylim(bottom=0)
        plain(panel)
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    save(figure, path)
