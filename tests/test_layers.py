"""The layers of a block, read, called and put together, are the block: of every family and structure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vits import STRUCTURES, relative, vit

import miaformer
from miaformer.vit.backbone import transformer_blocks
from miaformer.vit.layers import (
    attention_scale,
    hidden_units,
    mlp_inputs,
    mlp_scale,
    normed_keys,
    normed_queries,
    query_key_value,
    query_key_value_layers,
    scaled,
)


def put_together(block: Any, x: Tensor) -> Tensor:
    """A block's result on x (B, n, C), from what is asked of its layers alone."""
    attn, y = block.attn, block.norm1(x)
    q, k, v = (part.transpose(1, 2) for part in query_key_value(attn, lambda layer: layer(y)))
    out = F.scaled_dot_product_attention(normed_queries(attn, q), normed_keys(attn, k), v)
    x = x + scaled(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))), attention_scale(block))
    y = block.norm2(x)
    y = block.mlp.fc2(block.mlp.norm(hidden_units(block.mlp, lambda layer: layer(y))))
    return x + scaled(y, mlp_scale(block))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_put_together_are_the_block(structure: str) -> None:
    block = transformer_blocks(vit(1, **STRUCTURES[structure]).double().eval())[0]
    attn, mlp = block.attn, block.mlp
    x = torch.randn(2, 5, mlp.fc2.out_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert relative(put_together(block, x), block(x)) < 1e-12
        called = query_key_value(attn, lambda layer: layer(x))
        for part, layer in zip(called, query_key_value_layers(attn), strict=True):
            assert relative(F.linear(x, *layer).unflatten(2, part.shape[2:]), part) < 1e-12
        value, gate, activate_value = mlp_inputs(mlp)
        values = F.linear(x, value.weight, value.bias)
        gates = None if gate is None else F.linear(x, gate.weight, gate.bias)
        read = mlp.act(values) if activate_value else values
        if gates is not None:
            read = read * (gates if activate_value else mlp.act(gates))
        assert relative(read, hidden_units(mlp, lambda layer: layer(x))) < 1e-12


def test_no_other_module_knows_how_a_family_makes_its_queries() -> None:
    source = Path(miaformer.__file__).parent
    knowing = {"vit/layers.py", "vit/backbone.py", "vit/from_transformers.py", "export/blocks.py"}
    found = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if re.search(r"\.(qkv|q_norm|k_norm|fc1_x|fc1_g|ls1|ls2)\b", path.read_text())
    }
    assert found <= knowing
