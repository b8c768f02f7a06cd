"""Accuracy and MACs of targets under attacks, image by image, and the worst over all attacks.

What is judged is the deployed target, whatever an attack differentiated. A target that draws its decisions is asked
several times, and an image counts by the share of right answers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.data.files import whole_file
from miaformer.data.seeds import stream_seed
from miaformer.evaluation.intervals import interval, resampled
from miaformer.lab.attacks.compute import Patch, best_patch
from miaformer.lab.attacks.gradient import Ball, Climb
from miaformer.lab.attacks.methods import ATTACKS, DRAWS, Given
from miaformer.lab.attacks.target import Target, steadied, watched

Array = NDArray[Any]
OnProgress = Callable[[str, int, int | None], None]  # what is under way, how much of it is done, and of how much

PATCH_DRAWS = 2  # a step: its batches are averaged over anyway
ANSWERS = "answers"  # progress within an attack: images that its target was asked about
VERSION = 2  # of what attacks do: another one does not go on with what was kept
ASKED = 8  # times, of a target that draws
WORST = "worst"


@dataclass(frozen=True)
class Verdict:
    """What a target made of images: the share of right answers, and the mean MACs fraction, (n,) each."""

    right: Array
    macs_fraction: Array

    @staticmethod
    def joined(parts: Sequence[Verdict]) -> Verdict:
        return Verdict(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("right", "macs_fraction")))


@torch.no_grad()
def judge(target: Target, images: Tensor, labels: Tensor) -> Verdict:
    """images: pixels (B, 3, H, W) from 0 to 1; labels: (B,)."""
    rounds = ASKED if target.is_random else 1
    answers = [target.deployed(images) for _ in range(rounds)]
    right = torch.stack([(answer.logits.argmax(dim=1) == labels).double() for answer in answers]).mean(dim=0)
    macs = torch.stack([answer.macs_fraction.double() for answer in answers]).mean(dim=0)
    return Verdict(right.cpu().numpy(), macs.cpu().numpy())


@dataclass(frozen=True)
class RobustnessEvaluation:
    """What is attacked, on which images, how hard.

    images: pixels (n, 3, H, W) from 0 to 1; labels: (n,). static: the backbone, to transfer from; spender: the learned
    policy, to transfer attacks on compute from to targets whose decisions have no gradient. out: where verdicts
    are kept, batch by batch, so that the same evaluation goes on where it was stopped; fingerprint: what must be the
    same for that.
    cascade: each attack on errors sees only the images that withstood those before it, at this radius and at smaller
    ones: the worst in less time, other rows are cumulative. batch_size: images attacked at once.
    """

    images: Tensor
    labels: Tensor
    static: Target
    num_classes: int
    climb: Climb
    seed: int = 0
    spender: Target | None = None
    cascade: bool = False
    batch_size: int = 250
    out: Path | None = None
    fingerprint: Mapping[str, Any] | None = None

    def run(
        self, targets: Sequence[Target], attacks: Sequence[str], balls: Sequence[Ball], on_progress: OnProgress
    ) -> list[dict[str, Any]]:
        """A row for each target, radius and attack, and the worst of each radius where there are several attacks."""
        self._check_out()
        rows = []
        for target in targets:
            clean = self._verdict(target, None, None, self._everyone(), on_progress)
            worst: dict[str, Array] = {}  # by norm; what fools within a radius fools within larger ones
            for ball in sorted(balls, key=lambda ball: ball.eps):
                standing = worst.get(ball.norm, clean.right)
                tried = []
                for name in attacks:
                    on_errors = not ATTACKS[name].on_compute
                    if not self._can(target, name):
                        continue
                    among = standing > 0 if self.cascade and on_errors else self._everyone()
                    found = self._verdict(target, name, ball, among, on_progress)
                    if self.cascade and on_errors:  # who was not attacked any more is fooled, at the cost as it is
                        macs = np.where(among, found.macs_fraction, clean.macs_fraction)
                        found = Verdict(np.where(among, found.right, 0.0), macs)
                    rows.append(_row(name, ball, target, clean, found))
                    if on_errors:
                        standing = np.minimum(standing, found.right)
                        tried.append(name)
                worst[ball.norm] = standing
                if len(tried) > 1:
                    rows.append(_row(WORST, ball, target, clean, Verdict(standing, clean.macs_fraction), tried))
        return rows

    def _can(self, target: Target, attack: str) -> bool:
        """Whether an attack has something to aim at."""
        if target is self.static and not ATTACKS[attack].of_static:
            return False
        return not ATTACKS[attack].on_compute or "through" in target.views or self.spender is not None

    def run_patches(
        self,
        targets: Sequence[Target],
        attacks: Sequence[str],
        learned_on: Tensor,
        share: float,
        steps: int,
        on_progress: OnProgress,
    ) -> list[dict[str, Any]]:
        """A row for each target and kind of patch of this share of the area: `patch`, or `patch-kept` predictions.

        learned_on: pixels (n, 3, H, W) of other images. A row has no radius: `patch_area` says how large it is.
        """
        rows = []
        for attack in attacks:
            patches: dict[str, Patch] = {}  # by the target that they were learned on
            for target in targets:
                aim = target if "through" in target.views else self.spender
                if target is self.static or aim is None:
                    continue
                what = f"{attack}, {aim.name}"
                if aim.name not in patches:
                    steady = steadied(aim, PATCH_DRAWS) if aim.is_random else aim

                    def report(step: int, what: str = what) -> None:
                        on_progress(what, step, steps)

                    keeps = attack == "patch-kept"
                    with seeded(self.seed, what):
                        patches[aim.name] = best_patch(steady, learned_on, share, steps, keeps, self.seed, report)
                with seeded(self.seed, f"{attack} on {target.name}"):
                    rows.append(self._under(target, patches[aim.name], attack))
        return rows

    def _under(self, target: Target, patch: Patch, attack: str) -> dict[str, Any]:
        batches = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        parts = [(judge(target, x, labels), judge(target, patch.on(x), labels)) for x, labels in batches]
        clean, found = (Verdict.joined(side) for side in zip(*parts, strict=True))
        area = patch.area / (self.images.shape[2] * self.images.shape[3])
        return {**_row(attack, None, target, clean, found), "patch_area": area}

    def _everyone(self) -> Array:
        return np.ones(len(self.labels), dtype=bool)

    def _verdict(
        self, target: Target, attack: str | None, ball: Ball | None, among: Array, on_progress: OnProgress
    ) -> Verdict:
        """Of the images `among` (n,), attacked or, without attack and ball, as they are; 0 of all others."""
        what = f"{attack or 'clean'}, {target.name}" + ("" if ball is None else f", eps {ball}")
        places = np.flatnonzero(among)
        radius = "" if ball is None else f"-{ball.norm}-{ball.eps!r}"
        path = None if self.out is None else self.out / f"{target.name}-{attack or 'clean'}{radius}.npz"
        done, found = _kept(path, among)
        aim = steadied(target, DRAWS) if target.is_random else target
        answers = 0

        def on_answers(images: int) -> None:
            nonlocal answers
            answers += images
            on_progress(ANSWERS, answers, None)

        aim, static = watched(aim, on_answers), watched(self.static, on_answers)
        spender = None if self.spender is None else watched(self.spender, on_answers)
        for start in range(done, len(places), self.batch_size):
            some = places[start : start + self.batch_size]
            which = torch.from_numpy(some)
            images, labels = self.images[which], self.labels[which]
            with seeded(self.seed, f"{what}, from {start}"):  # the same whatever was done before
                if attack is not None and ball is not None:
                    given = Given(static, spender, ball, self.climb, self.num_classes, self.seed + start)
                    images = ATTACKS[attack].run(aim, images, labels, given)
                part = judge(target, images, labels)
            found.right[some], found.macs_fraction[some] = part.right, part.macs_fraction
            done = start + len(some)
            if path is not None:
                with whole_file(path) as unfinished, unfinished.open("wb") as file:
                    np.savez_compressed(file, **vars(found), among=among, done=done)
            on_progress(what, done, len(places))
        return found

    def _check_out(self) -> None:
        """Raises ValueError where `out` holds another one."""
        if self.out is None:
            return
        asked = {
            **(self.fingerprint or {}),
            "labels": zlib.crc32(self.labels.cpu().numpy().tobytes()),
            "seed": self.seed,
            "cascade": self.cascade,
            "batch_size": self.batch_size,
            "version": VERSION,
            **vars(self.climb),
        }
        path = self.out / "asked.json"
        if path.exists():
            before = json.loads(path.read_text())
            if before != asked:
                other = sorted(k for k in before.keys() | asked.keys() if before.get(k) != asked.get(k))
                raise ValueError(f"{self.out} holds attacks with another {', '.join(other)}: choose another directory")
        else:
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(asked, indent=1) + "\n")


def _kept(path: Path | None, among: Array) -> tuple[int, Verdict]:
    """How many of the images `among` (n,) have a verdict there, and these verdicts; 0 of all others."""
    if path is not None and path.exists():
        with np.load(path) as kept:
            if np.array_equal(kept["among"], among):  # in a cascade those before may have been others
                return int(kept["done"]), Verdict(kept["right"], kept["macs_fraction"])
    return 0, Verdict(np.zeros(len(among)), np.zeros(len(among)))


def _row(
    attack: str, ball: Ball | None, target: Target, clean: Verdict, found: Verdict, over: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "attack": attack,
        "eps": None if ball is None else ball.eps,
        "norm": None if ball is None else ball.norm,
        "target": target.name,
        "clean": float(clean.right.mean()),
        "robust": float(found.right.mean()),
        "robust_interval": interval(found.right, resampled(len(found.right))),
        "macs_fraction_clean": float(clean.macs_fraction.mean()),
        "macs_fraction_attacked": None if attack == WORST else float(found.macs_fraction.mean()),
        "macs_fraction_max": None if attack == WORST else float(found.macs_fraction.max()),
        "num_images": len(found.right),
        **({"over": list(over)} if over else {}),
    }


@contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """Draws from PyTorch's global generator (CPU) depend on these alone, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, what))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Attacks want gradients of images, not of weights: a third less to compute."""
    wanted = [p.requires_grad for p in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, wants in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(wants)
        model.train(training)
