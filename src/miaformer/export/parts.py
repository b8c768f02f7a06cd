"""Parts of a model that decide nothing, written by PyTorch's own exporter."""

from __future__ import annotations

import warnings

import onnx
import torch
from torch import Tensor, nn

from miaformer.export.graph import OPSET


def exported(module: nn.Module, example: Tensor, varies: str | None = None) -> onnx.ModelProto:
    """A part without decisions, by PyTorch's own exporter. varies: the argument whose first dimension may change."""
    was_training = {part: part.training for part in module.modules()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=None if varies is None else {varies: {0: torch.export.Dim.DYNAMIC}},
                verbose=False,
                optimize=True,
            )
    finally:
        for part, mode in was_training.items():
            part.training = mode
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    if proto.functions:
        raise ValueError("PyTorch's exporter wrote the embedding or the head with functions, which are not supported")
    return proto
