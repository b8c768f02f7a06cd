"""Trains and measures what is not there yet: a directory a method and seed, kept from one call to the next.

OUT/backbone/model            the shared backbone, trained by the recipe's first stage, or a copy of a given one
OUT/METHOD/seedK/             a training run, as `miaformer train` leaves it
OUT/METHOD/seedK/measured.*   what it did on each test image (.npz), and at what budgets (.json)
OUT/METHOD/seedK/timed.json   how long it took beside the backbone: apart, for a machine that does nothing else; the
                              model must still be there

What is measured is not trained again, so the last two and `recipe.json` are enough to keep a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from miaformer.data import Batches, LabelledBatch, Split, build_transform, open_data
from miaformer.data.files import holds_run, whole_file
from miaformer.data.seeds import seed_everything
from miaformer.evaluation import describe_environment
from miaformer.evaluation.calibration import OnProgress
from miaformer.lab.baselines import OBJECTIVES
from miaformer.lab.comparison.given import copy_backbone, is_copied
from miaformer.lab.comparison.measuring import difficulty, on_test_images
from miaformer.lab.comparison.method import Entry, Method, Question
from miaformer.lab.comparison.methods import METHODS
from miaformer.lab.comparison.timing import time_entries, timed_pictures
from miaformer.model.adapt import adapt
from miaformer.model.model import MIAFormer
from miaformer.training import Recipe, is_trained, train, train_recipe
from miaformer.training.progress import core_seconds
from miaformer.vit.backbone import Backbone

Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """A method with a seed."""

    method: Method
    seed: int


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it lies.

    recipe: with the stages of adaptation; a backbone without a stage of its own is taken as it comes, pretrained.
    data: what `open_data` takes. budgets: to ask every method for. test_images: measure on the first so many images of
    the test split; None: all. given: a model directory whose backbone is the shared one; None: the recipe's is.
    """

    recipe: Recipe
    data: str
    out: Path
    budgets: tuple[float, ...]
    test_images: int | None = None
    given: Path | None = None

    @property
    def backbone(self) -> Path:
        return self.out / "backbone" / "model"

    def directory(self, run: Run) -> Path:
        return self.out / run.method.name / f"seed{run.seed}"

    # Training ---------------------------------------------------------------------------------------------------------

    def backbone_is_trained(self) -> bool:
        """Raises ValueError where another recipe, or data, has been trained in its place; so does `is_trained`."""
        if self.given is not None:
            return is_copied(self.given, self.backbone)
        return is_trained(self._backbone_recipe, self.backbone.parent, data=self.data)

    @property
    def trains_backbone(self) -> bool:
        return self.given is None and bool(self._backbone_recipe.stages)

    @property
    def _backbone_recipe(self) -> Recipe:
        """Without what adapts it: one backbone serves however that is done."""
        stages = tuple(stage for stage in self.recipe.stages if stage.kind in ("probe", "backbone"))
        return replace(self.recipe, stages=stages, adapt={})

    def trained(self, run: Run) -> Run:
        """The run whose trained model this one uses: itself, mostly."""
        return run if run.method.trained_as is None else Run(METHODS[run.method.trained_as], run.seed)

    def is_trained(self, run: Run) -> bool:
        run = self.trained(run)
        if run.method.recipe is None:
            return True
        return is_trained(run.method.recipe(self.recipe), self.directory(run), data=self.data, seed=run.seed)

    def train_backbone(self, device: str | None = None) -> None:
        """Or go on with it; a given one is copied. Raises `Interrupted` after Ctrl-C, saved."""
        out = self.backbone.parent
        if self.given is not None:
            copy_backbone(self.given, self.backbone, open_data(self.data, "train"))
            return
        train_recipe(self._backbone_recipe, out, data=self.data, resume=holds_run(out), device=device)

    def train(self, run: Run, device: str | None = None) -> None:
        """Or go on with it. Raises `Interrupted` after Ctrl-C, saved."""
        run = self.trained(run)
        assert run.method.recipe is not None
        out = self.directory(run)
        train(
            self._untrained(run),
            self.data,
            run.method.recipe(self.recipe),
            out,
            seed=run.seed,
            resume=holds_run(out),
            device=device,
            teacher=self._static(),
            objectives=OBJECTIVES,
        )

    def _static(self) -> Backbone:
        return MIAFormer.from_pretrained(self.backbone).to_timm()

    def _untrained(self, run: Run) -> MIAFormer:
        recipe = self.recipe if run.method.recipe is None else run.method.recipe(self.recipe)
        static = run.method.reshape(self._static())
        seed_everything(run.seed, 0, 0)  # of what is put on it: controllers, or a baseline's
        model = adapt(static, **recipe.adapt)
        if run.method.prepare is not None:
            run.method.prepare(model)
        return model

    def model(self, run: Run) -> MIAFormer:
        """The trained model of a run, in evaluation mode. Raises ValueError where it is not there any more."""
        run = self.trained(run)
        saved = self.directory(run) / "model"
        if run.method.recipe is not None and not (saved / "model.safetensors").exists():
            raise ValueError(f"{saved} holds no model: measuring and timing need what training left there")
        if run.method.recipe is None:
            return self._untrained(run).eval()
        if run.method.prepare is None:
            return MIAFormer.from_pretrained(saved).eval()
        model = self._untrained(run)  # files do not tell what was added to it
        model.load_state_dict(load_file(saved / "model.safetensors"))
        return model.eval()

    # Measuring --------------------------------------------------------------------------------------------------------

    def is_done(self, run: Run, timed: bool) -> bool:
        """Whether there is nothing left to do: all is measured and, where that is wanted, timed."""
        return self.is_measured(run) and (self.is_timed(run) or not timed)

    def is_measured(self, run: Run) -> bool:
        path = self.directory(run) / "measured.json"
        return path.exists() and json.loads(path.read_text())["asked"] == self._asked()

    def _asked(self) -> dict[str, Any]:
        return {"budgets": list(self.budgets), "test_images": self.test_images, "data": Path(self.data).name}

    def measure(self, run: Run, device: torch.device, on_progress: OnProgress | None = None) -> None:
        """What the trained model does on each test image at each budget."""
        static, entries = self._entries(run, device)
        arrays = self._difficulty(static, device)
        arrays |= on_test_images(entries, self.batches("test"), device, on_progress)
        points = [{"name": one.name, "budget": one.budget, "key": place} for place, one in enumerate(entries)]
        out = self.directory(run)
        out.mkdir(parents=True, exist_ok=True)
        (out / "measured.json").unlink(missing_ok=True)  # it says that the figures beside it are whole
        np.savez_compressed(out / "measured.npz", **arrays)  # type: ignore[arg-type]
        report = {
            "method": run.method.name,
            "about": run.method.about,
            "seed": run.seed,
            "points": points,
            "core_seconds": core_seconds(self.directory(self.trained(run))),
            "asked": self._asked(),
            "environment": describe_environment(device, run.seed),
        }
        (out / "timed.json").unlink(missing_ok=True)  # of what was measured before
        _write(out / "measured.json", report)

    def _difficulty(self, static: nn.Module, device: torch.device) -> dict[str, Array]:
        """How hard the test images are for the backbone, found once for all methods."""
        path, asked = self.backbone / "difficulty.npz", json.dumps(self._asked(), sort_keys=True)
        if path.exists():
            with np.load(path) as known:
                if str(known["asked"]) == asked:
                    return {name: known[name] for name in ("dense_loss", "dense_margin")}
        found = difficulty(static, self.batches("test"), device)
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, asked=np.array(asked), **found)  # type: ignore[arg-type]
        return found

    def is_timed(self, run: Run) -> bool:
        return (self.directory(run) / "timed.json").exists()

    def time(self, run: Run, device: torch.device) -> None:
        """How long the trained model takes at each budget, beside the backbone: give the machine nothing else to do.

        Raises ValueError where the model is not there any more.
        """
        static, entries = self._entries(run, device)
        report = {
            "times": time_entries(static, entries, timed_pictures(self.batches("test"), device)),
            "environment": describe_environment(device, run.seed),
        }
        _write(self.directory(run) / "timed.json", report)

    @torch.no_grad()
    def _entries(self, run: Run, device: torch.device) -> tuple[nn.Module, list[Entry]]:
        """The static backbone, and the trained model at each budget."""
        model = self.model(run).to(device)
        reference = MIAFormer.from_pretrained(self.backbone).to(device)
        question = Question(self.budgets, lambda: self.batches("calibration"), reference.cost().backbone, run.seed)
        return reference.backbone.eval(), run.method.entries(model, question)

    def batches(self, split: Split) -> Iterable[LabelledBatch]:
        """Of a split, in order; of the test split no more than are measured."""
        data = self._shared.in_own_order(open_data(self.data, split))
        transform = build_transform(self._shared.data_config())
        batches = Batches(data, transform, 250, seed=0, shuffle=False, drop_last=False).epoch(0)
        left = len(data) if self.test_images is None or split != "test" else self.test_images
        for batch in batches:
            yield batch if len(batch) <= left else type(batch)(batch.images[:left], batch.labels[:left], batch.index)
            left -= len(batch)
            if left <= 0:
                return

    @cached_property
    def _shared(self) -> MIAFormer:
        return MIAFormer.from_pretrained(self.backbone)


def runs(methods: Sequence[str], seeds: Sequence[int], baseline_seeds: Sequence[int] = (0,)) -> list[Run]:
    """The runs of these methods, ours with `seeds`, the others with `baseline_seeds`.

    Raises ValueError for unknown names.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}: use some of {', '.join(METHODS)}")
    found = []
    for name in dict.fromkeys(methods):
        found += [Run(METHODS[name], seed) for seed in (seeds if name == "learned" else baseline_seeds)]
    return found


def _write(path: Path, report: dict[str, Any]) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
