"""The adaptive ViT: a timm ViT, what decides for it (a controller for each block, or a first look), one way through.

`MIAFormer` holds the backbone as timm made it (`model.backbone(images)` is the static model at any time), decides per
image which blocks, heads and tokens to execute, or in which size to look at it, executes that alone, and says what it
did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from miaformer.engine.block import check_plain
from miaformer.engine.cap import Purse
from miaformer.engine.controller import Controller
from miaformer.engine.cost import Cost, Counts, cost_of
from miaformer.engine.folded import Controllers
from miaformer.engine.masked import Masked
from miaformer.engine.products import Packed
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import Execution, Steps, walk
from miaformer.model.budget import check_fraction
from miaformer.model.classes import ClassifyingModel
from miaformer.model.config import AdaptConfig
from miaformer.model.output import Output, Trace, in_turn, merged
from miaformer.model.policy import AnyPolicy, Look, Policy, Sampling, TwoLooks
from miaformer.model.prices import Budget, PricedModel, drawing, per_image
from miaformer.model.resolution import Size, image_sizes, resized, take_any_size, within_cap
from miaformer.model.saved import SavedModel
from miaformer.vit import backbone as static
from miaformer.vit.from_transformers import is_of_transformers, to_timm
from miaformer.vit.importance import identity_orders, importance_orders


class MIAFormer(
    ClassifyingModel,
    PricedModel,
    SavedModel,
    library_name="miaformer",
    tags=["image-classification", "dynamic-inference", "vision-transformer"],
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2112.11542",
):
    """A ViT that adapts resolution, or depth, heads and tokens, to each image. Make one with `miaformer.adapt`."""

    def __init__(self, backbone: VisionTransformer, config: AdaptConfig, orders: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapt_config = config
        self._packed: Packed | None = None
        self._describes_itself()
        block = static.transformer_blocks(backbone)[0]
        self.controllers = Controllers.of(config, len(backbone.blocks), backbone.embed_dim, block.attn.num_heads)
        self.order_channels: Tensor
        for name, order in orders.items():
            self.register_buffer(f"order_{name}", order)

    # What it is ------------------------------------------------------------------------------------------------

    @property
    def _description(self) -> dict[str, Any]:
        """Of the backbone as it is: one whose classifier was changed is saved as it was changed."""
        return static.describe(self.backbone)

    def _describes_itself(self) -> None:
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

    def orders(self) -> dict[str, Tensor]:
        return {name: cast(Tensor, getattr(self, f"order_{name}")) for name in ("heads", "hidden", "channels")}

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
            self._describes_itself()
        size = image_size or self.image_size()
        if size not in self._costs:
            self._costs[size] = cost_of(self._meta[0].eval(), size, self.adapt_config.mlp_width)
        return self._costs[size]

    def controller_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs an image of all controllers when everything is executed: the most they can take."""
        patches = self.cost(image_size).num_patches
        return sum(c.context_macs + patches * c.token_score_macs for c in self._controllers())

    def least_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs that every image takes, whatever is decided: no cap can be lower."""
        if self.adapt_config.chooses_resolution:
            return min(self.macs_of_sizes().values())
        return self.cost(image_size).fixed + self._context_macs()

    def check_cap(self, cap: Budget, image_size: tuple[int, int] | None = None) -> None:
        """Raises ValueError for a cap that `run` refuses, without running anything."""
        cost = self.cost(image_size)
        batch = 1 if isinstance(cap, str) else per_image("cap", cap).numel()
        caps = _cap_macs(cap, batch, cost)
        if not self.adapt_config.chooses_resolution:
            Purse(cost, caps, self._context_macs())
        elif caps.min() < self.least_macs():
            raise self._cap_too_low()

    def _context_macs(self) -> int:
        return sum(controller.context_macs for controller in self._controllers())

    def _controllers(self) -> list[Controller]:
        return [cast(Controller, controller) for controller in self.controllers]

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
            return self._head(self.backbone.forward_features(static.check_images(images, self.backbone)))
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
        `Sampling` says how; spends what the budget says only nearly, which was measured without.

        Raises ValueError or TypeError, naming what was wrong, for images of wrong shape, type or with NaN, for a
        budget without calibration, for a cap below what embedding, controllers and classifier take, and for sample
        where no controllers decide.
        """
        _check_is_not_transformed()
        images = static.check_images(images, self.backbone)
        if execution not in ("sparse", "masked"):
            raise ValueError(f"execution={execution!r} must be 'sparse' or 'masked'")
        cap_macs = None if cap is None else _cap_macs(cap, len(images), self._cost_of(images))
        chosen = self._chosen(policy, budget, price, cap, len(images))
        if sample:
            chosen = drawing(chosen, Sampling() if sample is True else sample)
        if isinstance(chosen, Look):
            return self._look(images, chosen, cap_macs, execution)
        output = self._look(images, chosen.first, cap_macs, execution)
        again, left = self._open_images(images, output, chosen, cap_macs)
        if not len(again):
            return output
        return merged(output, again, self._look(images[again], chosen.second.of(again), left, execution))

    def _look(self, images: Tensor, look: Look, cap_macs: Counts | None, execution: str) -> Output:
        """One look. cap_macs: (B,), the most MACs of each image."""
        whole = self._cost_of(images)
        if not look.sizes:
            return self._executed(images, look.policy, cap_macs, execution, whole)
        sizes = self._sizes_of(look, images, cap_macs)
        parts = []
        for size in dict.fromkeys(sizes):
            if size is None:
                raise self._cap_too_low()
            own = torch.tensor([place for place, one in enumerate(sizes) if one == size])
            small = resized(images if len(own) == len(images) else images[own], size)
            parts.append((own, self._executed(small, look.of(own).policy, None, execution, whole)))
        return in_turn(parts)

    def _sizes_of(self, look: Look, images: Tensor, cap_macs: Counts | None) -> Sequence[Size | None]:
        """In which size each image is looked at: a cap makes it smaller, None where it allows none. Raises ValueError
        for images that are smaller, or larger, already.
        """
        if tuple(images.shape[-2:]) != self.image_size():
            height, width = self.image_size()
            raise ValueError(
                f"images are {images.shape[-2]} x {images.shape[-1]}: a model that chooses resolutions takes "
                f"{height} x {width} and makes them smaller itself"
            )
        asked = look.sizes * len(images) if len(look.sizes) == 1 else look.sizes
        return asked if cap_macs is None else within_cap(asked, cap_macs, self.macs_of_sizes())

    def macs_of_sizes(self) -> dict[Size, int]:
        """What executing everything takes in each of `image_sizes`."""
        return {size: self.cost(size).everything for size in self.image_sizes()}

    def _cap_too_low(self) -> ValueError:
        least = self.least_macs() / self.cost().backbone
        return ValueError(f"the cap is below {least:.4f}, what an image takes in the smallest size: give a larger one")

    def _executed(self, images: Tensor, policy: Policy, cap_macs: Counts | None, execution: str, whole: Cost) -> Output:
        """whole: of the images before they were made smaller."""
        cost = self._cost_of(images)
        x, steps = self._walk(images, cost, policy, cap_macs, execution)
        if cost.trims_last_block:  # nothing else is read
            x = x[:, : cost.num_prefix_tokens]
        logits = self._head(self.backbone.norm(x))
        taken = steps.decisions()
        tokens = F.pad(taken.tokens, (0, whole.num_patches - cost.num_patches))
        fraction = (steps.macs.double() / whole.backbone).float()
        grid = torch.tensor(cost.grid).expand(len(images), 2)
        return Output(logits, Trace(taken.depth, taken.heads, tokens, steps.macs, fraction, _ones(steps.macs), grid))

    def _cost_of(self, images: Tensor) -> Cost:
        return self.cost((images.shape[-2], images.shape[-1]))

    def _open_images(
        self, images: Tensor, output: Output, looks: TwoLooks, cap_macs: Counts | None
    ) -> tuple[Tensor, Counts | None]:
        """The images (n,) to look at again, on the host: those whose cap pays for more than the first look took. And
        what it leaves.
        """
        again = looks.open_images(output.logits).cpu()
        if cap_macs is None:
            return again, None
        spent = output.trace.macs.cpu().numpy()
        left = cap_macs - spent
        more = left > spent
        if looks.second.sizes:  # a larger size wants all of its MACs
            macs = self.macs_of_sizes()
            sizes = self._sizes_of(looks.second, images, left)
            more = np.array([0 if size is None else macs[size] for size in sizes]) > spent
        again = again[torch.from_numpy(more[again.numpy()])]
        return again, left[again.numpy()]

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
        images = static.check_images(images, self.backbone)
        everything = budget is None and price is None and cap is None
        if self.training and everything:
            return self._in_first_order(self.backbone.forward_features(images))
        if self.adapt_config.chooses_resolution and not everything:
            raise ValueError(
                "the features of a model that chooses resolutions are of one size: give smaller images, and no budget"
            )
        cost = replace(self._cost_of(images), trims_last_block=False)
        cap_macs = None if cap is None else _cap_macs(cap, len(images), cost)
        x, _ = self._walk(images, cost, self._policy(None, budget, price, cap, len(images)), cap_macs, "sparse")
        return self._in_first_order(self.backbone.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or pooled features, of what `forward_features` gives."""
        return self._head(x[..., self.order_channels] if self._orders_channels else x, pre_logits)

    def _head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The same of tokens whose channels stand in the blocks' order."""
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
        return self.adapt_config.head_choice == "nested" and self.adapt_config.mlp_width == "coupled"

    def embed(self, images: Tensor) -> Tensor:
        """Tokens (B, P+N, C) that enter the first block: all of them; leaving some out is a decision."""
        backbone = self.backbone
        return cast(Tensor, backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images))))

    def walk(
        self, x: Tensor, policy: Policy, execution: Execution, cost: Cost, cap_macs: Counts | None = None
    ) -> tuple[Tensor, Steps]:
        """Take embedded tokens through the blocks, leaving x itself as it is: what `run` and training share."""
        return self._through_blocks(x.clone(), policy, execution, cost, cap_macs)

    def _through_blocks(
        self, x: Tensor, policy: Policy, execution: Execution, cost: Cost, cap_macs: Counts | None
    ) -> tuple[Tensor, Steps]:
        """The same of an x that nobody needs afterwards: sparse execution writes in place where it may."""
        return walk(self.backbone.blocks, x, policy, execution, cost, self.adapt_config.rules, cap_macs)

    def _walk(
        self, images: Tensor, cost: Cost, policy: Policy, cap_macs: Counts | None, execution: str
    ) -> tuple[Tensor, Steps]:
        carried_out = Sparse(cost, self._packed) if execution == "sparse" else Masked(cost)
        return self._through_blocks(self.embed(images), policy, carried_out, cost, cap_macs)

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

    def to_timm(self, image_size: Size | None = None) -> VisionTransformer:
        """The (fine-tuned) backbone as a timm model of its own, heads, units and channels in their first order.

        image_size: (H, W), to which position embeddings are resampled; default: the model's own.

        Raises ValueError, naming it, for a layer that was put in the place of a linear one.
        """
        check_plain(static.transformer_blocks(self.backbone), "given back as timm's: merge it into the weights first")
        parameter = next(self.backbone.parameters())
        description = self._description if image_size is None else {**self._description, "dynamic_img_size": False}
        twin = static.build(description).to(device=parameter.device, dtype=parameter.dtype)
        twin.load_state_dict(self.backbone.state_dict())
        for name in ("pretrained_cfg", "default_cfg"):
            if hasattr(self.backbone, name):
                setattr(twin, name, getattr(self.backbone, name))
        static.apply_orders(twin, static.inverse_orders(self.orders()))
        if image_size is not None:
            twin.set_input_size(img_size=image_size)
        return twin.train(self.training)


def _check_is_not_transformed() -> None:
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise ValueError(
            "decisions are made in Python, from values that torch.func's transforms (grad, vmap, ...) do not show: use "
            "autograd, loss.backward() or torch.autograd.grad, or transform model.backbone, which decides nothing"
        )


@torch.inference_mode(False)  # a model that learns, wherever it was made
def adapt(
    backbone: nn.Module, calibration_images: Tensor | None = None, image_processor: Any = None, **config: Any
) -> MIAFormer:
    """Make a ViT adaptive. Its weights are kept; executing everything gives the backbone's output.

    backbone: any timm VisionTransformer of `Block` + `Attention` + `Mlp` (or a gated MLP). It is taken over, no copy:
    with nested heads its heads, MLP units and channels are reordered by importance, which changes no output. Or a ViT,
    DeiT or DINOv2 of transformers, which stays as it is: its weights are copied (`miaformer.vit.from_transformers`).
    calibration_images: (B, 3, H, W), to measure that importance on; without them it is read off the weights.
    image_processor: of a transformers model; says how pictures are prepared, and their size. Without it that is the
    size in the model's configuration, and the preparation that published models of its kind use.
    config: fields of `AdaptConfig`.

    Raises TypeError or ValueError naming the part of the backbone, or the setting, that is not supported.
    """
    known = [field.name for field in fields(AdaptConfig)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise TypeError(f"adapt() does not know {', '.join(unknown)}; settings are {', '.join(known)}")
    settings = AdaptConfig(**config)
    if is_of_transformers(backbone):
        backbone = to_timm(backbone, image_processor)
    elif image_processor is not None:
        raise TypeError("image_processor goes with a transformers model; timm's have their pretrained_cfg")
    vit = static.learning(static.check_supported(backbone))
    if settings.chooses_resolution:
        take_any_size(vit)
    static.check_describes(static.describe(vit), vit)
    if calibration_images is not None:
        static.check_images(calibration_images, vit, "calibration_images")
    if "heads" in settings.grains:
        check_plain(static.transformer_blocks(vit), "left out of in part: leave 'heads' out of the grains")
    orders = importance_orders(vit, calibration_images) if settings.cuts_heads else identity_orders(vit)
    if settings.mlp_width != "coupled":  # nothing chooses among channels
        orders["channels"] = identity_orders(vit)["channels"]
    static.apply_orders(vit, orders)
    parameter = next(vit.parameters())
    model = MIAFormer(vit, settings, orders).to(parameter.device)
    model.controllers.to(parameter.dtype)
    return model


def _cap_macs(cap: Budget, batch: int, cost: Cost) -> Counts:
    """(B,), the most that each image may take."""
    caps = [cap] if isinstance(cap, str | int | float) else per_image("cap", cap, batch).reshape(-1).tolist()
    limits = [int(check_fraction("cap", one) * cost.backbone) for one in caps]
    return np.broadcast_to(np.array(limits, dtype=np.int64), batch)


def _ones(counts: Tensor) -> Tensor:
    return torch.ones_like(counts)
