"""I1 for every ViT that the installed timm knows by name, in `vision_transformer`, `deit` and `eva`.

Each is built without pretrained weights, at its full width and depth, for images of 3 x 3 patches, with random
weights. Models of more than 400 million parameters are cut to two blocks. Run with `make test-zoo`.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor
from vits import WITHOUT_HEADS, pictures, relative

import miaformer
from miaformer import Decisions
from miaformer.engine.cost import count_macs
from miaformer.model.policy import Fixed

pytestmark = pytest.mark.zoo

NAMES = sorted({name for module in ("vision_transformer", "deit", "eva") for name in timm.list_models(module=module)})
LARGE = 400_000_000  # parameters
SIDE = 3  # patches


def built(name: str, **settings: Any) -> Any:
    """Without memory for weights."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **settings).eval()


def kind(backbone: Any) -> str:
    """ "plain" or "gated" by what its blocks are made of, else the name of what is unusual."""
    block = backbone.blocks[0]
    usual = (
        (block, (Block, EvaBlock, EvaBlockPostNorm)),
        (getattr(block, "attn", None), (Attention, EvaAttention, AttentionRope)),
    )
    for part, kinds in usual:
        if type(part) not in kinds:
            return type(part).__name__
    return {Mlp: "plain", SwiGLU: "gated", GluMlp: "gated"}.get(type(block.mlp), type(block.mlp).__name__)


def shares_keys(backbone: Any) -> bool:
    """Whether some of its blocks have grouped-query attention."""
    return any(getattr(one.attn, "num_kv_heads", one.attn.num_heads) < one.attn.num_heads for one in backbone.blocks)


def small(name: str) -> Any:
    """At full width, with random weights, for small images."""
    backbone = built(name)
    settings: dict[str, Any] = {"img_size": tuple(SIDE * p for p in backbone.patch_embed.patch_size)}
    if sum(p.numel() for p in backbone.parameters()) > LARGE:
        settings["depth"] = 2
        if shares_keys(backbone):  # in its middle
            settings["num_kv_heads"] = [backbone.blocks[i].attn.num_kv_heads for i in (0, len(backbone.blocks) // 2)]
    model = built(name, **settings).to_empty(device="cpu")
    for part in model.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    return filled(model)


def filled(backbone: Any) -> Any:
    """Random weights by repeating a million numbers, which is far quicker than drawing a billion."""
    bank = torch.empty(1_000_003).uniform_(-1.7, 1.7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index, (name, parameter) in enumerate(backbone.named_parameters()):
            numbers = bank.roll(7919 * index).repeat(parameter.numel() // len(bank) + 1)[: parameter.numel()]
            parameter.copy_(numbers.view_as(parameter))
            if parameter.ndim == 1 and name.endswith(("weight", "gamma")):
                parameter.mul_(0.3).add_(1)
            elif parameter.ndim == 1 or "token" in name or "pos_embed" in name or "latent" in name:
                parameter.mul_(0.5)
            else:
                parameter.mul_(math.prod(parameter.shape[1:]) ** -0.5)
    return backbone


def drawn(model: miaformer.MIAFormer, batch: int) -> Decisions:
    cost, generator = model.cost(), torch.Generator().manual_seed(0)

    def draw(keep: float, *shape: int) -> Tensor:
        return torch.rand(batch, cost.depth, *shape, generator=generator) < keep

    return Decisions(draw(0.8), draw(0.7, cost.num_heads), draw(0.6, cost.num_patches))


@pytest.mark.parametrize("name", NAMES)
def test_every_supported_vit_is_reproduced(name: str) -> None:
    """By full decisions; any others are executed sparse as they are masked; and to_timm undoes it all."""
    unusual = kind(built(name))
    if unusual not in ("plain", "gated"):
        with pytest.raises(ValueError, match=f"Block \\d+ of the backbone has .*{unusual}.* not supported"):
            miaformer.adapt(built(name))
        return
    backbone = small(name)
    weights = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    grains = WITHOUT_HEADS if shares_keys(backbone) else {}
    images = pictures(backbone, 2)
    with torch.no_grad():
        logits = backbone(images)
        macs = count_macs(lambda: backbone(images[:1]))
        norms_results = isinstance(backbone.blocks[0], EvaBlockPostNorm)
        model = miaformer.adapt(
            backbone, mlp_width="hidden" if norms_results else "coupled", head_choice="nested", **grains
        ).eval()
        assert model.cost().backbone == macs
        assert relative(model(images), logits) <= 1e-4
        assert relative(model.run(images, execution="masked").logits, logits) <= 1e-4
        policy = Fixed(drawn(model, 2))
        sparse, masked = (model.run(images, policy, execution=e) for e in ("sparse", "masked"))
        assert relative(sparse.logits, masked.logits) <= 1e-3
        counted = count_macs(lambda: model.run(images, policy))
        assert counted == int(sparse.trace.macs.sum())
        back = model.to_timm()
    found = back.state_dict()
    assert found.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(found[key], weights[key])] == []
    with torch.no_grad():  # the other choices leave the backbone as it is
        subset = miaformer.adapt(back, mlp_width="hidden", head_choice="subset", **grains).eval()
        assert relative(subset(images), logits) <= 1e-4


def test_as_many_are_supported_as_promised() -> None:
    kinds = [kind(built(name)) for name in NAMES]
    assert (kinds.count("plain"), kinds.count("gated"), len(kinds)) == (197, 37, 244)


def test_the_page_of_models_is_current() -> None:
    zoo = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "zoo.py"))
    text = zoo["PAGE"].read_text(encoding="utf-8")
    if f"timm {timm.__version__}." not in text:
        pytest.skip("the page was written from another timm")
    assert text == zoo["page"](), "python benchmarks/zoo.py writes it anew"
