"""Sparse execution: nothing skipped is computed.

Batches are packed. The kept rows of all images that execute a block stand one after another in one (T, C) matrix,
so that linear layers and norms see no padding; images that keep the same heads are neighbours and share one call;
among them images of equal length are neighbours and share one attention call. A skipped block touches nothing. Images
that execute a block as it is go through timm's own, which in float32 is 7 to 25 % faster there (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.engine.block import Width, is_as_built, packed_block
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, HostGates, from_host
from miaformer.engine.products import Packed, products_for
from miaformer.vit.layers import turns_rows

CHUNK_ROWS = 800  # on CPU, of one call: four images of DeiT, whose memory is then needed again and again
TRAINING_ROWS = 3000  # the same where gradients are wanted, and memory is kept anyway

ROWS_THAT_COME_AGAIN = 16  # multiples of this: the learned policy rounds up to them (`AdaptConfig.token_multiple`)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sparse:
    cost: Cost
    packed: Packed | None = None  # see `MIAFormer.prepack`

    def __call__(self, index: int, block: Any, x: Tensor, gates: Gates | HostGates) -> Tensor:
        if not isinstance(gates, HostGates):
            raise TypeError("sparse execution needs boolean gates, got floating-point ones: use masked execution")
        batch, num_rows, dim = x.shape
        read_prefix = self.cost.num_prefix_tokens if self.cost.trims(index) else None
        plan = _Plan(gates, self.cost.num_prefix_tokens)
        if not len(plan.images):
            return x
        flat = x.reshape(batch * num_rows, dim)
        in_place = not torch.is_grad_enabled() or not (x.requires_grad or _learns(block))
        most_rows = batch * num_rows
        if x.device.type == "cpu":
            most_rows = CHUNK_ROWS if in_place else TRAINING_ROWS
        changed: list[tuple[Tensor, Tensor]] = []  # rows and what they become, where x must stay as it is
        for group in plan.groups(most_rows):
            if group.is_everything and read_prefix is None:
                return self._executed(block, flat, group, num_rows, None).view_as(x)
            rows = from_host(group.rows, x.device)
            given = flat if group.is_everything else flat.index_select(0, rows)
            out = self._executed(block, given, group, num_rows, read_prefix).to(flat.dtype)
            if read_prefix is not None:
                rows = from_host(group.prefix_rows, x.device)
            if in_place:
                flat.index_copy_(0, rows, out)
            else:
                changed.append((rows, out))
        if changed:
            rows, out = (torch.cat(parts) for parts in zip(*changed, strict=True))
            flat = flat.index_copy(0, rows, out)
        return flat.view_as(x)

    def _executed(self, block: Any, x: Tensor, group: _Group, num_rows: int, read_prefix: int | None) -> Tensor:
        """Rows (T, C) of a group through the block, or the prefix rows among them; num_rows: of a whole image."""
        whole = group.lengths[0] == num_rows == group.lengths[-1] and len(group.kept_heads) == block.attn.num_heads
        if whole and read_prefix is None and self.packed is None and not block.training and is_as_built(block):
            out: Tensor = block(x.view(-1, num_rows, x.shape[1]))
            return out.view(x.shape)
        width = Width.of(group.kept_heads, block, self.cost.mlp_width, x.device)
        comes_again = len(group.rows) % ROWS_THAT_COME_AGAIN == 0 or group.lengths[0] == num_rows
        products = products_for(x, comes_again, self.packed if width.cuts_views else None)
        places = from_host(group.rows % num_rows, x.device) if turns_rows(block) else None
        return packed_block(block, x, width, group.lengths, read_prefix, products, places)


def _learns(block: Any) -> bool:
    """Whether gradients are wanted of its weights: for those its input has to stay as it is."""
    return any(parameter.requires_grad for parameter in block.parameters())


@dataclass(frozen=True)
class _Group:
    """Images that share one call, sorted by length."""

    kept_heads: tuple[int, ...]
    lengths: list[int]  # rows of each of them
    rows: Indices  # (T,) of the flat batch, image by image, prefix rows first
    prefix_rows: Indices  # those of them that are prefix rows
    is_everything: bool  # all rows of the batch, in their order


class _Plan:
    """Which images execute a block, and which of them together."""

    def __init__(self, chosen: HostGates, num_prefix_tokens: int) -> None:
        self.chosen, self.prefix = chosen, num_prefix_tokens
        self.images = np.flatnonzero(chosen.depth)

    def groups(self, most_rows: int) -> Iterator[_Group]:
        """Groups of at most `most_rows` rows, or of one image."""
        chosen, images = self.chosen, self.images
        batch, num_patches = chosen.tokens.shape
        if batch == 1:
            yield self._alone()
            return
        lengths = chosen.tokens.sum(axis=1) + self.prefix
        keys = np.empty((batch, self.prefix + num_patches), dtype=bool)
        keys[:, : self.prefix] = True
        keys[:, self.prefix :] = chosen.tokens
        if len(images) == 1:
            yield self._group(images, lengths, keys)
            return
        codes = np.packbits(chosen.heads, axis=1)
        order = images[np.lexsort((lengths[images], *codes[images].T))]
        new = np.empty(len(order), dtype=bool)
        rows = 0
        for place, image in enumerate(order):
            rows += lengths[image]
            new[place] = place == 0 or rows > most_rows or (codes[image] != codes[order[place - 1]]).any()
            if new[place]:
                rows = lengths[image]
        for members in np.split(order, np.flatnonzero(new)[1:]):
            yield self._group(members, lengths, keys)

    def _alone(self) -> _Group:
        """The only image of its batch: the same as `_group` in fewer operations."""
        patches = self.chosen.tokens[0].nonzero()[0]
        prefix = np.arange(self.prefix)
        rows = np.concatenate([prefix, patches + self.prefix])
        kept = tuple(self.chosen.heads[0].nonzero()[0].tolist())
        return _Group(kept, [len(rows)], rows, prefix, len(patches) == self.chosen.tokens.shape[1])

    def _group(self, images: Indices, lengths: Indices, keys: NDArray[Any]) -> _Group:
        batch, num_rows = keys.shape
        kept = tuple(np.flatnonzero(self.chosen.heads[images[0]]).tolist())
        own_lengths = lengths[images]
        if len(images) == batch and own_lengths[0] == num_rows:
            images = np.arange(batch)
        offsets = images[:, None] * num_rows
        in_batch = offsets + np.arange(num_rows)
        return _Group(
            kept,
            own_lengths.tolist(),
            in_batch[keys[images]],
            in_batch[:, : self.prefix].ravel(),
            len(images) == batch and int(own_lengths[0]) == num_rows,
        )
