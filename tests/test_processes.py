"""Several processes on one machine: Ctrl-C loses nothing, the first failure is told, and told once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from miaformer.cli import processes
from miaformer.data import open_data
from miaformer.training import get_recipe
from miaformer.training.trainer import spans

SCALE = 0.02  # of the epochs of `digits`: a few seconds
STAGES = ("backbone", "elastic")  # which leave nothing to calibrate


def all_steps() -> list[int]:
    recipe = get_recipe("digits").scaled(SCALE).only(*STAGES)
    last = spans(recipe, len(open_data("digits", "train")) // recipe.batch_size)[-1].last
    return list(range(1, last + 1))


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "miaformer", "train", "--recipe", "digits", "--epochs-scale", str(SCALE)]
    return subprocess.Popen(
        [*command, "--stages", *STAGES, "--out", str(out), "--processes", "2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_ctrl_c_stops_all_and_resuming_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    deadline = time.monotonic() + 120
    while len(steps(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to the processes
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.count("Go on with the same command and --resume.") == 1
    done = len(steps(out))
    assert 3 <= done < len(all_steps())
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{done:08d}"]

    process = start(out, "--resume")
    told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"Resuming after step {done}." in told
    assert steps(out) == all_steps()
    assert load_file(out / "model" / "model.safetensors")

    process = start(out)  # without --resume
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("holds a run already") == 1


def test_a_failure_beside_the_first_process_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(arguments: object, rank: int, *_: object) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", ("import time; time.sleep(60)", "raise SystemExit(3)")[rank]])

    monkeypatch.setattr(processes, "_start", started)
    monkeypatch.setattr(processes, "_PATIENCE_S", 0.2)
    start_s = time.monotonic()
    assert processes.run_in_processes([], 2) == 3
    assert time.monotonic() - start_s < 30
