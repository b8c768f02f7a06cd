"""Recipes: everything that a training run depends on, as typed dataclasses. A run is a recipe, data and a seed."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from miaformer.model.budget import check_fraction

Precision = Literal["auto", "no", "bf16", "fp16"]
Target = Literal["labels", "features", "tokens"]


@dataclass(frozen=True)
class Stage:
    """One part of training, with an optimiser and a schedule of its own.

    kind: `probe`, which fits the classifier alone (`training.probe`), or one that `training.stages` has an objective
    for: backbone, elastic, supervised, reinforce, resolution. `train` may be given objectives of further kinds.
    """

    kind: str
    epochs: float
    lr: float = 0.0
    controller_lr: float = 0.0
    layer_decay: float = 1.0  # of the learning rate, from one block to the one before it (timm's)
    warmup: float = 0.05  # share of the stage
    anneal: float = 1.0  # share of a cosine that learning rates follow: 1 ends at 0, 0.5 at half, for a stage to go on
    full_share: float = 0.25  # images of a batch that execute everything, so that the full model stays what it was
    temperature: tuple[float, float] = (1.0, 1.0)  # of gate noise, from start to end of the stage
    keep: tuple[float, float, float] = (0.5, 0.25, 0.15)  # elastic: the least share of blocks, heads, tokens
    patch_drop: tuple[float, float] = (0.0, 0.0)  # backbone: the share of patch tokens left out, drawn a step
    early_weight: float = 0.0  # backbone, resolution: of the loss of an answer given after a block of the second half

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr < 0 or self.controller_lr < 0:
            raise ValueError(f"{self.kind} stage: epochs, lr and controller_lr must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"{self.kind} stage: layer_decay={self.layer_decay} must be in (0, 1]")
        if not 0 < self.anneal <= 1:
            raise ValueError(f"{self.kind} stage: anneal={self.anneal} must be in (0, 1]")
        least, most = self.patch_drop
        if not 0 <= least <= most < 1:
            raise ValueError(
                f"{self.kind} stage: patch_drop={self.patch_drop} must be two numbers in [0, 1), the smaller one first"
            )
        if self.early_weight < 0:
            raise ValueError(f"{self.kind} stage: early_weight={self.early_weight} must not be negative")
        if most and self.kind != "backbone":
            raise ValueError(f"{self.kind} stage: patch_drop is for the backbone stage; decisions drop tokens here")
        if self.early_weight and self.kind not in ("backbone", "resolution"):
            raise ValueError(f"{self.kind} stage: early_weight is for the stages backbone and resolution")


_RANGES = (  # of settings of a recipe
    ("batch_size", 2, math.inf),
    ("image_size", 1, math.inf),
    ("weight_decay", 0, math.inf),
    ("clip_grad", 1e-9, math.inf),
    ("label_smoothing", 0, 0.99),
    ("distill_weight", 0, 1),
    ("mixup", 0, math.inf),
    ("cutmix", 0, math.inf),
    ("ema_decay", 0, 0.999999),
    ("num_workers", 0, math.inf),
    ("checkpoint_every", 1, math.inf),
    ("keep_checkpoints", 1, math.inf),
)
_CHOSEN_WHERE_NONE = ("batch_size", "num_workers")


@dataclass(frozen=True)
class Recipe:
    """How to train: the backbone to start from, how to adapt it, and the stages."""

    name: str
    data: str
    model: str  # a timm name
    model_args: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    weights: str = ""  # a checkpoint file of that model, see miaformer.load_backbone
    image_size: int | None = None  # of the images; by default that of the weights, or of the model
    conv_stem: tuple[int, ...] = ()  # channels of a `ConvStem` in the place of the patch embedding
    sincos_pos_embed: bool = False  # position embeddings start from sines and cosines, not from noise
    adapt: dict[str, Any] = field(default_factory=dict)  # fields of AdaptConfig
    target: Target = "labels"  # what is learned; without labels from the backbone as it was: see `objective.Targets`
    stages: tuple[Stage, ...] = ()
    batch_size: int | None = None  # of all processes together; None: chosen to fit the data (`training.choices`)
    budgets: tuple[float, float] = (0.25, 0.9)  # controllers learn every budget between
    optimizer: str = "adamw"  # a name of timm's, or muon: for the matrices of blocks, with AdamW for the rest
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    label_smoothing: float = 0.1
    distill_weight: float = 0.5  # of the frozen backbone's soft labels against the true ones
    mixup: float = 0.0
    cutmix: float = 0.0
    augmentation: dict[str, Any] = field(default_factory=dict)  # fields of miaformer.data.Augmentation
    adversarial_eps: float = 0.0  # images are moved so far against the loss, pixels from 0 to 1, L-inf; 0: not
    adversarial_steps: int = 1
    data_on_device: bool = False  # all images decoded at once, and augmented on the device: for small ones
    ema_decay: float | None = None
    precision: Precision = "no"  # auto: bf16 where it is fast
    num_workers: int | None = 0  # processes that decode, for each that trains; None: chosen to fit the machine
    checkpoint_every: int = 500  # steps
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in _CHOSEN_WHERE_NONE:
                if value is not None and type(value) is not int:
                    raise ValueError(f"{setting.name}={value!r} must be an integer, or None to choose it automatically")
            elif type(setting.default) in (int, float) and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"{setting.name}={value!r} must be a number")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(get_args(Precision))}")
        if self.target not in get_args(Target):
            raise ValueError(f"target={self.target!r} must be one of {', '.join(get_args(Target))}")
        if self.target == "tokens" and self.chooses_resolution:
            raise ValueError(
                "target='tokens': a model that chooses resolutions has other tokens in each size; adapt it with "
                "grains=('tokens',)"
            )
        if not self.labelled and (self.mixup or self.cutmix or any(one.kind == "probe" for one in self.stages)):
            raise ValueError(f"target={self.target!r}: probe, mixup and cutmix are for target='labels'")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value!r} must lie in {least:g} to {most:g}")
        low, high = (check_fraction("budgets", value) for value in self.budgets)
        if low >= high:
            raise ValueError(f"budgets={self.budgets} must rise")
        if not 0 <= self.adversarial_eps < 1 or self.adversarial_steps < 1:
            raise ValueError(
                f"adversarial_eps={self.adversarial_eps} must lie in 0 to 1, 1 excluded (4/255, say), and "
                f"adversarial_steps={self.adversarial_steps} be at least 1"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def with_changes(self, **changes: Any) -> Recipe:
        """A copy with some settings changed; ValueError for one that no recipe has."""
        known = [f.name for f in fields(Recipe)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(f"a recipe has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return replace(self, **changes)

    def with_backbone(self, model: str | None, weights: str | None, image_size: int | None) -> Recipe:
        """The same from another backbone; None leaves what the recipe says. With another model nothing is left of the
        settings of the recipe's own but whether weights are downloaded.
        """
        changes: dict[str, Any] = {}
        if model is not None:
            kept = {name: value for name, value in self.model_args.items() if name == "pretrained"}
            changes |= {"model": model, "model_args": kept, "conv_stem": (), "sincos_pos_embed": False, "weights": ""}
        if weights is not None:
            changes["weights"] = weights
        if image_size is not None:
            changes["image_size"] = image_size
        return self.with_changes(**changes)

    def only(self, *kinds: str) -> Recipe:
        """The same with the stages of these kinds alone."""
        found = tuple(stage for stage in self.stages if stage.kind in kinds)
        missing = set(kinds) - {stage.kind for stage in found}
        if missing:
            raise ValueError(f"recipe {self.name!r} has no stage {', '.join(sorted(missing))}")
        return replace(self, stages=found)

    @property
    def labelled(self) -> bool:
        """Whether labels are learned, and data has to have them."""
        return self.target == "labels"

    @property
    def chooses_resolution(self) -> bool:
        return "resolution" in self.adapt.get("grains", ())

    def scaled(self, factor: float) -> Recipe:
        """The same with every stage `factor` times as long."""
        return replace(self, stages=tuple(replace(s, epochs=s.epochs * factor) for s in self.stages))


# Settings of recipes and stages that older versions wrote, with their defaults.
_GONE = (("adversarial_apart", False), ("distill_temperature", 1.0), ("exit_share", 0.0))


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON, what it does not say as it is by default: it may be older than a setting.

    A setting that is gone is left out where it changed nothing.
    """

    def filled(kind: type[Recipe] | type[Stage], given: dict[str, Any]) -> dict[str, Any]:
        defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        defaults |= {f.name: f.default_factory() for f in fields(kind) if f.default_factory is not MISSING}
        return {**defaults, **{name: value for name, value in given.items() if (name, value) not in _GONE}}

    recipe = filled(Recipe, saved)
    recipe["stages"] = [filled(Stage, stage) for stage in recipe["stages"]]
    return cast(dict[str, Any], json.loads(json.dumps(recipe)))


DIGITS = Recipe(
    name="digits",
    data="digits",
    model="vit_tiny_patch16_224",
    model_args={
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2,
        "init_values": 0.1,  # with LayerScale no seed stays at chance for hundreds of steps
    },
    sincos_pos_embed=True,
    stages=(
        Stage("backbone", epochs=2.8, lr=2e-2),
        Stage("elastic", epochs=0.4, lr=1e-2),
        Stage("supervised", epochs=1.4, lr=8e-3, controller_lr=1e-2, temperature=(1.0, 0.3), full_share=0.3),
        Stage("reinforce", epochs=0.2, lr=1e-3, controller_lr=1e-3, temperature=(0.3, 0.3), full_share=0.3),
    ),
    optimizer="muon",
    batch_size=64,
    label_smoothing=0.0,
)

FINETUNE = Recipe(  # chosen on a pretrained ViT-S and photographs (docs/log.md)
    name="finetune",
    data="",
    model="deit_small_patch16_224",
    model_args={"pretrained": True},
    adapt={"grains": ("resolution",)},
    stages=(
        Stage("probe", epochs=1),
        Stage("backbone", epochs=5, lr=2e-4, layer_decay=0.75, patch_drop=(0.2, 0.75), early_weight=0.4),
        Stage("resolution", epochs=2.4, lr=2e-4, layer_decay=0.75, early_weight=0.4),
    ),
    distill_weight=0.0,  # the teacher would take as long as learning does
    augmentation={"hflip": 0.5, "scale": (0.35, 1.0)},
    batch_size=None,
    precision="auto",
    num_workers=None,
)

FEATURES = Recipe(  # without labels: for retrieval, clustering, and classifiers of one's own (docs/log.md)
    name="features",
    data="",
    model="vit_small_patch14_dinov2",
    model_args={"pretrained": True, "img_size": 224},
    adapt={"grains": ("resolution",)},
    target="features",
    stages=(Stage("resolution", epochs=3, lr=4e-5, layer_decay=0.75),),  # at 2e-4 features leave the teacher's behind
    augmentation={"hflip": 0.5, "scale": (0.35, 1.0)},
    batch_size=None,
    precision="auto",
    num_workers=None,
)

CIFAR10_SMALL = Recipe(
    name="cifar10-small",
    data="",
    model="vit_tiny_patch16_224",
    model_args={
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2,
        "init_values": 0.1,
    },
    conv_stem=(32, 64),
    sincos_pos_embed=True,
    adapt={
        "grains": ("depth", "tokens"),  # heads cost more than they save here (docs/log.md)
        "depth_choice": "nested",
        "first_token_block": 0,
        "last_token_block": 0,
        "token_choice": "even",
        "controller_hidden": 96,
    },
    stages=(
        Stage("backbone", epochs=20, lr=8e-3, patch_drop=(0.3, 0.75), early_weight=0.4),
        Stage("elastic", epochs=0.2, lr=1.5e-3, keep=(0.5, 0.5, 0.25), anneal=0.6),
        Stage("supervised", epochs=0.7, lr=1e-3, controller_lr=5e-3, temperature=(0.5, 0.25), anneal=0.7),
        Stage("reinforce", epochs=0.3, lr=5e-4, controller_lr=1e-3, temperature=(0.25, 0.25)),
    ),
    optimizer="muon",
    batch_size=128,
    augmentation={"hflip": 0.5, "scale": (0.4, 1.0), "ratio": (0.75, 1.33), "color_jitter": 0.3},
    data_on_device=True,
)

CIFAR10 = Recipe(  # for a GPU
    name="cifar10",
    data="",
    model="vit_tiny_patch16_224",
    model_args={
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 6,
        "init_values": 0.1,
    },
    conv_stem=(48, 96),
    sincos_pos_embed=True,
    adapt=CIFAR10_SMALL.adapt,
    stages=(
        Stage("backbone", epochs=200, lr=4e-3, patch_drop=(0.0, 0.7), early_weight=0.4),
        Stage("elastic", epochs=4, lr=1e-3, keep=(0.5, 0.5, 0.25), anneal=0.6),
        Stage("supervised", epochs=16, lr=1e-3, controller_lr=5e-3, temperature=(0.5, 0.25), anneal=0.7),
        Stage("reinforce", epochs=5, lr=5e-4, controller_lr=1e-3, temperature=(0.25, 0.25)),
    ),
    optimizer="muon",
    batch_size=512,
    mixup=0.2,
    cutmix=0.5,
    augmentation={"hflip": 0.5, "scale": (0.35, 1.0), "ratio": (0.75, 1.33), "color_jitter": 0.3, "re_prob": 0.25},
    data_on_device=True,
    ema_decay=0.999,
    precision="bf16",
)

IMAGENET = Recipe(
    name="imagenet",
    data="",
    model="deit_small_patch16_224",
    model_args={"pretrained": True},
    stages=(
        Stage("elastic", epochs=5, lr=1e-4),
        Stage("supervised", epochs=20, lr=1e-4, controller_lr=1e-3, temperature=(1.0, 0.3)),
        Stage("reinforce", epochs=5, lr=2e-5, controller_lr=2e-4, temperature=(0.3, 0.3)),
    ),
    batch_size=1024,
    budgets=(0.25, 0.9),
    augmentation={"hflip": 0.5, "scale": (0.25, 1.0), "ratio": (0.75, 1.33), "auto_augment": "rand-m7-mstd0.5-inc1"},
    ema_decay=0.9998,
    precision="bf16",
    num_workers=8,
    checkpoint_every=1000,
)

RECIPES = {recipe.name: recipe for recipe in (DIGITS, CIFAR10_SMALL, CIFAR10, FINETUNE, FEATURES, IMAGENET)}


def get_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]
