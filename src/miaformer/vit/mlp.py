"""The layers of timm's MLPs, plain or gated, by what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


def input_layers(mlp: Any) -> list[Any]:
    """The modules of an MLP that read its input."""
    return [mlp.fc1_x, mlp.fc1_g] if hasattr(mlp, "fc1_g") else [mlp.fc1]


@dataclass(frozen=True)
class LinearView:
    """Rows of a linear layer, seen as a layer of its own."""

    weight: Tensor
    bias: Tensor | None


def mlp_inputs(mlp: Any) -> tuple[Any, Any, bool]:
    """The input layers of timm's `Mlp`, `SwiGLU` and `GluMlp`: value, gate or None, and whether the value is activated.

    Each has a weight and a bias.
    """
    if hasattr(mlp, "fc1_g"):
        return mlp.fc1_x, mlp.fc1_g, False
    if not hasattr(mlp, "gate_last"):
        return mlp.fc1, None, True
    weights = mlp.fc1.weight.chunk(2)
    biases = (None, None) if mlp.fc1.bias is None else mlp.fc1.bias.chunk(2)
    first, second = (LinearView(w, b) for w, b in zip(weights, biases, strict=True))
    return first, second, not mlp.gate_last
