"""A model as files: `config.json`, `model.safetensors` and, once calibrated, `calibration.json`. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from miaformer import backbone as static
from miaformer.budget import Calibration
from miaformer.config import AdaptConfig

FORMAT = 1


@dataclass(frozen=True)
class ModelFiles:
    """What a model directory holds. The backbone has the right shape; its weights are in `state`."""

    backbone: VisionTransformer
    config: AdaptConfig
    state: dict[str, Tensor]
    calibration: Calibration | None
    weights: Path  # where `state` was read


def write_model_files(
    directory: Path,
    description: Mapping[str, Any],
    config: AdaptConfig,
    pretrained_cfg: Mapping[str, Any],
    state: Mapping[str, Tensor],
    calibration: Calibration | None,
) -> None:
    """Write a model directory; `description` is `backbone.describe`'s."""
    _write_json(
        directory / "config.json",
        {
            "model_type": "miaformer",
            "format": FORMAT,
            "backbone": dict(description),
            "adapt": asdict(config),
            "pretrained_cfg": json.loads(json.dumps(dict(pretrained_cfg), default=str)),
        },
    )
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    table = directory / "calibration.json"
    if calibration is not None:
        _write_json(table, calibration.to_json())
    else:
        table.unlink(missing_ok=True)


def read_model_files(directory: Path) -> ModelFiles:
    """Raises ValueError naming the file that is missing, damaged, or not a MIA-Former's."""
    path = directory / "config.json"
    content = read_json(path)
    if content.get("model_type") != "miaformer" or content.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a MIA-Former model of format {FORMAT}")
    try:
        backbone = static.rebuild(content["backbone"])
        backbone.pretrained_cfg = backbone.default_cfg = content["pretrained_cfg"]
        config = AdaptConfig(**content["adapt"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has settings that do not fit this version: {error}") from error
    weights = directory / "model.safetensors"
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is missing or damaged ({error}): copy or download it again") from error
    table = directory / "calibration.json"
    calibration = Calibration.from_json(read_json(table)) if table.exists() else None
    return ModelFiles(backbone, config, state, calibration, weights)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {path.parent} is not a model directory") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return content
