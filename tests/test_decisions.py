"""Decisions are well-formed, and the semantics' rules turn any of them into ones that can be executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miaformer.engine.decisions import Decisions, Gates, HostGates, Rules


def draw_bools(generator: torch.Generator, keep: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) < keep


@st.composite
def asked(draw: st.DrawFn) -> tuple[Gates, Tensor]:
    """Gates of one block that a policy may ask for, and the tokens that it may keep."""
    batch, num_heads, num_patches = draw(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keeps = draw(st.tuples(*[st.sampled_from([0.0, 0.3, 0.7, 1.0])] * 4))
    gates = Gates(
        draw_bools(generator, keeps[0], batch),
        draw_bools(generator, keeps[1], batch, num_heads),
        draw_bools(generator, keeps[2], batch, num_patches),
    )
    return gates, draw_bools(generator, keeps[3], batch, num_patches)


def effective(gates: Gates, active: Tensor, num_prefix_tokens: int, head_choice: Any) -> Gates:
    return HostGates.of(gates).effective(active.numpy(), num_prefix_tokens, Rules(head_choice=head_choice)).to("cpu")


@given(asked(), st.integers(0, 2), st.sampled_from(["nested", "subset"]))
def test_effective_gates_obey_every_rule(
    example: tuple[Gates, Tensor], num_prefix_tokens: int, head_choice: str
) -> None:
    gates, active = example
    found = effective(gates, active, num_prefix_tokens, head_choice)
    for image in range(len(gates.depth)):
        tokens = gates.tokens[image] & active[image]
        executes = bool(gates.depth[image]) and (num_prefix_tokens > 0 or bool(tokens.any()))
        asked_heads = gates.heads[image].nonzero().flatten().tolist()
        if head_choice == "nested":
            wanted_heads = list(range(max(1, len(asked_heads))))
        else:
            wanted_heads = asked_heads or [0]
        assert bool(found.depth[image]) == executes
        assert found.heads[image].nonzero().flatten().tolist() == (wanted_heads if executes else [])
        assert torch.equal(found.tokens[image], tokens & executes)


@given(asked(), st.integers(0, 2), st.sampled_from(["nested", "subset"]))
def test_effective_gates_stay_as_they_are(
    example: tuple[Gates, Tensor], num_prefix_tokens: int, head_choice: str
) -> None:
    once = effective(*example, num_prefix_tokens, head_choice)
    twice = effective(once, example[1], num_prefix_tokens, head_choice)
    for name in ("depth", "heads", "tokens"):
        assert torch.equal(getattr(once, name), getattr(twice, name))


def test_effective_gates_leave_the_policys_own_untouched() -> None:
    gates = Gates(torch.tensor([True]), torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    effective(gates, torch.zeros(1, 2, dtype=torch.bool), 1, "subset")
    assert not gates.heads.any()
    assert gates.tokens.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": torch.ones(2, 3)}, "Decisions.depth must be a bool tensor with 2 dimensions, got torch.float32"),
        ({"heads": torch.ones(2, 4, dtype=torch.bool)}, r"Decisions.heads must be .* 3 dimensions, got .*\(2, 4\)"),
        ({"tokens": [[True]]}, "Decisions.tokens must be a bool tensor with 3 dimensions, got <class 'list'>"),
        ({"tokens": torch.ones(2, 5, 7, dtype=torch.bool)}, r"disagree on \(images, blocks\).*\(2, 5, 7\)"),
        ({"depth": torch.ones(1, 3, dtype=torch.bool)}, r"disagree on \(images, blocks\).*\(1, 3\)"),
    ],
)
def test_decisions_of_a_wrong_kind_are_named(change: dict[str, object], message: str) -> None:
    full = Decisions.full(2, 3, 4, 7)
    given_ = {"depth": full.depth, "heads": full.heads, "tokens": full.tokens, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        Decisions(**given_)  # type: ignore[arg-type]


def test_a_part_of_the_images_keeps_their_decisions() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = Decisions(*(draw_bools(generator, 0.5, 4, 3, *rest) for rest in [(), (2,), (5,)]))
    for part in (slice(1, 3), [1, 2], torch.tensor([1, 2])):
        assert len(whole[part]) == 2
        assert torch.equal(whole[part].tokens, whole.tokens[1:3])
    gates = whole.block(2)
    assert torch.equal(gates.heads, whole.heads[:, 2])
    assert torch.equal(gates.tokens, whole.tokens[:, 2])
    assert torch.equal(gates.depth, whole.depth[:, 2])
