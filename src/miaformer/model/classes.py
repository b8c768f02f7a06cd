"""What a model answers in: its classes, their names, and the layer that gives their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from miaformer.data import ImageData


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

    def in_own_order(self, data: ImageData) -> ImageData:
        """The data, labelled as the model's classifier is: by name, where the model's classes have names.

        Raises ValueError where they are others, naming the difference, or others in number.
        """
        from miaformer.data.source import Relabelled

        own = self.label_names
        if len(data.classes) != self.num_classes or (own is not None and set(own) != set(data.classes)):
            raise ValueError(
                f"the model has {self.num_classes} classes, {data.name} has {len(data.classes)}"
                + ("" if own is None else f": {_difference(own, data.classes)}")
            )
        return data if own is None or own == data.classes else Relabelled(data, own)

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


def _difference(own: Sequence[str], others: Sequence[str]) -> str:
    """Which classes the model alone has, and which the data alone."""
    sides = (("the model alone", own, others), ("the data alone", others, own))
    found = []
    for whose, here, there in sides:
        alone = [name for name in here if name not in set(there)]
        if alone:
            found.append(f"{whose} has {', '.join(map(repr, alone[:5]))}{' ...' if len(alone) > 5 else ''}")
    return ", ".join(found)
