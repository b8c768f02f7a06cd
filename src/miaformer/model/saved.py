"""A model as files: `config.json`, `model.safetensors` and, once calibrated, `calibration.json`. No pickle."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from miaformer.data.files import read_json
from miaformer.model.budget import Calibration
from miaformer.model.config import AdaptConfig
from miaformer.vit import backbone as static
from miaformer.vit.backbone import Backbone
from miaformer.vit.hub import check_hub

FORMAT = 1


@dataclass(frozen=True)
class ModelFiles:
    """What a model directory holds. The backbone has the right shape; its weights are in `state`."""

    backbone: Backbone
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
    """Write a model into an empty directory; `description` is `backbone.describe`'s.

    Raises OSError, naming the file, where one cannot be written.
    """
    settings = {
        "model_type": "miaformer",
        "format": FORMAT,
        "backbone": dict(description),
        "adapt": asdict(config),
        "pretrained_cfg": json.loads(json.dumps(dict(pretrained_cfg), default=str)),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{directory / 'model.safetensors'} cannot be written: {error}") from error
    if calibration is not None:
        _write_json(directory / "calibration.json", calibration.to_json())
    _write_json(directory / "config.json", settings)


def read_model_files(directory: Path) -> ModelFiles:
    """Raises ValueError naming the file that is missing, damaged, or not a MIA-Former's."""
    path = directory / "config.json"
    content = _read_settings(directory)
    if content.get("model_type") != "miaformer" or content.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a MIA-Former model of format {FORMAT}")
    try:
        backbone = static.rebuild(content["backbone"])
        backbone.pretrained_cfg = backbone.default_cfg = content["pretrained_cfg"]
        config = _read_config(content["adapt"])
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


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: {directory} is not a model directory")
    return read_json(path)


def _read_config(settings: Mapping[str, Any]) -> AdaptConfig:
    """As `config.json` holds it, which older versions wrote with a `default_budget`. Raises ValueError for one that is
    set, TypeError for settings that are unknown.
    """
    settings = dict(settings)
    budget = settings.pop("default_budget", None)
    if budget is not None:
        raise ValueError(
            f"default_budget={budget!r} is no setting of a model any more: set it to null, and pass budget={budget!r} "
            "to each call"
        )
    return AdaptConfig(**settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


class SavedModel(ModelHubMixin, ABC):
    """The hub's interface, with our files behind it."""

    def save_pretrained(self, save_directory: str | Path, *, repo_id: str | None = None, **settings: Any) -> str | None:
        """Write the model to a directory; settings are the hub mixin's.

        Another model that lies there stays until all of this one is written, and then nothing of it is left but a
        model card.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory, prefix=".unfinished-") as unfinished:
            url = super().save_pretrained(unfinished, repo_id=repo_id or directory.resolve().name, **settings)
            if (directory / "README.md").exists():
                (Path(unfinished) / "README.md").unlink()
            written = sorted(Path(unfinished).iterdir(), key=lambda path: path.name == "config.json")
            for path in written:
                path.replace(directory / path.name)
            if "calibration.json" not in {path.name for path in written}:
                (directory / "calibration.json").unlink(missing_ok=True)
        return url

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A model from its directory, or by its id from the hub; kwargs are the hub mixin's.

        Raises ValueError naming the file that is missing, damaged, or not a MIA-Former's.
        """
        directory = Path(pretrained_model_name_or_path)
        if directory.is_dir():
            _read_settings(directory)  # before the mixin reads it, whose errors name no file
        elif directory.exists() or str(pretrained_model_name_or_path).startswith((".", "/", "~")):
            raise ValueError(f"{directory} is not a model directory: it should hold config.json and model.safetensors")
        elif not kwargs.get("local_files_only"):
            check_hub(str(directory), ["config.json"], kwargs.get("revision"), kwargs.get("cache_dir"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    @torch.inference_mode(False)  # a model that learns, wherever it is loaded
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Self:
        directory = Path(model_id)
        if not directory.is_dir():
            directory = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=["config.json", "model.safetensors", "calibration.json"],
                )
            )
        return cls.of_files(read_model_files(directory))

    @classmethod
    @abstractmethod
    def of_files(cls, files: ModelFiles) -> Self:
        """The model that files hold."""
