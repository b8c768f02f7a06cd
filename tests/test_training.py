"""Training keeps its promises: resumed equals uninterrupted, two processes equal one, and nothing is lost."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from tiny_training import RECIPE, STEPS, Quadrants, run, tiny_model

import miaformer
from miaformer import MIAFormer, adapt
from miaformer.cli import main
from miaformer.cli.arguments import open_batches
from miaformer.data import Batches, build_transform, open_data
from miaformer.lab.baselines import OBJECTIVES as BASELINES
from miaformer.training import Interrupted, Recipe, Stage, get_recipe, new_backbone, train
from miaformer.training.checkpoint import checkpoints
from miaformer.training.objective import Objective, Outcome
from miaformer.training.progress import Display
from miaformer.training.recipes import with_defaults
from miaformer.training.run_directory import describe
from miaformer.training.stages import Elastic
from miaformer.training.trainer import spans

TOTAL = 4 * STEPS


def metrics(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(out)
    return out


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while step `step` is being accounted for."""
    seen = []

    def step_and_interrupt(self: Display, done: int, values: object) -> None:
        seen.append(done)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "step", step_and_interrupt)


@pytest.mark.parametrize(
    "step",
    [STEPS, STEPS + 3, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 2 * STEPS + 1, 3 * STEPS, TOTAL - 1))],
)
def test_resumed_after_ctrl_c_equals_uninterrupted(
    step: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt_at(step, patched)
        with pytest.raises(Interrupted, match=f"step {step}"):
            run(out)
    assert len(metrics(out)) == step
    run(out, resume=True)
    whole, parts = (load_file(p / "model" / "model.safetensors") for p in (uninterrupted, out))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(out) == metrics(uninterrupted)
    assert (out / "model/calibration.json").read_text() == (uninterrupted / "model/calibration.json").read_text()


def test_muon_resumes_as_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, optimizer="muon")
    run(tmp_path / "whole", recipe)
    out = tmp_path / "parts"
    with monkeypatch.context() as patched:
        interrupt_at(2 * STEPS + 2, patched)  # where controllers learn
        with pytest.raises(Interrupted):
            run(out, recipe)
    run(out, recipe, resume=True)
    whole, parts = (load_file(p / "model" / "model.safetensors") for p in (tmp_path / "whole", out))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_every_weight_of_the_model_learns(uninterrupted: Path) -> None:
    trained, fresh = load_file(uninterrupted / "model" / "model.safetensors"), tiny_model().state_dict()
    still = [n for n in fresh if "order_" not in n and torch.equal(trained[n], fresh[n])]
    assert not still


def test_two_processes_equal_one(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    # With --cpu, accelerate starts a single process whatever number is asked; this is its launcher of several.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("tiny_training.py")), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("process of 2") == 2
    one, two = (load_file(p / "model" / "model.safetensors") for p in (uninterrupted, out))
    fresh = tiny_model().state_dict()
    # Not weight for weight: AdamW makes a step of a gradient that is rounding alone (a key's bias has no other).
    apart, learned = (torch.cat([(state[n] - two[n]).flatten() for n in one]).norm() for state in (one, fresh))
    assert apart < 2e-3 * learned
    for row, same in zip(metrics(uninterrupted), metrics(out), strict=True):
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-3)


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt_at(3, patched)
        with pytest.raises(Interrupted):
            run(out)
    (newest,) = checkpoints(out / "checkpoints")
    weights = newest / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step_00000003 is damaged.*remove"):
        run(out, resume=True)
    assert newest.exists()
    assert len(metrics(out)) == 3


def test_a_directory_holds_one_run(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already"):
        run(uninterrupted)
    with pytest.raises(ValueError, match=r"different in recipe\.weight_decay"):
        run(uninterrupted, replace(RECIPE, weight_decay=0.3), resume=True)


def test_a_directory_that_holds_a_run_is_told_of_before_anything_is_started(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> int:
        raise AssertionError("processes were started")

    monkeypatch.setattr("miaformer.cli.train.run_in_processes", start)
    assert main(["train", "--recipe", "digits", "--out", str(uninterrupted), "--processes", "2"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_images_augmented_on_the_device_train_and_resume(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, data_on_device=True)
    run(tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", recipe)
    run(tmp_path / "stopped", recipe, resume=True)
    whole, stopped, loaded = (
        load_file(out / "model" / "model.safetensors")
        for out in (tmp_path / "whole", tmp_path / "stopped", uninterrupted)
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not all(torch.equal(whole[name], loaded[name]) for name in whole)  # by the other way images are augmented


def test_a_run_is_the_same_where_a_setting_came_later() -> None:
    saved = json.loads(json.dumps(RECIPE.to_json()))
    older = copy.deepcopy(saved)
    del older["conv_stem"], older["adapt"], older["stages"][1]["anneal"]
    assert with_defaults(older) == saved
    older["stages"][1]["lr"] = 0.5
    assert with_defaults(older)["stages"][1]["lr"] == 0.5
    assert with_defaults({**saved, "weight_decay": 0.3}) != saved
    assert with_defaults({**saved, "adversarial_apart": False}) == saved, "a setting that is gone since"
    assert with_defaults({**saved, "adversarial_apart": True}) != saved
    older["stages"] = [{**stage, "exit_share": 0.0} for stage in saved["stages"]]
    assert with_defaults(older) == saved


def test_a_run_is_the_same_wherever_its_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "dog").mkdir()
    for number, name in enumerate(("cat/1", "cat/2", "dog/1", "dog/2")):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / "photos" / "train" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    described = {
        str(describe(RECIPE, open_data(data, "train"), data, 0))
        for data in ("photos", "./photos/", tmp_path / "photos")
    }
    assert len(described) == 1
    assert str(tmp_path) not in described.pop()


def test_resume_of_nothing_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, replace(RECIPE, stages=RECIPE.stages[:1]), resume=True)
    assert len(metrics(out)) == STEPS


def test_resume_of_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    before = (uninterrupted / "model" / "model.safetensors").read_bytes()
    run(uninterrupted, resume=True)
    assert (uninterrupted / "model" / "model.safetensors").read_bytes() == before


def test_ema_mixup_and_bf16_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, ema_decay=0.9, mixup=0.2, cutmix=0.5, precision="bf16", optimizer="lamb")
    run(tmp_path / "whole", recipe)
    with monkeypatch.context() as patched:
        interrupt_at(STEPS + 2, patched)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", recipe)
    run(tmp_path / "parts", recipe, resume=True)
    whole, parts = (load_file(tmp_path / p / "model" / "model.safetensors") for p in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, replace(RECIPE, checkpoint_every=3, keep_checkpoints=2))
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000015", "step_00000016"]


def test_metrics_tell_accuracy_macs_and_their_variance(uninterrupted: Path) -> None:
    rows = metrics(uninterrupted)
    assert [row["stage"] for row in rows[::STEPS]] == ["backbone", "elastic", "supervised", "reinforce"]
    assert {"loss", "accuracy", "macs_fraction", "macs_variance", "lr"} <= rows[-1].keys()
    assert list((uninterrupted / "tensorboard").glob("events.*"))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'cifra10'"):
        get_recipe("cifra10")
    with pytest.raises(ValueError, match=r"patch_drop=\(0\.5, 1\.0\) must be two numbers in \[0, 1\)"):
        Stage("backbone", epochs=1, lr=1, patch_drop=(0.5, 1.0))
    with pytest.raises(ValueError, match="elastic stage: patch_drop is for the backbone stage"):
        Stage("elastic", epochs=1, lr=1, patch_drop=(0.5, 0.5))
    with pytest.raises(ValueError, match="early_weight=-1 must not be negative"):
        Stage("backbone", epochs=1, lr=1, early_weight=-1)
    with pytest.raises(ValueError, match=r"anneal=0 must be in \(0, 1\]"):
        Stage("elastic", epochs=1, lr=1, anneal=0)
    with pytest.raises(ValueError, match="no setting epochs"):
        RECIPE.with_changes(epochs=3)
    with pytest.raises(ValueError, match="budgets"):
        Recipe("x", "", "vit", budgets=(0.8, 0.3))
    for name, value in (
        ("checkpoint_every", 0), ("keep_checkpoints", 0), ("ema_decay", 2),
        ("label_smoothing", 5), ("batch_size", 1), ("num_workers", -1), ("clip_grad", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}={value} must lie in"):
            RECIPE.with_changes(**{name: value})
    with pytest.raises(ValueError, match="batch_size='many' must be an integer"):
        RECIPE.with_changes(batch_size="many")


@pytest.mark.parametrize("package", ["training", "evaluation"])
def test_what_users_train_and_measure_with_knows_no_baseline(package: str) -> None:
    files = list((Path(miaformer.__file__).parent / package).glob("*.py"))
    assert files
    assert not [file.name for file in files if "from miaformer.lab" in file.read_text()]


def test_a_stage_of_another_kind_learns_by_the_objective_that_is_given_for_it(tmp_path: Path) -> None:
    """And one that no objective is given for is named, before anything is written."""
    renamed = replace(RECIPE, stages=(replace(RECIPE.stages[1], kind="elastik"),))
    with pytest.raises(ValueError, match="'elastik' must be one of probe, backbone"):
        run(tmp_path / "refused", renamed)
    assert not (tmp_path / "refused").exists()
    run(tmp_path / "given", renamed, objectives={"elastik": Elastic})
    run(tmp_path / "ours", replace(RECIPE, stages=RECIPE.stages[1:2]))
    given, ours = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("given", "ours"))
    assert all(torch.equal(weight, given[name]) for name, weight in ours.items())
    assert [row["stage"] for row in metrics(tmp_path / "given")] == ["elastik"] * STEPS


def test_a_loss_that_is_not_finite_is_said_in_a_line_that_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--recipe", "digits", "--out", str(tmp_path / "run"), "--processes", "1", "--device", "cpu"]
    forward = Objective.forward

    def broken(self: Objective, *args: object) -> Outcome:
        outcome = forward(self, *args)  # type: ignore[arg-type]
        return replace(outcome, loss=outcome.loss * float("nan"))

    monkeypatch.setattr(Objective, "forward", broken)
    assert main([*argv, "--stages", "backbone", "--epochs-scale", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "the loss is not finite in step 0 (backbone stage): start anew, in another directory than" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("model_args", "names", "told"),
    [
        ({"num_classes": 7}, None, "its own is for 7 other classes"),
        ({"num_classes": 0}, None, "it had none"),
        ({}, list("efgh"), "its own is for 4 other classes"),
    ],
)
def test_a_model_for_other_classes_gets_a_new_classifier_and_a_line_says_so(
    model_args: dict[str, int], names: list[str] | None, told: str, tmp_path: Path
) -> None:
    data, recipe = Quadrants("train"), replace(RECIPE, stages=(replace(RECIPE.stages[0], epochs=0.3),))
    states = []
    for attempt in range(2):
        model = tiny_model(model_args)
        if names is not None:
            model.label_names = names
        before = model.backbone.head
        torch.manual_seed(attempt)  # the classifier is drawn by the run's own seed
        console = Console(file=io.StringIO(), width=200)
        out = tmp_path / str(attempt)
        trained = train(model, data, recipe, out, calibration_data=data, console=console, device="cpu")
        assert (
            f"The model gets a new classifier for the 4 classes of quadrants/train; {told}\n" in console.file.getvalue()
        )
        assert trained.label_names == list("abcd")
        assert trained.backbone.head is not before
        states.append(trained.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_classifier_without_names_is_kept_where_it_fits(tmp_path: Path) -> None:
    data, recipe = Quadrants("train"), replace(RECIPE, stages=(replace(RECIPE.stages[0], epochs=0.3),))
    model = tiny_model()
    before = model.backbone.head
    console = Console(file=io.StringIO(), width=200)
    trained = train(model, data, recipe, tmp_path, calibration_data=data, console=console, device="cpu")
    assert "new classifier" not in console.file.getvalue()
    assert trained.backbone.head is before


def test_controllers_of_the_embedded_recipe_take_less_than_a_hundredth() -> None:
    recipe = get_recipe("digits")
    backbone = timm.create_model(recipe.model, num_classes=10, **recipe.model_args)
    model = adapt(backbone, **recipe.adapt)
    assert model.controller_macs() < 0.01 * model.cost().backbone


@pytest.mark.parametrize(("anneal", "last"), [(1.0, 0.1), (0.5, 0.55)])
def test_a_stage_follows_the_share_of_a_cosine_that_it_asks_for(anneal: float, last: float, tmp_path: Path) -> None:
    stage = replace(RECIPE.stages[0], epochs=20 / 3, anneal=anneal, warmup=0.0)
    run(tmp_path, replace(RECIPE, stages=(stage,)))
    rates = [float(row["lr"]) / stage.lr for row in metrics(tmp_path)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(last, abs=0.1)


def test_tokens_are_dropped_in_the_stage_that_asks_for_it_alone(tmp_path: Path) -> None:
    model, rows = tiny_model(), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(args[0].shape[1]))
    first, *others = RECIPE.stages
    run(tmp_path, replace(RECIPE, stages=(replace(first, patch_drop=(0.75, 0.75)), first, *others)), model=model)
    assert rows[:STEPS] == [1 + 4] * STEPS  # of 16 patch tokens
    assert set(rows[STEPS : 2 * STEPS]) == {1 + 16}


def test_the_share_of_tokens_dropped_is_drawn_each_step_within_its_range(tmp_path: Path) -> None:
    model, rows = tiny_model(), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(args[0].shape[1] - 1))
    first = replace(RECIPE.stages[0], patch_drop=(0.25, 0.75), epochs=20 / 3)
    run(tmp_path, replace(RECIPE, stages=(first,)), model=model)
    assert 4 <= min(rows) < 7 < max(rows) <= 12


def test_a_backbone_that_drops_tokens_in_training_is_walked_whole() -> None:
    model = tiny_model({"patch_drop_rate": 0.5}).train()
    images = torch.rand(2, 3, 16, 16)
    assert model.backbone(images).isfinite().all()
    assert model.embed(images).tokens.shape[1] == 1 + 16


class _Always(torch.nn.Module):
    """A teacher that knows one class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.register_buffer("logits", 9.0 * torch.eye(4)[label])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("kind", ["backbone", "elastic", "merging"])
def test_every_stage_learns_from_a_teacher_that_is_given(kind: str, tmp_path: Path) -> None:
    """From it alone, all of the weight being on its labels."""
    stage = replace(RECIPE.stages[0], kind=kind, epochs=8.0, lr=3e-3)
    recipe = replace(RECIPE, stages=(stage,), distill_weight=1.0)
    model = run(tmp_path, recipe, teacher=_Always(2), objectives=BASELINES)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        assert (model.backbone(images).argmax(dim=1) == 2).all()


def test_the_average_of_each_stage_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up starts with the stage: else a short late stage ends near where it began."""
    seen: list[int] = []
    monkeypatch.setattr(ModelEmaV3, "update", lambda self, model, step: seen.append(step))
    run(tmp_path, replace(RECIPE, ema_decay=0.99))
    assert seen == [*range(1, STEPS + 1)] * len(RECIPE.stages)


def test_budgets_are_met_by_the_weights_that_are_trained_last(uninterrupted: Path, tmp_path: Path) -> None:
    model = MIAFormer.from_pretrained(uninterrupted / "model")
    before = model.calibration
    assert before is not None
    further = replace(RECIPE, stages=(replace(RECIPE.stages[0], lr=3e-2),))
    run(tmp_path / "further", further, model)
    after = model.calibration
    assert after is not None
    assert after != before
    batches = Batches(
        Quadrants("calibration"), build_transform(model.data_config()), 48, seed=0, shuffle=False, drop_last=False
    )
    images = next(iter(batches.epoch(0))).images
    for budget in (after.range[0], sum(after.range) / 2, after.range[1]):
        assert model.run(images, budget=budget).trace.macs_fraction.mean() == pytest.approx(budget, abs=0.02)


def test_half_precision_steps_are_clipped_and_those_that_overflow_teach_no_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gradient scaler of a GPU, here on the CPU; its scale is too large at first."""

    class Scaled(Accelerator):
        def __init__(self, **settings: object) -> None:
            super().__init__(**{**settings, "mixed_precision": "no"})  # type: ignore[arg-type]
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30)
            self.native_amp = True
            self.state._mixed_precision = "fp16"

        @contextmanager
        def autocast(self, *args: object, **kwargs: object) -> Iterator[None]:
            yield

    monkeypatch.setattr("miaformer.training.run.Accelerator", Scaled)
    model = run(tmp_path, replace(RECIPE, precision="fp16"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS * len(RECIPE.stages)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert all(math.isfinite(value) for value in model.price_scale.tolist())
    assert model.calibration is not None


def test_a_stage_that_is_asked_for_trains_a_step_at_least() -> None:
    short = replace(RECIPE, stages=tuple(replace(stage, epochs=0.001) for stage in RECIPE.stages))
    assert [(span.first, span.last) for span in spans(short, 3)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    none = replace(RECIPE, stages=(replace(RECIPE.stages[0], epochs=0), RECIPE.stages[1]))
    assert [span.stage.kind for span in spans(none, 3)] == ["elastic"]


def test_what_is_no_adaptive_model_or_no_model_is_named(tmp_path: Path) -> None:
    data = Quadrants("train")
    with pytest.raises(TypeError, match=r"what miaformer\.adapt gives, not a VisionTransformer"):
        train(tiny_model().backbone, data, RECIPE, tmp_path, calibration_data=data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timm knows no model 'nosuch'"):
        new_backbone(replace(RECIPE, model="nosuch"), 4, 0)


@settings(deadline=None, max_examples=30)
@given(st.permutations("abcd"))
def test_classes_are_matched_by_name(order: list[str]) -> None:
    """In the data's order each would be learned over again, and `eval` count right answers as wrong."""
    data, model = Quadrants("train"), tiny_model()
    model.label_names = order
    found = model.in_own_order(data)
    assert found.classes == order
    assert [order[label] for label in found.labels] == [data.classes[label] for label in data.labels]
    assert [found[place][1] for place in range(8)] == found.labels[:8].tolist()
    for batch in open_batches(model, data, 16).epoch(0):
        assert [order[label] for label in batch.labels] == [data.classes[data.labels[i]] for i in batch.index]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "c", "junk"], "the model alone has 'junk', the data alone has 'd'"),
        (["A", "b", "c", "d"], "the model alone has 'A', the data alone has 'a'"),
        (["a", "b", "c", "c"], "the data alone has 'd'"),
        (["e", "f", "g", "h"], "the model alone has 'e', 'f', 'g', 'h', the data alone"),
    ],
)
def test_other_classes_are_refused_where_they_are_counted_right_or_wrong(names: list[str], said: str) -> None:
    model = tiny_model()
    model.label_names = names
    with pytest.raises(ValueError, match=said):
        open_batches(model, Quadrants("train"), 4)


def test_who_names_no_classes_is_told_in_which_order_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    assert model.label_names is None
    open_batches(model, Quadrants("train"), 4)
    assert "does not name its classes: taken in the order of quadrants/train: a, b, c, ..." in capsys.readouterr().err


def test_a_model_of_the_same_classes_in_another_order_learns_them_in_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    model.label_names = ["d", "a", "c", "b"]
    trained = train(
        model,
        Quadrants("train"),
        RECIPE.only("backbone"),
        tmp_path / "run",
        calibration_data=Quadrants("calibration"),
        show_progress=False,
        device="cpu",
    )
    assert trained.label_names == ["d", "a", "c", "b"]
