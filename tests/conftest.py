"""What many tests start from."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import batches_of, class_folders, classifier
from hypothesis import settings
from vits import lively

from miaformer import MIAFormer
from miaformer.evaluation import calibrate

# The same examples in every run; machines that run tests are too uneven for deadlines.
settings.register_profile("seeded", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("seeded")


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at it again, half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or what is left at the end is reported as a leak


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exported files and chosen engines: neither found in the user's cache nor left there. And the same products on
    every machine.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MIAFORMER_PRODUCTS", "onednn")
        patched.setenv("MIAFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """PyTorch parses its thousand ONNX functions anew for each graph that is exported, which takes half of the time of
    exporting a small model: here once. Each export gets a copy, for what it registers itself.
    """
    from torch.onnx._internal.exporter import _registration

    parsed = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def copied(**settings: Any) -> Any:
        registry = copy.copy(parsed(**settings))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture
def lively_model() -> MIAFormer:
    """A small adapted ViT in double precision, at a price of 1 deciding differently for each image."""
    return lively()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "uncalibrated"
    classifier().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("models") / "calibrated"
    model = classifier()
    calibrate(model, batches_of(model, data, "calibration").epoch(0), "folders")
    model.save_pretrained(path)
    return path


@pytest.fixture
def short_auto_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's attacks take 5 steps, not 100, and 100 queries, not 5,000: a test need not wait for them."""
    from pyautoattack import autopgd_base, fab_pt, square

    def cut(kind: Any, **settings: int) -> None:
        original = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: original(self, *a, **{**k, **settings}))

    cut(autopgd_base.APGDAttack, n_iter=5)
    cut(fab_pt.FABAttack_PT, n_iter=5)
    cut(square.SquareAttack, n_queries=100)
