"""Which heads, MLP units and channels matter most, so that nested choices keep those.

Data-free by default: how much a unit can pass on, from the norms of the weights around it. With a calibration
batch: how much it does pass on, the norm of its contribution averaged over images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from miaformer.vit.backbone import Backbone, channels_are_free, transformer_blocks
from miaformer.vit.layers import input_layers, mlp_inputs, query_key_value_layers, shares_keys


def importance_orders(backbone: Backbone, images: Tensor | None = None) -> dict[str, Tensor]:
    """Permutations, most important first: `heads` (L, H), `hidden` (L, units), `channels` (C,).

    images: (B, 3, H, W) normalised, of a calibration batch; None for the data-free order.
    """
    with torch.no_grad():
        scales = [_unit_scales(block) for block in transformer_blocks(backbone)]
        if images is not None:
            scales = _measured_scales(backbone, images)
        heads, hidden, channels = [], [], torch.zeros(backbone.embed_dim)
        for block, (head_input, hidden_input, norm2_output) in zip(transformer_blocks(backbone), scales, strict=True):
            attn, mlp = block.attn, block.mlp
            if shares_keys(attn):  # they stay where they are
                heads.append(-torch.arange(attn.num_heads).float())
            else:
                passed_on = head_input * attn.proj.weight.norm(dim=0)
                heads.append(passed_on.view(attn.num_heads, -1).square().sum(dim=1).cpu())
            hidden.append(hidden_input * mlp.fc2.weight.norm(dim=0))
            value, _, _ = mlp_inputs(mlp)
            read, written = norm2_output * value.weight.norm(dim=0), mlp.fc2.weight.norm(dim=1)
            channels += (read / read.mean().clamp(min=1e-12) + written / written.mean().clamp(min=1e-12)).cpu()
    if not channels_are_free(backbone):
        channels = -torch.arange(len(channels)).float()

    def order(score: Tensor) -> Tensor:
        return score.float().cpu().argsort(dim=-1, descending=True, stable=True)

    return {
        "heads": order(torch.stack(heads)),
        "hidden": order(torch.stack(hidden)),
        "channels": order(channels),
    }


def identity_orders(backbone: Backbone) -> dict[str, Tensor]:
    depth, attn = len(backbone.blocks), transformer_blocks(backbone)[0].attn
    hidden = transformer_blocks(backbone)[0].mlp.fc2.in_features
    return {
        "heads": torch.arange(attn.num_heads).repeat(depth, 1),
        "hidden": torch.arange(hidden).repeat(depth, 1),
        "channels": torch.arange(backbone.embed_dim),
    }


def _unit_scales(block: Any) -> tuple[Tensor, Tensor, Tensor]:
    """How large inputs of projection, second MLP layer and first MLP layer can be, from weights alone."""
    _, _, value = query_key_value_layers(block.attn)
    hidden, gate, _ = mlp_inputs(block.mlp)
    hidden_scale = hidden.weight.norm(dim=1)
    if gate is not None:
        hidden_scale = hidden_scale * gate.weight.norm(dim=1)
    norm = getattr(block.norm2, "weight", None)
    dim = block.mlp.fc2.out_features
    return value.weight.norm(dim=1), hidden_scale, torch.ones(dim) if norm is None else norm.abs()


def _measured_scales(backbone: Backbone, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same, as root mean squares over the tokens of `images`."""
    measured: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        measured[module] = inputs[0].float().square().flatten(0, -2).mean(dim=0).sqrt()

    layers = [(block.attn.proj, block.mlp.fc2, input_layers(block.mlp)[0]) for block in transformer_blocks(backbone)]
    hooks = [layer.register_forward_pre_hook(record) for three in layers for layer in three]
    training = backbone.training
    try:
        backbone.eval()(images)
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    return [(measured[proj], measured[fc2], measured[fc1]) for proj, fc2, fc1 in layers]
