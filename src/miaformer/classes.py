"""What a model answers in: its classes, their names, and the layer that gives their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


def read_class_names(file: str | Path) -> list[str]:
    """Names of classes in a text file, one a line, in the order of labels. Raises ValueError where it is not UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()  # Windows' editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not encoded as UTF-8 ({error.reason} at byte {error.start}): save it so"
        ) from error


class ClassifyingModel(nn.Module):
    """A MIAFormer's classes, which are its backbone's."""

    backbone: VisionTransformer

    if TYPE_CHECKING:

        @property
        def pretrained_cfg(self) -> dict[str, Any]: ...

        def _describes_itself(self) -> None: ...

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, saved with the model; None where nobody gave them."""
        names = self.pretrained_cfg.get("label_names")
        return list(names) if names is not None and len(names) == self.num_classes else None

    @label_names.setter
    def label_names(self, names: list[str]) -> None:
        if len(names) != self.num_classes:
            raise ValueError(f"{len(names)} label names for a classifier of {self.num_classes} classes")
        self.backbone.pretrained_cfg = {**self.pretrained_cfg, "label_names": list(names)}  # type: ignore[assignment]

    def check_label_order(self, names: Sequence[str], whose: str) -> None:
        """Raises ValueError where `names`, of labels 0, 1, ... of some data, are the model's in another order: each
        answer would be taken for another class.
        """
        own = self.label_names
        if own is not None and list(names) != own and sorted(names) == sorted(own):
            first = next(place for place, (one, other) in enumerate(zip(own, names, strict=True)) if one != other)
            raise ValueError(
                f"{whose} has the model's classes in another order: number {first} is {names[first]!r}, the model's is "
                f"{own[first]!r}; set model.label_names, or order the classifier's rows by name"
            )

    def answers_other_classes(self, names: Sequence[str]) -> bool:
        """Whether the classifier is for other classes than these: another number of them, or others by name."""
        own = self.label_names
        return len(names) != self.num_classes or (own is not None and set(own) != set(names))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The layer that gives logits; of a distilled ViT both, as timm has it."""
        return cast("nn.Module | tuple[nn.Module, ...]", self.backbone.get_classifier())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes, by a new layer to be trained; 0 for none: features instead of logits.

        What is pooled stays as it is. So do controllers and the calibration table, which tell images apart without the
        classifier. Names of classes go. Raises ValueError for fewer classes than none, and for another pooling.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be at least 0")
        if global_pool not in (None, self.backbone.global_pool):
            raise ValueError(
                f"global_pool={global_pool!r}: this model pools by {self.backbone.global_pool!r}; change it in timm, "
                "before the backbone is adapted"
            )
        parameter = next(self.parameters())
        self.backbone.reset_classifier(num_classes)
        self.backbone.to(device=parameter.device, dtype=parameter.dtype)
        known = {name: value for name, value in self.pretrained_cfg.items() if name != "label_names"}
        self.backbone.pretrained_cfg = {**known, "num_classes": num_classes}  # type: ignore[assignment]
        self._describes_itself()
