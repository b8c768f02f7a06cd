"""A convolutional stem in the place of the patch embedding (Xiao et al. 2021, "Early convolutions help").

For small images and small ViTs: its patches overlap, and a last depthwise convolution lets each see its neighbours. So
what a skipped token would have said is in part known to those around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

NEIGHBOURHOOD = 5  # kernel of the depthwise convolution, in patches


class ConvStem(nn.Sequential):
    """Convolutions of stride 2 to `channels`, one depthwise over neighbouring patches, and a product to `embed_dim`.

    Each but the last is followed by GroupNorm of one group, which leaves every image to itself, and GELU. In place of
    `PatchEmbed.proj`: (B, in_chans, H, W) -> (B, embed_dim, H / 2^n, W / 2^n) of n channels; its weight and bias are
    those of the last product.
    """

    def __init__(self, in_chans: int, channels: Sequence[int], embed_dim: int, bias: bool = True, **where: Any) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((in_chans, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False, **where), *_norm(after, where)]
        width, kernel = channels[-1], NEIGHBOURHOOD
        mix = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False, **where)
        layers += [mix, *_norm(width, where), nn.Conv2d(width, embed_dim, 1, bias=bias, **where)]
        super().__init__(*layers)
        self.channels = tuple(channels)

    @property
    def weight(self) -> Tensor:
        return self[-1].weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self[-1].bias  # type: ignore[return-value]


def _norm(channels: int, where: dict[str, Any]) -> list[nn.Module]:
    return [nn.GroupNorm(1, channels, **where), nn.GELU()]


class ConvPatchEmbed(PatchEmbed):
    """timm's patch embedding with a `ConvStem`: `timm.create_model(..., embed_layer=partial(ConvPatchEmbed, ...))`.

    stem_channels: of the convolutions of stride 2, as many as halvings make the patch size: two for patches of 4.
    Raises ValueError where they do not.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        stem_channels: Sequence[int],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **settings: Any,
    ) -> None:
        where = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **settings, **where)
        halvings = len(stem_channels)
        if not halvings or self.patch_size != (2**halvings, 2**halvings):
            raise ValueError(
                f"stem_channels={tuple(stem_channels)} make patches of {2**halvings}, patch_size is {self.patch_size}"
            )
        self.proj = ConvStem(in_chans, stem_channels, embed_dim, bias, **where)  # type: ignore[assignment]
