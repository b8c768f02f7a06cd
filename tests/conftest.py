"""What many tests start from."""

from __future__ import annotations

import pytest
from hypothesis import settings
from vits import lively

from miaformer import MIAFormer

# The same examples in every run; machines that run tests are too uneven for deadlines.
settings.register_profile("seeded", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("seeded")


@pytest.fixture
def lively_model() -> MIAFormer:
    """A small adapted ViT in double precision, at a price of 1 deciding differently for each image."""
    return lively()
