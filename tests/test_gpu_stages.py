"""The stages that a GPU is for, tiny and on the processor, so that the first real run does not fail on a name."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def noise(path: Path, side: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    spread = 1 + int(250 * rng.random())
    Image.fromarray(rng.integers(0, spread, (side, side, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number in range(24):
        noise(root / "pictures" / f"{number}.png", 40, rng)
    for name in ("cat", "dog"):
        for number in range(40):
            noise(root / "imagenette224" / name / f"{number}.png", 40, rng)
    for part in ("train", "test"):
        for name in CIFAR:
            for number in range(3):
                noise(root / "cifar10" / part / name / f"{number}.png", 32, rng)
    static = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    save_file(static.state_dict(), root / "vit_tiny_patch16_224.safetensors")
    return root


def call(stage: str, *more: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "benchmarks.gpu", stage, *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["correct", "fast", "cifar10", "real", "attack"])
def test_a_stage_runs_to_its_end_and_is_not_done_again(stage: str, files: Path, tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--files", files, "--device", "cpu", "--tiny")
    status, said = call(stage, *arguments)
    assert status == 0, said
    steps = json.loads((tmp_path / f"{stage}.json").read_text())["steps"]
    assert f"{stage}: done, {len(steps)} steps" in said
    with tarfile.open(tmp_path / "home" / f"{stage}.tar.gz") as tar:
        names = tar.getnames()
    assert f"{stage}.json" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert all(len(Path(name).name.replace(":", "")) == len(Path(name).name) for name in names)
    status, said = call(stage, *arguments)
    assert status == 0, said
    assert said.count("\n") == 2, "everything is known"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The same in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    main = import_module("benchmarks.gpu.__main__").main

    def call(*arguments: object) -> tuple[int, str]:
        return main([*map(str, arguments)]), capsys.readouterr().out

    return call


def test_a_stage_without_time_says_that_it_goes_on(here: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, said = here("correct", "--out", tmp_path, "--device", "cpu", "--tiny", "--minutes", "0")
    assert status == 3
    assert "depth, heads and tokens, float32 and what follows are left for the next call" in said


def test_files_travel_in_parts(here: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder, file = tmp_path / "data" / "set", tmp_path / "weights.bin"
    (folder / "deep").mkdir(parents=True)
    contents = {"a.bin": 2_500_000, "deep/b.bin": 10, "deep/empty.bin": 0, "c.bin": 700_000}
    for name, size in contents.items():
        (folder / name).write_bytes(rng.bytes(size))
    file.write_bytes(rng.bytes(1_300_000))
    status, said = here("pack", "--out", tmp_path / "parts", "--part-mb", 1, folder, file)
    assert status == 0, said
    parts = sorted((tmp_path / "parts").iterdir())
    assert said.split() == [str(part) for part in parts]
    assert len(parts) > 3
    for part in parts:
        assert sum(path.stat().st_size for path in part.iterdir()) < 1_100_000
        status, said = here("unpack", "--out", tmp_path / "there", part)
        assert status == 0, said
    for part in (parts[0], parts[1], parts[1], parts[0]):  # again, and out of order: no harm
        assert here("unpack", "--out", tmp_path / "there", part)[0] == 0
    with pytest.raises(ValueError, match="in their order"):
        here("unpack", "--out", tmp_path / "elsewhere", parts[1])
    for name in contents:
        assert (tmp_path / "there" / "set" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "there" / "weights.bin").read_bytes() == file.read_bytes()
