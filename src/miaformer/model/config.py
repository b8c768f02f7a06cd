"""How a backbone is made adaptive: which decisions there can be (docs/concepts.md), and the size of the controllers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from miaformer.engine.controller import Controller, Controllers
from miaformer.engine.decisions import DepthChoice, HeadChoice, MlpWidth, Rules, TokenScope

ControlledGrain = Literal["depth", "heads", "tokens"]  # what controllers decide
Grain = Literal[ControlledGrain, "resolution"]
TokenChoice = Literal["content", "even"]


@dataclass(frozen=True)
class AdaptConfig:
    """The settings of `adapt`."""

    grains: tuple[Grain, ...] = ("depth", "heads", "tokens")  # what is decided; the rest is always kept
    mlp_width: MlpWidth = "hidden"
    token_scope: TokenScope = "progressive"
    head_choice: HeadChoice = "nested"
    depth_choice: DepthChoice = "any"  # nested: the executed blocks are the first ones, and an image leaves after them
    controller_hidden: int | None = None  # width of a controller's context; None: a third of the channels, 8 to 32
    controller_rank: int | None = None  # of the token product; None: a twelfth of the channels, 4 to 16
    first_token_block: int | None = None  # tokens are decided from this block on; None: 2, or 1 of up to 4 blocks
    last_token_block: int | None = None  # and up to this one; None: to the end
    dither: bool = True  # tokens are kept by thresholds that lie evenly over the image (`miaformer.engine.dither`)
    token_choice: TokenChoice = "content"  # even: controllers say how many tokens an image keeps, thresholds which
    token_multiple: int | None = None  # rows kept are rounded up to this; None: 16 from 128 patch tokens on, else 1
    looks: int = 1  # 2: an image whose first answer is not confident is looked at again (`miaformer.model.looks`)
    least_resolution: float = 0.5  # of the image's sides, of the smallest size that is looked at: grain "resolution"

    @property
    def chooses_resolution(self) -> bool:
        """Whether looks differ in the size of the image, and no controllers decide."""
        return "resolution" in self.grains

    @property
    def looks_twice(self) -> bool:
        """Whether an image may be looked at again: nothing else tells which size it needs."""
        return self.looks == 2 or self.chooses_resolution

    @property
    def cuts_heads(self) -> bool:
        """Whether weights are sliced to the first heads."""
        return self.head_choice == "nested" and "heads" in self.grains

    @property
    def rules(self) -> Rules:
        return Rules(self.depth_choice, self.head_choice, self.token_scope)

    def controllers(self, depth: int, embed_dim: int, num_heads: int) -> Controllers:
        """Untrained ones for a backbone of so many blocks, channels and heads; none where sizes are chosen instead."""
        if self.chooses_resolution:
            return Controllers()
        hidden = self.controller_hidden or min(32, max(8, embed_dim // 3))
        rank = self.controller_rank or min(16, max(4, embed_dim // 12))
        rules, token_blocks = self.rules, self.token_blocks(depth)
        return Controllers(
            Controller(
                embed_dim,
                num_heads,
                hidden,
                rank if index in token_blocks else 0,
                nested=rules.nested_heads,
                depth="depth" in self.grains and not (rules.leaves and index == 0),  # nobody leaves before the first
                heads="heads" in self.grains,
                dithers=self.dither,
                leaves=rules.leaves,
                even=self.token_choice == "even",
            )
            for index in range(depth)
        )

    def token_blocks(self, depth: int) -> range:
        """The blocks, of so many, whose tokens are decided.

        Raises ValueError where there is none between the first and the last one asked for.
        """
        if "tokens" not in self.grains:
            return range(0)
        first, last = self.first_token_block, self.last_token_block
        if first is None:
            first = 2 if depth > 4 else 1
        blocks = range(first, depth if last is None else min(last + 1, depth))
        if not blocks and (last is not None or self.first_token_block is not None):
            raise ValueError(
                f"tokens would be decided from block {first} on, up to "
                f"{f'last_token_block={last}' if last is not None else f'the last of {depth} blocks'}: nowhere"
            )
        return blocks

    def rows_multiple(self, num_patches: int) -> int:
        """What the learned policy rounds the rows of an image up to, for images of so many patch tokens.

        Kernels are compiled or tuned for a number of rows: few numbers come again, many do not (docs/speed.md).
        """
        return self.token_multiple or (16 if num_patches >= 128 else 1)

    def __post_init__(self) -> None:
        grains = tuple(self.grains)
        if not grains or len(set(grains)) < len(grains) or not set(grains) <= set(get_args(Grain)):
            raise ValueError(f"grains={self.grains!r} must be some of {', '.join(get_args(Grain))}, each once")
        object.__setattr__(self, "grains", grains)  # read from a file it is a list
        if self.chooses_resolution and len(grains) > 1:
            raise ValueError(f"grains={self.grains!r}: 'resolution' is decided alone, by how sure a first look is")
        for name, choices in (
            ("mlp_width", MlpWidth),
            ("token_scope", TokenScope),
            ("head_choice", HeadChoice),
            ("depth_choice", DepthChoice),
            ("token_choice", TokenChoice),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(choices))}")
        if self.token_choice == "even" and not self.dither:
            raise ValueError("token_choice='even' needs dither: all tokens of an image would go at once")
        for name, least in (
            ("controller_hidden", 1),
            ("controller_rank", 1),
            ("first_token_block", 0),
            ("last_token_block", 0),
            ("token_multiple", 1),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if self.looks not in (1, 2):
            raise ValueError(f"looks={self.looks!r} must be 1 or 2")
        if not 0 < self.least_resolution < 1:
            raise ValueError(
                f"least_resolution={self.least_resolution!r} must be a share of the sides, between 0 and 1"
            )
