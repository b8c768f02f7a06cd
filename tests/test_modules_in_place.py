"""Modules that are put in the place of a backbone's layers, before or after it is adapted, are executed or refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters
from vits import STRUCTURES, enliven, pictures, relative, vit

from miaformer import MIAFormer, adapt
from miaformer.model.policy import Full, Random
from miaformer.vit.backbone import transformer_blocks


class Wrapped(nn.Module):
    """LoRA as peft puts it: around the layer, which it tells the size of."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + 3 * self.up(self.down(x))
        return out


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def _scaled(layer: nn.Linear) -> nn.Module:
    other = Scaled(layer.in_features, layer.out_features, layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    return other


def _pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-any-return]


def _hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, given, out: out + 0.2)
    return layer


def _patched(layer: nn.Linear) -> nn.Module:
    layer.forward = lambda x: F.linear(x, -layer.weight, layer.bias)  # type: ignore[method-assign,assignment]
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "lora": Wrapped,
    "subclass": _scaled,
    "weight_norm": parametrizations.weight_norm,
    "pruned": _pruned,
    "hook": _hooked,
    "patched": _patched,
}


def put(blocks: list[Any], kind: str, draw: random.Random) -> None:
    """One in the place of a layer of one of the blocks."""
    block = draw.choice(blocks)
    owner, names = draw.choice([(block.attn, ["qkv", "proj"]), (block.mlp, ["fc1", "fc2", "fc1_x", "fc1_g"])])
    name = draw.choice([one for one in names if hasattr(owner, one)])
    setattr(owner, name, KINDS[kind](getattr(owner, name)))


NOT_HEADS: list[dict[str, Any]] = [
    {"grains": ("depth", "tokens")},
    {"grains": ("tokens",), "mlp_width": "full"},
    {"grains": ("resolution",)},
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(NOT_HEADS),
    st.sampled_from(["plain", "swiglu", "swiglu_packed", "registers"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_they_are_executed(
    kind: str, config: dict[str, Any], structure: str, before: bool, prepack: bool, seed: int
) -> None:
    """Everything is timm's own answer, and decisions mean the same in both executions."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    backbone = vit(seed, **STRUCTURES[structure]).eval()
    if before and kind in ("subclass", "hook", "patched"):  # what has other weights is put in afterwards
        put(transformer_blocks(backbone), kind, draw)
        model = adapt(backbone, **config).eval()
    else:
        model = adapt(backbone, **config).eval()
        put(transformer_blocks(model.backbone), kind, draw)
    if prepack:
        model.prepack()
    images = pictures(model.backbone, 3)
    with torch.no_grad():
        assert relative(model.run(images, policy=Full()).logits, model.backbone(images)) < 1e-4
        some = Random(depth=0.8, tokens=0.5, seed=seed)
        sparse = model.run(images, policy=some)
        masked = model.run(images, policy=Random(depth=0.8, tokens=0.5, seed=seed), execution="masked")
    assert relative(sparse.logits, masked.logits) < 1e-4


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_of_what_is_no_plain_layer_no_heads_are_cut(kind: str) -> None:
    backbone = vit(0).eval()
    put(transformer_blocks(backbone), kind, random.Random(0))
    with pytest.raises(ValueError, match=r"cannot be executed in part|has parameters that a timm ViT|two places"):
        adapt(backbone)
    model = enliven(adapt(vit(0))).eval()
    images = pictures(model.backbone, 4)
    put([transformer_blocks(model.backbone)[0]], kind, random.Random(0))
    with torch.no_grad(), pytest.raises(ValueError, match="can only be called as a whole"):
        model.run(images, policy=Random(heads=0.4, seed=1))
    assert relative(model.run(images, policy=Full()).logits, model.backbone(images)) < 1e-4


def test_a_block_with_a_forward_of_its_own_is_refused() -> None:
    for part in (lambda block: block, lambda block: block.attn, lambda block: block.mlp):
        backbone = vit(0)
        patched = part(transformer_blocks(backbone)[1])
        patched.forward = lambda x, **_: x
        with pytest.raises(ValueError, match=r"a forward\(\) of its own"):
            adapt(backbone)
        model = adapt(vit(0)).eval()
        part(transformer_blocks(model.backbone)[1]).forward = lambda x, **_: x
        for execution in ("sparse", "masked"):
            with pytest.raises(ValueError, match=r"a forward\(\) of its own"):
                model.run(pictures(model.backbone, 1), execution=execution)


@pytest.mark.parametrize("config", NOT_HEADS, ids=lambda config: "-".join(config["grains"]))
def test_lora_learns_and_is_asked(config: dict[str, Any]) -> None:
    """Its weights alone, at whatever is executed: how people fine-tune."""
    torch.manual_seed(0)
    model = adapt(vit(0), **config).requires_grad_(False)
    for block in transformer_blocks(model.backbone):
        block.attn.qkv, block.mlp.fc1 = Wrapped(block.attn.qkv), Wrapped(block.mlp.fc1)
    before = copy.deepcopy(model)
    images = pictures(model.backbone, 4)
    learned = [p for name, p in model.named_parameters() if "down" in name or "up" in name]
    optimiser = torch.optim.AdamW([p.requires_grad_() for p in learned], lr=1e-2)
    tokens = 1.0 if "resolution" in config["grains"] else 0.7
    for step in range(2):
        for execution in ("sparse", "masked"):
            output = model.run(images, policy=Random(tokens=tokens, seed=step), execution=execution)
            F.cross_entropy(output.logits, torch.arange(4)).backward()
            assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learned)
            optimiser.step()
            optimiser.zero_grad()
    with torch.no_grad():
        assert relative(model.eval()(images), before.eval()(images)) > 1e-3


def test_they_are_not_exported_or_saved(tmp_path: Any) -> None:
    from miaformer.export import export_onnx

    model: MIAFormer = adapt(vit(0), grains=("tokens",)).eval()
    put([transformer_blocks(model.backbone)[0]], "lora", random.Random(0))
    why = r": it is test_modules_in_place\.Wrapped, not a plain torch\.nn\.Linear\."
    with pytest.raises(ValueError, match=f"of block 0 cannot be exported{why}"):
        export_onnx(model, tmp_path / "m.onnx", price=1.0)
    with pytest.raises(ValueError, match=f"of block 0 cannot be part of a timm model{why}"):
        model.to_timm()
    with pytest.raises(ValueError, match=f"of block 0 cannot be saved or restored{why}"):
        model.save_pretrained(tmp_path / "model")


def _head_replaced(model: MIAFormer) -> None:
    model.backbone.head = nn.Linear(model.embed_dim, 7)


def _head_of_layers(model: MIAFormer) -> None:
    model.backbone.head = nn.Sequential(nn.Linear(model.embed_dim, 9), nn.Linear(9, model.num_classes))


def _no_bias(model: MIAFormer) -> None:
    block = transformer_blocks(model.backbone)[1]
    block.mlp.fc1 = nn.Linear(block.mlp.fc1.in_features, block.mlp.fc1.out_features, bias=False)


@pytest.mark.parametrize("change", [_head_replaced, _head_of_layers, _no_bias])
def test_what_could_not_be_loaded_is_not_saved(change: Callable[[MIAFormer], None], tmp_path: Any) -> None:
    model = adapt(vit(0), grains=("tokens",))
    model.save_pretrained(tmp_path / "model")
    before = MIAFormer.from_pretrained(tmp_path / "model").state_dict()
    change(model)
    with pytest.raises(ValueError, match=r"which a timm ViT|has parameters that a timm ViT"):
        model.save_pretrained(tmp_path / "model")
    after = MIAFormer.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "what was saved before is lost"


def test_a_weight_in_two_places_is_refused() -> None:
    for tie in (
        lambda one, other: setattr(one.mlp.fc1, "weight", other.mlp.fc1.weight),
        lambda one, other: setattr(one, "attn", other.attn),
    ):
        backbone = vit(0)
        tie(*transformer_blocks(backbone)[:2])
        with pytest.raises(ValueError, match=r"one weight in two places, blocks\.0\.\S+ and blocks\.1"):
            adapt(backbone)


@pytest.mark.parametrize("config", [{}, *NOT_HEADS])
def test_another_input_size_is_taken_after_it_is_adapted_too(config: dict[str, Any]) -> None:
    model = adapt(vit(0), **config).eval()
    assert model.cost().num_patches == 16
    model.backbone.set_input_size(img_size=24)
    assert model.cost().num_patches == 36
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.run(images, policy=Full())
        assert relative(output.logits, model.backbone(images)) < 1e-4
    assert output.trace.tokens.shape[2] == 36


@pytest.mark.parametrize("config", [{}, {"mlp_width": "coupled"}, {"grains": ("tokens",)}])
def test_weights_lie_in_memory_as_timms_do(config: dict[str, Any], tmp_path: Path) -> None:
    model = adapt(vit(), **config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector, model.parameters())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    images = pictures(model.backbone, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = model(images, price=1.0).square().mean()
        found.backward()
        return found

    before = float(optimizer.step(loss))
    assert float(loss()) < before
