"""What a method of a comparison is: how it is trained from the shared backbone, and how it is asked for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from miaformer.evaluation.calibration import LabelledBatch
from miaformer.model import MIAFormer
from miaformer.policy import Policy
from miaformer.training.recipes import Kind, Recipe

Classify = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (B, 3, H, W) -> logits (B, classes), MACs fraction (B,)

OURS: tuple[Kind, ...] = ("elastic", "supervised", "reinforce")
FRACTIONS = (0.35, 0.5, 0.7)  # of the backbone's MACs: smaller static models come near to them


@dataclass(frozen=True)
class Entry:
    """A method at a budget, ready to classify. budget: None where the method knows none."""

    name: str
    budget: float | None
    classify: Classify


@dataclass(frozen=True)
class Question:
    """What a trained method is asked: budgets (fractions of the backbone's MACs), images to meet them on, a seed."""

    budgets: Sequence[float]
    calibration: Callable[[], Iterable[LabelledBatch]]
    backbone_macs: int
    seed: int


@dataclass(frozen=True)
class Method:
    """One way to spend less.

    recipe: the stages that train it, of the comparison's recipe; None where the backbone is used as it is. entries:
    what is measured of the trained model. shrink: makes the backbone a smaller one, in place. prepare: puts something
    in the place of our controllers before training. from_scratch: whether it starts from new weights.
    """

    name: str
    about: str
    recipe: Callable[[Recipe], Recipe] | None
    entries: Callable[[MIAFormer, Question], list[Entry]]
    shrink: Callable[[nn.Module], None] = lambda backbone: None
    prepare: Callable[[MIAFormer], None] = lambda model: None
    from_scratch: bool = False

    def is_calibrated(self, base: Recipe) -> bool:
        """Whether training it ends with a table of budgets: then it is one of ours, a model like any other."""
        return self.recipe is not None and any(stage.decides for stage in self.recipe(base).stages)


def adaptation_epochs(recipe: Recipe) -> float:
    """Epochs of adapting; every method gets as many."""
    return sum(stage.epochs for stage in recipe.stages if stage.kind in OURS)


def by_policy(model: MIAFormer, policy: Policy) -> Classify:
    """The logits and the MACs of what this policy decides."""

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model.run(images, policy=policy)
        return output.logits, output.trace.macs_fraction

    return classify
