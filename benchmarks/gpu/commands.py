"""The stages that are command lines of miaformer: each ends by itself, or is stopped in time and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import OutOfTimeError, Record

STOP_SECONDS = 20.0  # to save a checkpoint in
KEPT = ("measured.json", "measured.npz", "timed.json", "recipe.json", "durations.jsonl")  # of runs, to take home


@dataclass(frozen=True)
class Command:
    """Arguments of `miaformer`. least: seconds below which it is not begun; resumes: whether --resume goes on."""

    name: str
    arguments: Sequence[object]
    least: float = 30.0
    resumes: bool = False


def run(record: Record, commands: Sequence[Command]) -> None:
    for command in commands:
        record.step(command.name, lambda c=command: _carried_out(record, c), command.least)


def _carried_out(record: Record, command: Command) -> dict[str, Any]:
    """Raises OutOfTimeError where it was stopped, RuntimeError where it failed."""
    arguments = [*map(str, command.arguments)]
    if command.resumes and (Path(arguments[arguments.index("--out") + 1]) / "checkpoints").is_dir():
        arguments.append("--resume")
    log = record.directory / f"{re.sub('[^a-z0-9_]+', '-', command.name)}.log"
    with log.open("a") as said:
        said.write(f"$ miaformer {' '.join(arguments)}\n")
        said.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "miaformer", *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=max(record.seconds_left - STOP_SECONDS, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise OutOfTimeError(f"{command.name} was stopped: the same call goes on with it") from None
        finally:  # of a Ctrl-C here the child, in a session of its own, knows nothing
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    last = log.read_text(errors="replace").strip().splitlines()[-3:]
    if status:
        raise RuntimeError(f"{command.name} ended with status {status}: {' / '.join(last)} (all of it in {log})")
    return {"command": ["miaformer", *arguments], "last lines": last}


def take_home(out: Path, stage: str) -> Path:
    """All that was found in `out`, without models and checkpoints, as one file: what a fresh machine goes on from."""
    path = out / "home" / f"{stage}.tar.gz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for found in sorted(out.rglob("*")):
            if found.name in KEPT or (found.parent == out and found.suffix in (".json", ".log")):
                tar.add(found, found.relative_to(out))
    return path


# The stages ----------------------------------------------------------------------------------------------------------


def fast(files: Path, out: Path, device: str, tiny: bool) -> list[Command]:
    names = {"deit_small_patch16_224": (1, 8, 64, 256), "deit_base_patch16_224": (1, 8, 64, 256)}
    names |= {"vit_base_patch14_dinov2": (1, 8, 64, 256)}
    if tiny:
        names = {"vit_tiny_patch16_224": (1, 2)}
    dtype = "float32" if tiny else "bfloat16"
    shared: list[object] = ["--data", files / "pictures", "--device", device, "--dtypes", dtype, "--budgets", 0.5]
    shared += ["--image-size", 32 if tiny else 224, "--calibration-images", 8 if tiny else 64]
    shared += [
        "--seconds",
        1 if tiny else 6,
        "--engines",
        "eager",
        *([] if tiny else ["compile", "graphs"]),
    ]
    shared += ["--grains", "all"] if tiny else ["--grains", "all", "depth", "heads", "tokens"]
    found = []
    for name, sizes in names.items():
        arguments = ["bench", f"timm:{name}", "--batch-sizes", *sizes, *shared, "--json", out / f"speed-{name}.json"]
        found.append(Command(f"bench {name}", arguments))
    return found


def cifar10(files: Path, out: Path, device: str, tiny: bool) -> list[Command]:
    """Recipe `cifar10`, shortened to 40 epochs, and its baselines."""
    recipe = "digits" if tiny else "cifar10"
    data = "digits" if tiny else files / "cifar10"
    scale = 0.004 if tiny else 0.2
    methods = ["learned", "dense"] if tiny else ["learned", "dense", "merging", "merging-free", "even-exits", "exits"]
    return _compared(recipe, data, out / "cifar10", device, scale, methods, tiny, [])


def real(files: Path, out: Path, device: str, tiny: bool) -> list[Command]:
    """DINOv2 ViT-S/14 on Imagenette at 224 px: fine-tune, adapt, compare, time."""
    model = "vit_tiny_patch16_224" if tiny else "vit_small_patch14_dinov2"
    weights = ["--weights", files / f"{model}.safetensors"]
    data = files / "imagenette224"
    size = 32 if tiny else 224
    scale = ["--epochs-scale", 0.2 if tiny else 1.0]
    start: list[object] = ["train", "--recipe", "finetune", "--model", model, *weights, "--image-size", size]
    start += ["--data", data, "--stages", "probe", "backbone", *scale, "--out", out / "finetuned"]
    if device == "cpu":
        start += ["--device", "cpu"]
    methods = ["learned", "dense", "resolution-free", "merging-free"]
    methods += [] if tiny else ["merging", "cls-attention", "top-tokens", "exits", "even-exits"]
    given: list[object] = ["--backbone", out / "finetuned" / "model"]
    return [
        Command("fine-tune", start, resumes=True),
        *_compared("finetune", data, out / "real", device, scale[1], methods, tiny, given),
    ]


def _compared(
    recipe: str,
    data: object,
    runs: Path,
    device: str,
    scale: object,
    methods: list[str],
    tiny: bool,
    more: list[object],
) -> list[Command]:
    shared: list[object] = ["compare", "--recipe", recipe, "--data", data, "--out", runs, "--device", device, *more]
    shared += ["--epochs-scale", scale, "--budgets", 0.25, 0.35, 0.5, 0.7]
    shared += ["--test-images", 64] if tiny else []
    each = [
        Command(f"{runs.name}: {method}, seed {seed}", [*shared, "--methods", method, "--seeds", seed, "--no-times"])
        for method in methods
        for seed in ((0, 1, 2) if method == "learned" and not tiny else (0,))
    ]
    table = [*shared, "--methods", *methods, "--seeds", 0, *([] if tiny else [1, 2])]
    return [
        *each,
        Command(
            f"{runs.name}: table", [*table, "--only-measured", "--json", runs.with_name(f"{runs.name}-table.json")]
        ),
    ]


def attack(files: Path, out: Path, device: str, tiny: bool) -> list[Command]:
    """AutoAttack on the adversarially trained pair: static, adaptive, and drawn decisions."""
    pair = Path(__file__).parents[1] / "results" / "adversarial"
    images = 4 if tiny else 1000
    attacks = ["fgsm"] if tiny else ["autoattack"]
    found = []
    for name, targets in (("backbone", ["backbone"]), ("adaptive", ["adaptive"]), ("adaptive", ["sampled"])):
        label = f"attack {targets[0]}"
        arguments = ["attack", pair / name / "model", "--data", files / "cifar10", "--attacks", *attacks]
        arguments += ["--targets", *targets, "--eps", "4/255", "--images", images, "--device", device]
        arguments += ["--no-masking-check", "--out", out / label.replace(" ", "-")]
        arguments += ["--json", out / f"{label.replace(' ', '-')}.json"]
        found.append(Command(label, arguments))
    return found


STAGES: dict[str, Callable[[Path, Path, str, bool], list[Command]]] = {
    "fast": fast,
    "cifar10": cifar10,
    "real": real,
    "attack": attack,
}
