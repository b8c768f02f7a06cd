"""Where an image keeps a share of its tokens, they lie evenly over it, and their share is what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaformer.engine.dither import dither


def kept(rows: int, columns: int, share: float) -> np.ndarray:
    return (np.log(share / (1 - share)) + dither(rows, columns) > 0).reshape(rows, columns)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 0.99))
def test_equal_probabilities_keep_that_share(rows: int, columns: int, share: float) -> None:
    assert abs(kept(rows, columns, share).sum() - share * rows * columns) <= 0.5 + 1e-6


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 0.98), st.floats(0.001, 0.5))
def test_more_keep_what_fewer_kept(rows: int, columns: int, share: float, more: float) -> None:
    assert kept(rows, columns, min(share + more, 0.99))[kept(rows, columns, share)].all()


@pytest.mark.parametrize("side", [8, 14, 16])
@pytest.mark.parametrize("share", [0.25, 0.35, 0.5, 0.75])
def test_every_part_of_the_image_keeps_its_share(side: int, share: float) -> None:
    windows = np.lib.stride_tricks.sliding_window_view(kept(side, side, share), (4, 4)).mean(axis=(2, 3))
    drawn = np.random.default_rng(0).random((200, side, side)) < share
    of_drawn = np.lib.stride_tricks.sliding_window_view(drawn, (4, 4), axis=(1, 2)).mean(axis=(3, 4))
    assert abs(windows - share).max() <= 0.15
    assert np.abs(of_drawn - share).max(axis=(1, 2)).mean() > 2 * abs(windows - share).max()
