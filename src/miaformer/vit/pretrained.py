"""Your own model: a timm name, a checkpoint file, an image size and class names become a timm ViT to adapt."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as of_eva
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from miaformer.vit.backbone import Backbone, check_known, check_supported
from miaformer.vit.checkpoint_files import FLOATS, at_least_float32, read_checkpoint, some
from miaformer.vit.hub import check_hub

HEADS = ("head.", "head_dist.")  # classifiers of timm's ViTs
# What a ViT consists of. A name of these that the model lacks changes what the file's model says; any other belongs to
# something else (a decoder, a loss) and may be left out.
PARTS = ("blocks.", "patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token", "norm.", "norm_pre.",
         "fc_norm.", "attn_pool.", *HEADS)  # fmt: skip
OF_TRANSFORMERS = ("layernorm_before", ".layer_scale1.", ".layer_norm1.")  # parts of its names, and of no others
WEIGHTS_ON_HUB = ("model.safetensors", "pytorch_model.bin")  # in the order that timm looks for them

_log = logging.getLogger(__name__)


def load_backbone(
    name: str,
    weights: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: int | Sequence[str] | None = None,
    pretrained: bool = False,
    **model_args: Any,
) -> Backbone:
    """A timm ViT with the weights of a checkpoint file, for `miaformer.adapt`.

    name: of the timm model that the file was trained as. weights: a `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt`
    file, as training scripts save it: below "state_dict", "model", "model_ema" or any other key, with "module.",
    "_orig_mod.", "backbone." or any other prefix; also the own releases of DeiT, DINOv2, DINOv3 and EVA-02. Without it
    weights are random, or timm's with `pretrained`. image_size: of the images, one number or (H, W); position
    embeddings are resampled to it, as timm does. By default the file's own. classes: names of the classes, in the order
    of labels, or their number. The file's classifier is kept where it has as many, or where `classes` is None; else
    there is a new one with random weights, and a warning is logged. pretrained: download timm's weights; not tried
    where `weights` are given. model_args: of `timm.create_model`.

    Raises ValueError naming the file, and what in it is wrong or does not fit the model; TypeError for a timm model
    that is no ViT.
    """
    check_known(name)
    names, num_classes = _names_and_number(classes)
    settings = {**model_args} if image_size is None else {**model_args, "img_size": _checked_size(image_size)}
    if weights is not None:
        source, backbone = str(weights), _from_file(name, Path(weights), settings)
        had = backbone.num_classes
        if num_classes not in (None, had):
            backbone.reset_classifier(num_classes)
    else:
        if num_classes is not None:
            settings["num_classes"] = num_classes
        source, backbone = f"the pretrained {name}", _from_timm(name, pretrained, settings)
        had = backbone.pretrained_cfg["num_classes"] if pretrained else backbone.num_classes
    if backbone.num_classes not in (0, had):
        _log.warning(
            f"{source} has {f'a classifier of {had} classes' if had else 'no classifier'}: the new one for "
            f"{backbone.num_classes} classes has random weights, and must be trained"
        )
    cfg = {key: value for key, value in backbone.pretrained_cfg.items() if key != "label_names"}
    cfg["num_classes"] = backbone.num_classes
    if names is not None:
        cfg["label_names"] = names
    backbone.pretrained_cfg = backbone.default_cfg = cfg
    return cast(Backbone, backbone)


def _names_and_number(classes: int | Sequence[str] | None) -> tuple[list[str] | None, int | None]:
    if classes is None:
        return None, None
    if isinstance(classes, str) or (isinstance(classes, int) and classes < 0):
        raise ValueError(f"classes={classes!r} must be the number of classes, or a list of their names")
    return (None, classes) if isinstance(classes, int) else (list(classes), len(classes))


def _checked_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size={image_size!r} must be positive: the height and width of images in pixels")
    return height, width


def _create(name: str, settings: dict[str, Any], pretrained: bool = False) -> Any:
    """A backbone, whose attributes torch types as "tensor or module"."""
    try:
        return check_supported(timm.create_model(name, pretrained=pretrained, **settings))
    except RuntimeError as error:  # a tag that there is not, a model that nobody published weights of
        raise ValueError(f"timm cannot make {name!r}: {error}") from error


# A file --------------------------------------------------------------------------------------------------------------


def _from_file(name: str, path: Path, settings: dict[str, Any]) -> Any:
    """The model with the weights of the file, its classifier included."""
    state = read_checkpoint(path)
    backbone = _create(name, settings)
    size = _file_image_size(state, backbone)
    takes_its_size = size not in (None, backbone.patch_embed.img_size) and "img_size" not in settings
    if takes_its_size:
        backbone = _create(name, {**settings, "img_size": size})
    fit = _Fit(name, path, state, backbone)
    kernel = state.get("patch_embed.proj.weight")
    flexi = "flexi" in name  # as in timm, which resamples FlexiViT's embeddings in another way
    try:
        if isinstance(backbone, Eva):
            state = of_eva(state, backbone)
        else:
            state = checkpoint_filter_fn(
                state,
                backbone,
                adapt_layer_scale=True,  # DeiT III's own releases have another name for it
                interpolation="bilinear" if flexi else "bicubic",
                antialias=not flexi,
            )
    except RuntimeError as error:
        raise fit.error(f"position or patch embeddings cannot be resampled ({error})") from error
    backbone.reset_classifier(len(state["head.weight"]) if "head.weight" in state else 0)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if kernel is not None and kernel.ndim == 4:
        # timm resamples patches of another size too: such a file was trained as another model.
        shapes["patch_embed.proj.weight"] = tuple(kernel.shape)
    fit.check(shapes)
    wanted = backbone.state_dict().keys()
    for key in wanted:
        if state[key].dtype not in FLOATS:
            raise ValueError(f"{path} holds {key} as {state[key].dtype}: give weights that are not quantised")
        if not state[key].isfinite().all():
            raise ValueError(f"{path} holds NaN or infinite values in {key}: its training failed, or it is damaged")
    if takes_its_size:
        _log.warning(f"{path} is for images of {_times(backbone.patch_embed.img_size)}, and so is the model")
    left_out = sorted(state.keys() - wanted)
    if left_out:
        _log.warning(f"{path} holds more than a ViT; left out: {some(left_out)}")
    backbone.to(at_least_float32()).load_state_dict({key: state[key] for key in wanted})
    return backbone


def _file_image_size(state: dict[str, Tensor], backbone: Any) -> tuple[int, int] | None:
    """(H, W) of the images that position embeddings in a file are for; None where they do not say it.

    Only square ones do: a file holds their number. The class token may have one, or not, whatever the model does.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or backbone.pos_embed is None:
        return None
    own = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    if table.shape[1] - own == backbone.patch_embed.num_patches:
        return backbone.patch_embed.img_size
    for prefix in (own, 1, 0):
        side = math.isqrt(max(table.shape[1] - prefix, 0))
        if side and side * side == table.shape[1] - prefix:
            height, width = backbone.patch_embed.patch_size
            grid = tuple(backbone.patch_embed.grid_size)
            return backbone.patch_embed.img_size if grid == (side, side) else (side * height, side * width)
    return None


class _Fit:
    """Whether a file's tensors are those of a model, and an error that says why not."""

    def __init__(self, name: str, path: Path, state: dict[str, Tensor], backbone: Any) -> None:
        self.name, self.path, self.backbone = name, path, backbone
        self.found = _described({key: tuple(value.shape) for key, value in state.items()})
        self.of_transformers = any(part in key for key in state for part in OF_TRANSFORMERS)

    def check(self, found: dict[str, tuple[int, ...]]) -> None:
        wanted = {key: tuple(value.shape) for key, value in self.backbone.state_dict().items()}
        missing = [key for key in wanted if key not in found]
        unexpected = [key for key in found if key not in wanted and key.startswith(PARTS)]
        differ = [
            f"{key} ({_times(found[key])} in the file, {_times(wanted[key])} in the model)"
            for key in wanted
            if found.get(key, wanted[key]) != wanted[key]
        ]
        problems = (("missing", missing), ("not in the model", unexpected), ("of another shape", differ))
        told = [f"{problem}: {some(names)}" for problem, names in problems if names]
        if told:
            raise self.error("; ".join(told))

    def error(self, problem: str) -> ValueError:
        if self.of_transformers:
            advice = "Its names are those of transformers: load it there, and give the model to miaformer.adapt"
        else:
            own = _described({key: tuple(value.shape) for key, value in self.backbone.state_dict().items()})
            advice = f"The file holds {self.found}, the model {own}: name the timm model that the file was trained as"
        return ValueError(f"{self.path} does not fit timm's {self.name}. {problem[0].upper()}{problem[1:]}. {advice}")


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    if not depth:
        return "no blocks of a ViT"
    kernel = shapes.get("patch_embed.proj.weight", ())
    patches = f" of {kernel[0]} channels, patches of {_times(kernel[2:])}" if len(kernel) == 4 else ""
    return f"{depth} blocks{patches}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# timm's hub ----------------------------------------------------------------------------------------------------------


def _from_timm(name: str, pretrained: bool, settings: dict[str, Any]) -> Any:
    if not pretrained:
        return _create(name, settings)
    if not settings.keys() & {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}:  # which name another source
        _check_hub(name)
    try:
        return _create(name, settings, pretrained=True)
    except OSError as error:
        raise ValueError(_unreachable(name, error)) from error


def _check_hub(name: str) -> None:
    """Raise ValueError at once where weights are neither in the cache nor to be had."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    repo, _, revision = cfg.hf_hub_id.partition("@")
    try:
        check_hub(repo, [cfg.hf_hub_filename] if cfg.hf_hub_filename else WEIGHTS_ON_HUB, revision or None)
    except ConnectionError as error:
        raise ValueError(_unreachable(name, error)) from error


def _unreachable(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    cfg = timm.get_pretrained_cfg(name)
    place = f", from https://huggingface.co/{cfg.hf_hub_id}" if cfg is not None and cfg.hf_hub_id else ""
    return (
        f"the pretrained weights of {name} cannot be downloaded ({reason}): download the file elsewhere{place}, "
        "and give it with --weights FILE (in Python miaformer.load_backbone(name, weights=FILE))"
    )
