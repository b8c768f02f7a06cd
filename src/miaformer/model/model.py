"""The adaptive ViT: a timm ViT, what decides for it (a controller for each block, or a first look), one way through.

`MIAFormer` holds the backbone as timm made it (`model.backbone(images)` is the static model at any time), decides per
image which blocks, heads and tokens to execute, or in which size to look at it, executes that alone, and says what it
did. What a call asks for becomes decisions in `requests`; `running` executes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from timm.data import resolve_data_config
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from miaformer.engine.block import check_plain
from miaformer.engine.cap import RemainingMacs
from miaformer.engine.controller import LEAST_LOG_PRICE, LOG_PRICE_RANGE
from miaformer.engine.cost import Cost, Counts, cost_of
from miaformer.engine.masked import Masked
from miaformer.engine.products import Packed
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import Execution, Policy, Steps, relaxed_walk, walk
from miaformer.model.budget import Calibration
from miaformer.model.classes import in_own_order
from miaformer.model.config import AdaptConfig
from miaformer.model.output import Output
from miaformer.model.policy import AnyPolicy, Learned, Look, Sampling, TwoLooks
from miaformer.model.requests import Budget, at_budget, cap_in_macs, drawing, per_image, requested
from miaformer.model.resolution import Size, image_sizes
from miaformer.model.running import Way, all_rows, cap_too_low, run_looks
from miaformer.model.saved import ModelFiles, SavedModel, write_model_files
from miaformer.vit import backbone as static
from miaformer.vit.backbone import Backbone
from miaformer.vit.checkpoint_files import at_least_float32
from miaformer.vit.embedding import Embedded, embedded
from miaformer.vit.importance import identity_orders

if TYPE_CHECKING:
    from miaformer.data import ImageData


NOT_SAVED = ("saved or restored", "Merge adapters into the weights first; quantise after saving")


class MIAFormer(
    SavedModel,
    nn.Module,
    library_name="miaformer",
    tags=["image-classification", "dynamic-inference", "vision-transformer"],
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2112.11542",
):
    """A ViT that adapts resolution, or depth, heads and tokens, to each image. Make one with `miaformer.adapt`."""

    def __init__(self, backbone: Backbone, config: AdaptConfig, orders: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapt_config = config
        self.calibration: Calibration | None = None
        self._packed: Packed | None = None
        self._describe()
        block = static.transformer_blocks(backbone)[0]
        self.controllers = config.controllers(len(backbone.blocks), backbone.embed_dim, block.attn.num_heads)
        self.price_scale: Tensor  # (2,): controllers see price_scale[0] * log(price) + price_scale[1]
        self.register_buffer("price_scale", torch.tensor([1.0, 0.0]))
        self.order_channels: Tensor
        for name, order in orders.items():
            self.register_buffer(f"order_{name}", order)

    # What it is ------------------------------------------------------------------------------------------------

    @property
    def _description(self) -> dict[str, Any]:
        """Of the backbone as it is: one whose classifier was changed is saved as it was changed."""
        return static.describe(self.backbone)

    def _describe(self) -> None:
        self._meta = [static.check_describes(self._description, self.backbone)]  # a list: not a submodule
        self._costs: dict[tuple[int, int], Cost] = {}
        self._described_size = static.image_size(self.backbone)

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.num_prefix_tokens

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's data configuration and more, as `timm.data.resolve_model_data_config` reads it."""
        return cast(dict[str, Any], getattr(self.backbone, "pretrained_cfg", None) or {})

    default_cfg = pretrained_cfg

    def data_config(self) -> dict[str, Any]:
        """timm's data configuration, for images of the size that the backbone takes."""
        size = (self.backbone.in_chans, *self.image_size())
        known = self.pretrained_cfg
        if "input_size" not in known:  # a backbone built by hand
            known = {"input_size": size, "crop_pct": 1.0, **known}
        config = cast(dict[str, Any], resolve_data_config({}, pretrained_cfg=known))
        if tuple(config["input_size"]) != size:  # made for another size than its pretrained weights
            config.update(input_size=size, crop_pct=1.0)
        return config

    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the backbone was made for."""
        return static.image_size(self.backbone)

    def image_sizes(self) -> tuple[Size, ...]:
        """Those that images are looked at in, the largest first: one, where a model does not choose resolutions."""
        config = self.adapt_config
        if not config.chooses_resolution:
            return (self.image_size(),)
        return image_sizes(self.image_size(), self.backbone.patch_embed.patch_size, config.least_resolution)

    def cost(self, image_size: tuple[int, int] | None = None) -> Cost:
        """What decisions cost for images of this size (H, W); the backbone's own size by default."""
        if self._described_size != self.image_size():  # timm's set_input_size
            self._describe()
        size = image_size or self.image_size()
        if size not in self._costs:
            self._costs[size] = cost_of(self._meta[0].eval(), size, self.adapt_config.mlp_width)
        return self._costs[size]

    def controller_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs an image of all controllers when everything is executed: the most they can take."""
        patches = self.cost(image_size).num_patches
        return sum(c.context_macs + patches * c.token_score_macs for c in self.controllers)

    def least_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs that every image takes, whatever is decided: no cap can be lower."""
        if self.adapt_config.chooses_resolution:
            return min(self.macs_of_sizes().values())
        return self.cost(image_size).fixed + self._context_macs()

    def macs_of_sizes(self) -> dict[Size, int]:
        """What executing everything takes in each of `image_sizes`."""
        return {size: self.cost(size).everything for size in self.image_sizes()}

    def check_cap(self, cap: Budget, image_size: tuple[int, int] | None = None) -> None:
        """Raises ValueError for a cap that `run` refuses, without running anything."""
        cost = self.cost(image_size)
        batch = 1 if isinstance(cap, str) else per_image("cap", cap).numel()
        caps = cap_in_macs(cap, batch, cost)
        if not self.adapt_config.chooses_resolution:
            RemainingMacs(cost, caps, self._context_macs())
        elif caps.min() < self.least_macs():
            raise cap_too_low(self)

    def _context_macs(self) -> int:
        return sum(controller.context_macs for controller in self.controllers)

    # What it answers in -----------------------------------------------------------------------------------------

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
        return in_own_order(data, self.num_classes, self.label_names)

    def answers_other_classes(self, names: Sequence[str]) -> bool:
        """Whether the classifier is for other classes than these: another number of them, or others by name."""
        own = self.label_names
        return len(names) != self.num_classes or (own is not None and set(own) != set(names))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The layer that gives logits; of a distilled ViT both, as timm has it."""
        return cast("nn.Module | tuple[nn.Module, ...]", self.backbone.get_classifier())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes, by a new layer to be trained; 0 for none: features instead of logits.

        What is pooled stays as it is. So do controllers and their calibration table, which tell images apart without
        the classifier; looks that were chosen by its confidence go, and names of classes. Raises ValueError for fewer
        classes than none, and for another pooling.
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
        self._describe()
        if self.calibration is not None:
            self.calibration = replace(self.calibration, looks=())

    # What it spends --------------------------------------------------------------------------------------------

    def set_price_scale(self, slope: float, shift: float) -> None:
        """Give prices their unit: controllers see slope * log(price) + shift."""
        if not slope > 0:
            raise ValueError(f"slope={slope!r} must be positive: a higher price means less compute")
        self.price_scale.copy_(torch.tensor([slope, shift]))

    def log_price(self, price: Tensor) -> Tensor:
        """What controllers see of prices (B,), within the range that they know."""
        slope, shift = self.price_scale
        return (slope * price.to(slope.device).clamp(min=1e-30).log() + shift).clamp(
            LEAST_LOG_PRICE, LOG_PRICE_RANGE[1]
        )

    def price_range(self) -> tuple[float, float]:
        """The prices between which controllers differ."""
        slope, shift = self.price_scale.tolist()
        low, high = (math.exp((end - shift) / slope) for end in (LEAST_LOG_PRICE, LOG_PRICE_RANGE[1]))
        return low, high

    def price_of(self, budget: Budget) -> Budget:
        """The price that brings a budget, by the calibration table.

        Raises ValueError for an uncalibrated model, and for a budget below the least that the table reaches.
        """
        table = self.check_budget(budget)
        budgets = per_image("budget", budget).tolist()
        return [table.price(b) for b in budgets] if isinstance(budgets, list) else table.price(budgets)

    def check_budget(self, budget: Budget) -> Calibration:
        """The table that a budget is looked up in.

        Raises ValueError for an uncalibrated model, and for a budget below the least that the table reaches.
        """
        if self.calibration is None:
            raise ValueError(
                "This model is not calibrated, so it knows no budget: train it (miaformer.train), calibrate it "
                "(miaformer.calibrate), or pass price= or policy="
            )
        for one in torch.atleast_1d(per_image("budget", budget)).tolist():
            self.calibration.check(one)
        return self.calibration

    def at_budget(self, budget: float) -> Look | TwoLooks:
        """What `run` executes at a budget, as a policy. Raises ValueError as `check_budget` does."""
        return at_budget(self, budget)

    def learned(self, price: Budget, batch: int = 1) -> Learned:
        """The controllers' policy at a price >= 0 in units of loss, one for all images or one for each.

        Raises ValueError for a price below 0, and for a model without controllers.
        """
        if self.adapt_config.chooses_resolution:
            raise ValueError("this model chooses resolutions and has no controllers to give a price: give a budget")
        prices = torch.atleast_1d(per_image("price", price, batch)).float()
        if not bool((prices >= 0).all()):
            raise ValueError(f"price={price!r} must be at least 0: a number, or one for each of {batch} images")
        multiple = self.adapt_config.rows_multiple(self.cost().num_patches)
        return Learned(self.controllers, self.log_price(prices), multiple)

    # What it does ----------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
        sample: bool | Sampling = False,
    ) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W), spending what `budget` (or `price`) says; see `run`.

        In training mode without budget and price this is the backbone, so that any training loop can fine-tune it.
        """
        if self.training and budget is None and price is None and cap is None and not sample:
            return self.answer(self.backbone.forward_features(static.check_images(images, self.backbone)))
        return self.run(images, budget=budget, price=price, cap=cap, sample=sample).logits

    def run(
        self,
        images: Tensor,
        policy: AnyPolicy | None = None,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
        execution: Literal["sparse", "masked"] = "sparse",
        sample: bool | Sampling = False,
        features: bool = False,
    ) -> Output:
        """Classify, and say what was executed.

        images: (B, 3, H, W), normalised as the backbone expects. policy: what decides; by default the controllers
        where a budget or a price is known, else everything is executed. A cap alone is a budget too: a calibrated
        model spends what it allows where it matters, not on the first blocks. budget: mean MACs over data like the
        calibration set, as a fraction of the backbone's; one for all images or one each. price: what a dense
        forward costs, in units of loss, instead of a budget. cap: the most MACs any one image takes, as a fraction:
        hard; one for all images or one each. A model with `looks=2` spends a budget in two looks where its calibration
        found that better: images whose first answer is not confident are executed again, and both looks count.
        execution: "sparse" computes nothing that is skipped; "masked" computes
        all and is the reference. sample: draw the controllers' decisions instead of taking the likelier one, as
        `Sampling` says how; meets the budget only approximately, because calibration takes the likelier decision.
        features: give the pooled features too (`Output.features`), (B, num_features): timm's `pre_logits`.

        Raises ValueError or TypeError, naming what was wrong, for images of wrong shape, type or with NaN, for a
        budget without calibration, for a cap below what embedding, controllers and classifier take, and for sample
        where no controllers decide.
        """
        _check_is_not_transformed()
        images = static.check_images(images, self.backbone)
        if execution not in ("sparse", "masked"):
            raise ValueError(f"execution={execution!r} must be 'sparse' or 'masked'")
        cost = self.cost((images.shape[-2], images.shape[-1]))
        cap_macs = None if cap is None else cap_in_macs(cap, len(images), cost)
        looks = requested(self, policy, budget, price, cap, len(images))
        if sample:
            looks = drawing(looks, Sampling() if sample is True else sample)
        return run_looks(self, images, looks, cap_macs, Way(execution, features))

    def forward_features(
        self,
        images: Tensor,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
    ) -> Tensor:
        """All tokens (B, P+N, C) after the final norm, for dense tasks; skipped tokens keep their value.

        In training mode without budget, price and cap these are the backbone's. Raises ValueError for a budget, price
        or cap of a model that chooses resolutions: its images would have tokens of different numbers.
        """
        if self.training and budget is None and price is None and cap is None:
            images = static.check_images(images, self.backbone)
            return self._in_first_order(self.backbone.forward_features(images))
        x, _ = all_rows(self, images, budget, price, cap)
        return self._in_first_order(self.backbone.norm(x))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
    ) -> Any:
        """What comes out of several blocks, for dense heads, as timm's method of this name has it.

        indices: the blocks: their numbers (negative ones from the end), or how many of the last ones; None: all.
        return_prefix_tokens: pairs of patch and prefix tokens (B, P, C). norm: through the final norm. output_fmt:
        (B, C, rows, columns), or (B, N, C). Returns the features of `forward_features` and a list, or the list alone
        where `intermediates_only`. Skipped tokens keep their value. budget, price and cap as `forward_features` has
        them, and the same errors.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'")
        asked = list(indices) if isinstance(indices, Sequence) else indices
        taken, _ = feature_take_indices(len(self.backbone.blocks), asked)
        after: dict[int, Tensor] = {}
        x, cost = all_rows(self, images, budget, price, cap, after)
        prefix, found = cost.num_prefix_tokens, []
        for index in taken:
            tokens = self._in_first_order(self.backbone.norm(after[index]) if norm else after[index])
            patches = tokens[:, prefix:]
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, cost.grid).permute(0, 3, 1, 2).contiguous()
            found.append((patches, tokens[:, :prefix]) if return_prefix_tokens else patches)
        return found if intermediates_only else (self._in_first_order(self.backbone.norm(x)), found)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or pooled features, of what `forward_features` gives."""
        return self.answer(x[..., self.order_channels] if self._orders_channels else x, pre_logits)

    def answer(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of tokens whose channels stand in the blocks' order."""
        out = self.backbone.forward_head(x, pre_logits=pre_logits)
        pooled_channels = (pre_logits or not self.num_classes) and self.backbone.attn_pool is None
        return self._in_first_order(out) if pooled_channels else out

    def _in_first_order(self, features: Tensor) -> Tensor:
        """Features (..., C), or of two poolings (..., 2 C), as the backbone would give them, channels not permuted."""
        if not self._orders_channels:
            return features
        return features.unflatten(-1, (-1, self.embed_dim))[..., self.order_channels.argsort()].flatten(-2)

    @property
    def _orders_channels(self) -> bool:
        return self.adapt_config.rules.nested_heads and self.adapt_config.mlp_width == "coupled"

    def embed(self, images: Tensor) -> Embedded:
        """Tokens (B, P+N, C) that enter the first block, all of them, and the blocks."""
        return embedded(self.backbone, images)

    def walk(self, start: Embedded, policy: Policy, execution: Execution, cost: Cost) -> tuple[Tensor, Steps]:
        """Take embedded images through the blocks, leaving their tokens as they are: for training.

        A policy whose attribute `relaxed` is true gives gates that are numbers.
        """
        go = relaxed_walk if getattr(policy, "relaxed", False) else walk
        return go(start.blocks, start.tokens.clone(), policy, execution, cost, self.adapt_config.rules)

    def walk_images(
        self, images: Tensor, cost: Cost, policy: Policy, cap_macs: Counts | None, execution: str
    ) -> tuple[Tensor, Steps]:
        """Take images through embedding and blocks, by boolean gates."""
        executed = self.sparse(cost) if execution == "sparse" else Masked(cost)
        x, blocks = self.embed(images)
        return walk(blocks, x, policy, executed, cost, self.adapt_config.rules, cap_macs)

    def sparse(self, cost: Cost) -> Sparse:
        """Sparse execution of images of this cost, with weights packed if they are to be (`prepack`)."""
        return Sparse(cost, self._packed)

    def prepack(self) -> Self:
        """Keep copies of the blocks' weights in the layout that this processor's fastest products read.

        For inference on CPU in float32 or bfloat16, where it pays most at small batches. Copies are made when a weight
        is first used: memory as of the blocks once more, with nested heads of each number of heads that is used. They
        follow changes of the weights made in place, and are dropped where the model is trained, moved or loaded.
        """
        self._packed = Packed()
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super().load_state_dict(*args, **kwargs)

    # What it becomes -------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        check_plain(static.transformer_blocks(self.backbone), *NOT_SAVED)
        static.check_describes(self._description, self.backbone)
        write_model_files(
            save_directory,
            self._description,
            self.adapt_config,
            self.pretrained_cfg,
            self.state_dict(),
            self.calibration,
        )

    @classmethod
    def of_files(cls, files: ModelFiles) -> Self:
        model = cls(files.backbone, files.config, identity_orders(files.backbone)).to(at_least_float32())
        try:
            model.load_state_dict(files.state)
        except RuntimeError as error:
            raise ValueError(f"{files.weights} does not fit config.json beside it: {error}") from error
        model.calibration = files.calibration
        return model.eval()

    def to_timm(self, image_size: Size | None = None) -> Backbone:
        """The (fine-tuned) backbone as a timm model of its own, heads, units and channels in their first order.

        image_size: (H, W), to which position embeddings are resampled; default: the model's own.

        Raises ValueError, naming it, for a layer that was put in the place of a linear one.
        """
        check_plain(static.transformer_blocks(self.backbone), "part of a timm model", "Merge it into the weights first")
        parameter = next(self.backbone.parameters())
        description = self._description if image_size is None else {**self._description, "dynamic_img_size": False}
        twin = static.build(description).to(device=parameter.device, dtype=parameter.dtype)
        twin.load_state_dict(self.backbone.state_dict())
        for name in ("pretrained_cfg", "default_cfg"):
            if hasattr(self.backbone, name):
                setattr(twin, name, getattr(self.backbone, name))
        orders = {name: self.get_buffer(f"order_{name}") for name in ("heads", "hidden", "channels")}
        static.apply_orders(twin, static.inverse_orders(orders))
        if image_size is not None:
            twin.set_input_size(img_size=image_size)
        return twin.train(self.training)


def _check_is_not_transformed() -> None:
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise ValueError(
            "torch.func transforms (grad, vmap, ...) do not work on an adaptive model, because decisions depend on "
            "tensor values. Use loss.backward() or torch.autograd.grad, or transform model.backbone"
        )
