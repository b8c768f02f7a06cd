"""What a recipe leaves open is chosen to fit data and machine, recorded, and taken up again by a resumed run."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny_training import RECIPE, SIZES, run, tiny_model

from miaformer import MIAFormer
from miaformer.cli import main
from miaformer.data import open_data
from miaformer.data.files import locked
from miaformer.training import Interrupted, Recipe, is_trained, train_recipe
from miaformer.training import choices as choices_module
from miaformer.training.choices import batch_size, has_fast_bf16, num_workers, precision
from miaformer.training.progress import Display
from miaformer.training.recipes import RECIPES
from miaformer.training.trainer import Trainer

OPEN = replace(
    RECIPE,
    name="open",
    data="",
    model_args={name: size for name, size in SIZES.items() if name != "num_classes"},
    batch_size=None,
    num_workers=None,
    precision="auto",
    mixup=0.2,
)
SHORT = OPEN.scaled(0.05)


# The rules ------------------------------------------------------------------------------------------------------------


@given(st.none() | st.integers(2, 2000), st.integers(1, 100_000), st.sampled_from(["cpu", "cuda"]), st.integers(1, 9))
def test_a_batch_is_never_more_than_the_images_and_shared_evenly(
    given_size: int | None, images: int, device: str, processes: int
) -> None:
    unit = math.lcm(2, processes)
    if given_size is not None and given_size <= images:
        assert batch_size(given_size, images, device, processes) == given_size
        return
    if images < unit:
        with pytest.raises(ValueError, match=f"{images} training pictures are too few: a step takes at least {unit}"):
            batch_size(given_size, images, device, processes)
        return
    size = batch_size(given_size, images, device, processes)
    assert size % unit == 0
    assert size <= images
    if given_size is None:
        assert size <= max(256 if device == "cuda" else 64, unit)
        assert images // size >= 20 or size <= max(8, unit)
    else:
        assert size > images - unit  # as near to what was given as there are pictures


@pytest.mark.parametrize(
    ("images", "device", "expected"),
    [(8, "cpu", 8), (13, "cpu", 8), (2, "cpu", 2), (128, "cpu", 8), (500, "cpu", 24), (9000, "cpu", 64),
     (900, "cuda", 44), (9000, "cuda", 256)],
)  # fmt: skip
def test_a_chosen_batch(images: int, device: str, expected: int) -> None:
    assert batch_size(None, images, device, 1) == expected


@pytest.mark.parametrize(
    ("images", "size", "device", "processes", "cores", "expected"),
    [
        (9000, 32, "cpu", 1, 1, 0),
        (9000, 32, "cpu", 1, 2, 0),
        (9000, 32, "cpu", 1, 3, 0),
        (9000, 32, "cpu", 1, 8, 2),
        (9000, 32, "cpu", 4, 8, 0),
        (9000, 32, "cpu", 1, 64, 8),
        (9000, 256, "cuda", 1, 1, 0),
        (9000, 256, "cuda", 1, 2, 1),
        (9000, 256, "cuda", 1, 16, 8),
        (9000, 256, "cuda", 4, 16, 3),
        (16, 8, "cuda", 1, 16, 2),  # no more than batches
    ],
)
def test_workers_leave_the_model_its_cores(
    images: int, size: int, device: str, processes: int, cores: int, expected: int
) -> None:
    assert num_workers(images, size, device, processes, cores) == expected


CAPABILITIES: list[tuple[dict[str, Any], bool]] = [
    ({"architecture": "x86_64", "avx2": True}, False),
    ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_tile": True, "amx_bf16": True}, True),
    ({"architecture": "x86_64", "amx_tile": True, "amx_bf16": True}, True),
    ({"architecture": "x86_64", "amx_tile": True, "amx_int8": True}, False),
    ({"architecture": "aarch64", "neon": True, "bf16": True}, False),
    ({}, False),
]


@pytest.mark.parametrize(("capabilities", "fast"), CAPABILITIES)
def test_bf16_is_chosen_on_processors_that_have_instructions_for_it(capabilities: dict[str, Any], fast: bool) -> None:
    assert has_fast_bf16(capabilities) is fast
    assert precision("cpu", capabilities) == ("bf16" if fast else "no")
    assert precision("mps", capabilities) == "no"


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_chosen_on_gpus_that_support_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert precision("cuda", {}) == ("bf16" if supported else "no")


def test_the_processor_is_asked_for_what_it_has() -> None:
    assert "architecture" in torch.cpu.get_capabilities()


def test_settings_that_are_left_open_may_be_none_and_no_others() -> None:
    Recipe("x", "", "vit", batch_size=None, num_workers=None, precision="auto")
    for changes in ({"batch_size": 2.5}, {"num_workers": True}, {"batch_size": "auto"}):
        with pytest.raises(ValueError, match="must be an integer"):
            RECIPE.with_changes(**changes)
    with pytest.raises(ValueError, match="precision='bf61' must be one of auto, no, bf16, fp16"):
        RECIPE.with_changes(precision="bf61")


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to have another number of cores, and bf16 or not."""

    def become(cores: int, bf16: bool) -> None:
        monkeypatch.setattr(choices_module, "processor_cores", lambda: cores)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bf16})

    become(2, bf16=False)
    return become


def pictures(root: Path, count: int, classes: int = 2) -> Path:
    """Class folders with `count` pictures in all."""
    rng = np.random.default_rng(count)
    for number in range(count):
        folder = root / f"kind{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return root


def said_by(recipe: Recipe, out: Path, data: Path, **options: Any) -> str:
    stream = io.StringIO()
    train_recipe(recipe, out, data=data, device="cpu", console=Console(file=stream, width=300), **options)
    return stream.getvalue()


def recorded(out: Path) -> dict[str, Any]:
    return json.loads((out / "recipe.json").read_text())["recipe"]


@pytest.mark.parametrize(("count", "size"), [(10, 8), (17, 8), (160, 8)])
def test_a_handful_of_pictures_trains_every_stage(
    count: int, size: int, tmp_path: Path, machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = pictures(tmp_path / "photos", count), tmp_path / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*worker.*")
        said = said_by(SHORT, out, data)
    split = {name: len(open_data(data, name)) for name in ("train", "calibration", "test")}  # type: ignore[arg-type]
    assert sum(split.values()) == count
    assert f"{split['train']} training and {split['calibration']} calibration images of 2 classes; steps: " in said
    assert f"batch size {size} ({split['train'] // size} steps an epoch), no decoding workers (2 cores)" in said
    assert "precision no (bf16 is not fast on this device)" in said
    assert f"Next: miaformer eval {out / 'model'} --data {data} --budgets 0." in said
    assert (recorded(out)["batch_size"], recorded(out)["num_workers"], recorded(out)["precision"]) == (size, 0, "no")
    stages = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["backbone", "elastic", "supervised", "reinforce"]
    assert MIAFormer.from_pretrained(out / "model").calibration is not None
    assert "no effect on the learning rate" not in caplog.text
    assert is_trained(SHORT, out, data=str(data))  # by the recipe that leaves all of it open


def test_two_pictures_of_a_class_each_are_too_few_and_leave_nothing_behind(tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos", 3)
    with pytest.raises(ValueError, match="1 training pictures are too few"):
        said_by(SHORT, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_more_than_there_are_is_reduced_and_told(tmp_path: Path, machine: Any) -> None:
    data, out, large = pictures(tmp_path / "photos", 40), tmp_path / "run", replace(SHORT, batch_size=300)
    assert "batch size 32 (not 300: there are 32 training images)" in said_by(large, out, data)
    assert is_trained(large, out, data=str(data))
    said_by(large, out, data, resume=True)  # the same run


def test_what_is_slow_or_without_effect_is_said(tmp_path: Path, machine: Any) -> None:
    data = pictures(tmp_path / "photos", 20)
    stages = SHORT.stages[:1]
    slow = said_by(replace(SHORT, precision="bf16", stages=stages), tmp_path / "slow", data)
    assert "precision bf16 (slow: this device has no instructions for it; --set precision=no is faster)" in slow
    none = said_by(replace(SHORT, precision="fp16", stages=stages), tmp_path / "none", data)
    assert "precision fp16 (without effect on a CPU, which trains in float32)" in none
    machine(1, bf16=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*worker.*")
        fast = said_by(replace(SHORT, precision="bf16", num_workers=3, stages=stages), tmp_path / "fast", data)
    assert "1 decoding worker (1 cores), precision bf16, " not in fast
    assert fast.count("1 decoding worker (1 cores), precision bf16\n") == 1


def test_a_run_goes_on_with_what_was_chosen_for_it_on_another_machine(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, recipe = pictures(tmp_path / "photos", 60), SHORT.scaled(8)
    machine(2, bf16=True)
    said_by(recipe, tmp_path / "whole", data)
    step = Display.step

    def interrupt(self: Display, done: int, values: dict[str, float]) -> None:
        step(self, done, values)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", interrupt)
        with pytest.raises(Interrupted):
            said_by(recipe, tmp_path / "parts", data)
    machine(16, bf16=False)
    monkeypatch.setattr(choices_module, "FEWEST_PICTURES", 20)  # as another version might choose
    said = said_by(recipe, tmp_path / "parts", data, resume=True)
    assert "batch size 8, no decoding workers, precision bf16 (slow" in said
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match=r"different in recipe\.batch_size"):
        said_by(replace(recipe, batch_size=16), tmp_path / "parts", data, resume=True)


# A start that failed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", [{"optimizer": "nosuch"}, {"augmentation": {"hflip": 7}}, {"precision": "bf16"}])
@pytest.mark.parametrize("resume", [True, False])
def test_a_start_that_failed_does_not_block_the_next(
    mistake: dict[str, Any], resume: bool, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = pictures(tmp_path / "photos", 20), tmp_path / "run"

    def out_of_memory(self: Trainer, *_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        if "precision" in mistake:
            patched.setattr(Trainer, "_step", out_of_memory)
        with pytest.raises((ValueError, RuntimeError)):
            said_by(SHORT.with_changes(**mistake), out, data)
    assert out.exists() is ("augmentation" not in mistake)
    said_by(SHORT, out, data, resume=resume)
    assert (out / "model" / "calibration.json").exists()
    with pytest.raises(ValueError, match="holds a run already"):
        said_by(SHORT, out, data)


def test_the_command_can_be_corrected_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "open", SHORT)
    data = pictures(tmp_path / "photos", 20)
    command = ["train", "--recipe", "open", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--set", "optimizer=nosuch"]) == 2
    assert main([*command, "--set", "weight_decay=0.1"]) == 0
    assert main([*command, "--set", "weight_decay=0.1"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, "--set", "weight_decay=0.1", "--resume"]) == 0


def test_steps_that_no_checkpoint_kept_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C twice, or a kill."""
    step = Display.step

    def killed(self: Display, done: int, values: dict[str, float]) -> None:
        step(self, done, values)
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    other = replace(RECIPE, stages=RECIPE.stages[:1], weight_decay=0.3)
    assert not is_trained(other, out, data="digits")
    run(out, other)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    """Before the first checkpoint too, when the directory counts as free."""
    out = tmp_path / "run"
    out.mkdir()
    with locked(out), pytest.raises(ValueError, match="another process is training in"):
        run(out, replace(RECIPE, stages=RECIPE.stages[:1]), model=tiny_model())
    assert list(out.iterdir()) == []
