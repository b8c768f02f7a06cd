"""The layers of a block, read, called and put together, are the block: of every family and structure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vits import ALL_STRUCTURES, pictures, relative, vit

import miaformer
from miaformer.vit.embedding import embedded
from miaformer.vit.layers import (
    attention_input,
    attention_result,
    for_each_head,
    hidden_units,
    mlp_input,
    mlp_inputs,
    mlp_result,
    normed_keys,
    normed_queries,
    query_key_value,
    query_key_value_layers,
)


def put_together(block: Any, x: Tensor) -> Tensor:
    """A block's result on x (B, n, C), from what is asked of its layers alone."""
    attn, y = block.attn, attention_input(block, x)
    q, k, v = query_key_value(attn, lambda layer: layer(y))
    q, k, v = normed_queries(block, q), normed_keys(block, k), for_each_head(attn, v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    x = x + attention_result(block, attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    y = mlp_input(block, x)
    return x + mlp_result(block, block.mlp.fc2(block.mlp.norm(hidden_units(block.mlp, lambda layer: layer(y)))))


@pytest.mark.parametrize("structure", ALL_STRUCTURES)
def test_layers_put_together_are_the_block(structure: str) -> None:
    backbone = vit(1, **ALL_STRUCTURES[structure]).double().eval()
    x, blocks = embedded(backbone, pictures(backbone, 2))
    block, x = blocks[0], x.detach()
    attn, mlp = block.attn, block.mlp
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
    knowing = {
        "vit/layers.py",
        "vit/backbone.py",
        "vit/eva.py",
        "vit/importance.py",
        "vit/checkpoint_files.py",
        "vit/from_transformers.py",
        "vit/transformers_models.py",
        "export/blocks.py",
    }
    found = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if re.search(r"\.(qkv|k_norm|fc1_x|fc1_g|ls1|ls2|norm1|norm2|gamma_1|gamma_2)\b", path.read_text())
    }
    assert found <= knowing
