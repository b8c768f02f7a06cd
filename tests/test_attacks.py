"""Attacks see what they claim to see, stay where they may, and find what can be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vits import lively

from miaformer import MIAFormer
from miaformer.lab.attacks import Ball, Climb
from miaformer.lab.attacks.autoattack import auto_attack
from miaformer.lab.attacks.compute import Patch, patch_size, raise_macs, universal_patch
from miaformer.lab.attacks.evaluate import ANSWERS, RobustnessEvaluation, frozen, judge
from miaformer.lab.attacks.gradient import FGSM, climb, cross_entropy, margin
from miaformer.lab.attacks.masking import signs_of_masking
from miaformer.lab.attacks.target import Answer, Pixels, Target, adaptive_target, static_target
from miaformer.model.policy import Random, Sampling
from miaformer.reports.robustness_plot import plot_robustness

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leaving": {"depth_choice": "nested"},
    "subset_coupled": {"head_choice": "subset", "mlp_width": "coupled"},
    "coming_back": {"token_scope": "per_block"},
    "even_at_the_input": {
        "depth_choice": "nested",
        "token_choice": "even",
        "first_token_block": 0,
        "last_token_block": 0,
    },
    "depth_alone": {"grains": ("depth",)},
}


def pixels(batch: int, seed: int = 0, size: int = 20) -> Tensor:
    """Images (B, 3, size, size) from 0 to 1 that differ in colour and contrast."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(batch, 3, 1, 1, generator=generator)
    noise = torch.rand(batch, 3, size, size, generator=generator) - 0.5
    return (colour + noise * torch.rand(batch, 1, 1, 1, generator=generator)).clamp(0, 1).double()


def learned_target(model: MIAFormer, name: str = "adaptive", sampling: Sampling | None = None, **how: Any) -> Target:
    return adaptive_target(model, replace(model.learned(1.0), sampling=sampling), name, **how)


# Seeing through decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cap", [None, 0.5])
def test_views_answer_what_the_deployed_model_answers(kind: str, cap: float | None) -> None:
    target = learned_target(lively(1, **MODELS[kind]), cap=cap)
    images = pixels(12)
    deployed = target.deployed(images)
    assert len(set(deployed.macs_fraction.tolist())) > 2  # or nothing is decided here
    for name in ("fixed", "through"):
        seen = target.views[name](images)
        assert torch.allclose(seen.logits, deployed.logits, atol=1e-9), name
        assert seen.logits.requires_grad
        with torch.no_grad():
            queried = target.views[name](images)  # skips what it does not execute, as deployed
        assert torch.equal(queried.logits, deployed.logits), name
        assert torch.equal(queried.macs_fraction, deployed.macs_fraction), name
    through = target.views["through"](images).macs_fraction
    if cap is None:  # what a cap forbids is not scored, which the view counts
        assert torch.allclose(through, deployed.macs_fraction.double(), atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_view_through_decisions_tells_how_to_change_the_cost(kind: str) -> None:
    target = learned_target(lively(1, **MODELS[kind]))
    images = pixels(12).requires_grad_()
    (slope,) = torch.autograd.grad(target.views["through"](images).macs_fraction.sum(), images)
    assert (slope.flatten(1).abs().sum(dim=1) > 0).sum() >= 10
    assert not target.views["fixed"](images).macs_fraction.requires_grad


def test_a_drawn_target_is_differentiated_at_what_was_drawn() -> None:
    generator = torch.Generator()
    target = learned_target(lively(1), sampling=Sampling(1.0, generator))
    images = pixels(6)
    answers = []
    for classify in (target.deployed, target.views["fixed"], target.views["through"]):
        generator.manual_seed(5)
        answers.append(classify(images).logits)
    assert target.is_random
    assert torch.allclose(answers[0], answers[1], atol=1e-9)
    assert torch.allclose(answers[0], answers[2], atol=1e-9)
    assert not torch.allclose(answers[2], target.views["through"](images).logits, atol=1e-3)


def test_spending_by_predicted_difficulty_is_seen() -> None:
    """Most of what tells images apart; in training no gradient passes it, under attack one must."""
    model = lively(1, grains=("depth",))
    with torch.no_grad():
        for controller in model.controllers:
            controller.gates.weight.zero_()  # nothing but difficulty is left
            controller.difficulty.weight.normal_(generator=torch.Generator().manual_seed(0))
    images = pixels(8).requires_grad_()
    (slope,) = torch.autograd.grad(learned_target(model).views["through"](images).macs_fraction.sum(), images)
    assert (slope.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attacks_step_in_full_precision_whatever_the_model_reads(dtype: torch.dtype) -> None:
    model = lively(2).to(dtype)
    target = static_target(model)
    images = pixels(6).float()
    assert Pixels.of(model).restored(images.to(dtype)).dtype == torch.float32
    labels = target.deployed(images).logits.argmax(dim=1)
    with frozen(model):
        found = climb(cross_entropy(target.views["fixed"], labels), images, Ball(1 / 255), Climb(steps=5))
    assert found.dtype == torch.float32
    assert (found - images).abs().max() <= 1 / 255 + 1e-6


def test_other_policies_have_decisions_that_no_gradient_passes() -> None:
    target = adaptive_target(lively(0), Random(tokens=0.5), "random")
    assert set(target.views) == {"fixed"}
    assert target.sharpest == "fixed"


def test_pixels_are_those_that_the_model_was_shown() -> None:
    model = lively(0)
    between = Pixels.of(model)
    images = pixels(3)
    assert torch.allclose(between.restored(between.normalised(images)), images)
    config = model.data_config()
    assert torch.allclose(between.normalised(torch.zeros(1, 3, 1, 1)).flatten(),
                          -torch.tensor(config["mean"]).double() / torch.tensor(config["std"]).double())  # fmt: skip


# Climbing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from(["linf", "l2"]), st.floats(1e-3, 2.0), st.integers(0, 1000))
def test_no_step_leaves_the_ball_or_the_range_of_pixels(norm: str, eps: float, seed: int) -> None:
    ball = Ball(eps, norm)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(4, 3, 5, 5, generator=generator).double()
    gradient = torch.randn(4, 3, 5, 5, generator=generator).double()
    for found in (
        ball.start(centre, generator),
        ball.project(centre + 3 * gradient, centre),
        ball.project(ball.ascend(centre, gradient, 2 * eps), centre),
        ball.project(ball.ascend(centre, torch.zeros_like(gradient), eps), centre),
    ):
        change = (found - centre).flatten(1)
        size = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
        assert (size <= eps * (1 + 1e-6)).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert found.isfinite().all()


def linear_target(seed: int = 0, size: int = 6) -> tuple[Target, Tensor]:
    """Two classes apart by a plane: which images can be fooled is known. The plane's normal (3, size, size)."""
    normal = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)).double()

    def classify(images: Tensor) -> Answer:
        score = ((images - 0.5) * normal).sum(dim=(1, 2, 3))
        return Answer(torch.stack([-score, score], dim=1), torch.ones(len(images)))

    return Target("linear", classify, {"fixed": classify}), normal


def grey(batch: int, seed: int = 0, size: int = 6) -> Tensor:
    """Images near the middle of the range, so that no pixel is cut: (B, 3, size, size)."""
    return 0.5 + 0.1 * (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).double() - 0.5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_of_a_linear_classifier_all_that_can_be_fooled_is(norm: str, loss: Callable[..., Any]) -> None:
    target, normal = linear_target()
    images = grey(64)
    scores = ((images - 0.5) * normal).sum(dim=(1, 2, 3))
    labels = (scores > 0).long()
    reach = normal.abs().sum() if norm == "linf" else normal.norm()  # dual norm
    eps = float(scores.abs().median() / reach)
    found = climb(loss(target.views["fixed"], labels), images, Ball(eps, norm), Climb(steps=20), seed=1)  # type: ignore[arg-type]
    fooled = judge(target, found, labels).right == 0
    needed = (scores.abs() / reach / eps).numpy()  # of the radius
    assert fooled[needed < (0.999 if norm == "linf" else 0.95)].all()  # steps of one length end near the border
    assert not fooled[needed > 1.001].any()
    if norm == "linf":  # one step is enough here
        one_step = climb(loss(target.views["fixed"], labels), images, Ball(eps), FGSM)
        assert np.array_equal(judge(target, one_step, labels).right == 0, fooled)


def test_climbing_is_repeatable_never_descends_and_leaves_the_misclassified_alone() -> None:
    model = lively(2)
    target = learned_target(model)
    images = pixels(10)
    labels = target.deployed(images).logits.argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % model.num_classes  # wrong from the start
    loss = margin(target.views["through"], labels)
    with frozen(model):
        found, again, other = (climb(loss, images, Ball(0.02), Climb(steps=4, restarts=2), seed) for seed in (3, 3, 4))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert torch.equal(found[:3], images[:3])
    everyone = torch.arange(len(images))
    assert (loss(found, everyone)[0] >= loss(images, everyone)[0] - 1e-9).all()
    assert (loss(found, everyone)[0] > loss(images, everyone)[0] + 1e-3)[3:].sum() >= 5  # of 7
    assert all(p.requires_grad for p in model.parameters())  # as it was before


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"eps": float("nan")}, {"eps": -1.0}, {"eps": 0.1, "norm": "l1"}])
def test_wrong_balls_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"eps=|norm="):
        Ball(**wrong)


# AutoAttack -----------------------------------------------------------------------------------------------------------


def by_hand(target: Target, images: Tensor, labels: Tensor, eps: float, seed: int, batch_size: int) -> Tensor:
    """The library as its documentation has it called."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(cast(Any, lambda x: target.views["through"](x).logits), norm="Linf", eps=eps, seed=seed)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 4  # of five classes
    attack.square.n_queries = 100  # the version sets it anew
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    return cast(Tensor, found)


@pytest.mark.usefixtures("short_auto_attack")
def test_auto_attack_is_the_librarys_to_the_last_pixel() -> None:
    model = lively(3, {"num_classes": 5, "img_size": 12}).float()
    target = learned_target(model)
    images = pixels(6, size=12).float()
    labels = target.deployed(images).logits.argmax(dim=1)
    with frozen(model):
        ours = auto_attack(lambda x: target.views["through"](x).logits, images, labels, Ball(0.03), 5, seed=7)
        theirs = by_hand(target, images, labels, 0.03, 7, 250)
    assert torch.equal(ours, theirs)
    right = judge(target, ours, labels).right
    assert 0 < right.sum() < 6  # or nothing was attacked here
    assert ((ours - images).abs() <= 0.03 + 1e-6).all()


def test_auto_attack_of_two_classes_leaves_out_what_they_have_not() -> None:
    target, normal = linear_target()
    images = grey(16).float()
    scores = ((images.double() - 0.5) * normal).sum(dim=(1, 2, 3))
    labels = (scores > 0).long()
    eps = float(scores.abs().median() / normal.abs().sum())
    state = torch.get_rng_state()
    found = auto_attack(lambda x: target.views["fixed"](x).logits, images, labels, Ball(eps), 2, ("apgd-ce", "apgd-t"))
    assert torch.equal(torch.get_rng_state(), state)
    fooled = judge(target, found, labels).right == 0
    assert fooled.sum() >= 0.9 * (scores.abs() < eps * normal.abs().sum()).sum()
    with pytest.raises(ValueError, match="four classes"):
        auto_attack(lambda x: target.views["fixed"](x).logits, images, labels, Ball(eps), 2, ("apgd-t",))


# Compute --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "leaving", "even_at_the_input"])
def test_gradients_through_decisions_raise_macs_where_noise_does_not(kind: str) -> None:
    model = lively(1, **MODELS[kind])
    target = learned_target(model)
    images, ball = pixels(16), Ball(0.1)
    with frozen(model):
        raised = raise_macs(target, images, ball, Climb(steps=10), seed=0)
        kept = raise_macs(target, images, ball, Climb(steps=10), keep_prediction=True, seed=0)
    clean, attacked, gently = (target.deployed(x) for x in (images, raised, kept))
    by_noise = target.deployed(ball.start(images, torch.Generator().manual_seed(0))).macs_fraction.mean()
    assert attacked.macs_fraction.mean() > max(clean.macs_fraction.mean(), by_noise) + 0.05
    assert gently.macs_fraction.mean() > clean.macs_fraction.mean() + 0.02
    assert torch.equal(gently.logits.argmax(dim=1), clean.logits.argmax(dim=1))
    assert (attacked.macs_fraction >= clean.macs_fraction - 1e-6).all()


@settings(max_examples=12)
@given(
    st.integers(0, 1000), st.sampled_from(sorted(MODELS)), st.floats(0.35, 1.0),
    st.sampled_from(["attacked", "noise", "constant", "extreme"]),
)  # fmt: skip
def test_no_input_breaks_a_cap(seed: int, kind: str, cap: float, what: str) -> None:
    model = lively(seed % 5, **MODELS[kind])
    target = learned_target(model, cap=cap)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 20, 20, generator=generator).double()
    if what == "attacked":
        with frozen(model):
            images = raise_macs(target, images, Ball(0.2), Climb(steps=3), seed=seed)
    elif what == "constant":
        images = images[:, :, :1, :1].expand_as(images)
    elif what == "extreme":
        images = (images - 0.5) * 1e30
    assert (target.deployed(images).macs_fraction <= cap).all()


def test_a_patch_lies_where_it_should_is_no_larger_and_makes_others_cost_more() -> None:
    model = lively(1)
    target = learned_target(model)
    with frozen(model):
        patch = universal_patch(target, [pixels(16, seed=seed) for seed in range(3)], 0.1, "centre", steps=50)
    height, width = patch.pixels.shape[1:]
    assert patch.area <= 0.1 * 400 < (height + 1) * (width + 1)
    assert ((patch.pixels >= 0) & (patch.pixels <= 1)).all()
    images = pixels(32, seed=99)
    patched = patch.on(images)
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[patch.top : patch.top + height, patch.left : patch.left + width] = False
    assert torch.equal(patched[:, :, outside], images[:, :, outside])
    assert (patched[:, :, ~outside] == patch.pixels.flatten(1)).all()
    random = Patch(torch.rand(patch.pixels.shape).double(), patch.top, patch.left)
    spent = [target.deployed(x).macs_fraction.mean() for x in (images, random.on(images), patched)]
    assert spent[2] > max(spent[:2]) + 0.01


@pytest.mark.parametrize(("size", "share", "wanted"), [((32, 32), 0.02, (4, 5)), ((224, 224), 0.02, (31, 32))])
def test_patch_sizes(size: tuple[int, int], share: float, wanted: tuple[int, int]) -> None:
    assert patch_size(size, share) == wanted


@pytest.mark.parametrize("share", [0.0, 1.5, 1e-6])
def test_impossible_patch_sizes_are_named(share: float) -> None:
    with pytest.raises(ValueError, match="patch area"):
        patch_size((20, 20), share)


# The whole -----------------------------------------------------------------------------------------------------------

QUICK = ("fgsm", "pgd", "adaptive", "transfer", "macs")


def evaluation(model: MIAFormer, **settings: Any) -> tuple[RobustnessEvaluation, list[Target]]:
    """On images that the backbone gets right, so that something can be lost."""
    static, target = static_target(model), learned_target(model)
    images = pixels(24)
    labels = static.deployed(images).logits.argmax(dim=1)
    return RobustnessEvaluation(images, labels, static, model.num_classes, Climb(steps=3), **settings), [static, target]


def ignored(what: str, done: int, total: int | None) -> None:
    pass


def by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float], dict[str, Any]]:
    return {(row["target"], row["attack"], row["eps"]): row for row in rows}


def test_rows_say_what_was_lost_and_the_worst_is_the_worst() -> None:
    model = lively(2)
    attack, targets = evaluation(model)
    balls = [Ball(0.02), Ball(0.005)]
    with frozen(model):
        rows = by_key(attack.run(targets, QUICK, balls, ignored))
    assert {(t, a) for t, a, _ in rows} == {
        *(("backbone", a) for a in ("fgsm", "pgd", "adaptive", "worst")),
        *(("adaptive", a) for a in (*QUICK, "worst")),
    }
    for (target, name, eps), row in rows.items():
        low, high = row["robust_interval"]
        assert low <= row["robust"] <= high
        if name not in ("macs", "transfer"):  # made by its own loss
            assert row["robust"] <= row["clean"]
        if name != "macs":
            assert rows[target, "worst", eps]["robust"] <= row["robust"]
            assert row["robust"] <= rows[target, name, min(0.005, eps)]["robust"] + 0.1  # more reach, more lost
    assert rows["backbone", "fgsm", 0.02]["clean"] == 1.0
    assert rows["adaptive", "worst", 0.02]["over"] == ["fgsm", "pgd", "adaptive", "transfer"]
    spent = rows["adaptive", "macs", 0.02]
    assert spent["macs_fraction_attacked"] > spent["macs_fraction_clean"]
    assert rows["backbone", "fgsm", 0.02]["macs_fraction_clean"] == 1.0


def test_a_cascade_finds_the_same_worst_by_attacks_that_do_not_draw(tmp_path: Path) -> None:
    """`fgsm` starts where the image is, and images do not see each other: so does it whoever else is attacked."""
    model = lively(2)
    balls = [Ball(0.004), Ball(0.02), Ball(0.3, "l2")]
    worst = {}
    for cascade in (False, True):
        attack, targets = evaluation(model, cascade=cascade, out=tmp_path / str(cascade))
        targets = targets[1:]
        with frozen(model):
            rows = attack.run(targets, ("fgsm", "adaptive"), balls, ignored)
            alone = attack.run(targets, ("fgsm",), balls, ignored)
        worst[cascade] = [row["robust"] for row in alone]
        by_radius = [row["robust"] for row in rows if row["attack"] == "worst" and row["norm"] == "linf"]
        assert by_radius == sorted(by_radius, reverse=True)
    reached = list(np.minimum.accumulate(worst[False][:1] + worst[False][1:2]))
    assert worst[True][:2] == reached
    assert worst[True][2] == worst[False][2]  # another norm's victims are not its own


def test_what_fools_within_a_radius_fools_within_a_larger_one() -> None:
    model = lively(2)
    attack, targets = evaluation(model)
    with frozen(model):
        rows = by_key(attack.run(targets[1:], ("fgsm", "transfer"), [Ball(eps) for eps in (0.3, 0.05, 0.01)], ignored))
    worst = [rows["adaptive", "worst", eps]["robust"] for eps in (0.01, 0.05, 0.3)]
    assert worst == sorted(worst, reverse=True)


def test_attacks_of_a_cascade_are_done_anew_where_others_went_before(tmp_path: Path) -> None:
    model = lively(2)
    attack, targets = evaluation(model, cascade=True, out=tmp_path)
    with frozen(model):
        after = attack.run(targets[1:], ("fgsm", "pgd"), [Ball(0.02)], ignored)
        alone = attack.run(targets[1:], ("pgd",), [Ball(0.02)], ignored)
        fresh = evaluation(model, cascade=True)[0].run(targets[1:], ("pgd",), [Ball(0.02)], ignored)
    assert alone == fresh
    assert len(after) == 3


def test_a_target_that_draws_is_attacked_by_its_mean() -> None:
    """Noise hides which way the plane lies from a single draw; the mean over draws tells."""
    honest, normal = linear_target()

    def noisy(images: Tensor) -> Answer:
        logits, macs = honest.deployed(images)
        return Answer(logits + 0.3 * torch.randn(logits.shape).double(), macs)

    target = Target("noisy", noisy, {"fixed": noisy}, is_random=True)
    images = grey(64)
    scores = ((images - 0.5) * normal).sum(dim=(1, 2, 3))
    labels = (scores > 0).long()
    eps = float(3 * scores.abs().max() / normal.abs().sum())  # all can be taken far beyond the plane
    attack = RobustnessEvaluation(images, labels, honest, 2, Climb(steps=5))
    rows = by_key(attack.run([target], ("fgsm", "pgd", "adaptive"), [Ball(eps)], ignored))
    assert rows["noisy", "pgd", eps]["clean"] > 0.7
    for name in ("fgsm", "pgd", "adaptive"):
        assert rows["noisy", name, eps]["robust"] < 0.02, name


def test_what_is_done_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    model = lively(2)
    out = tmp_path / "attack"
    attack, targets = evaluation(model, out=out, fingerprint={"model": "a"})
    with frozen(model):
        first = attack.run(targets, ("fgsm",), [Ball(0.02)], ignored)
        for path in out.glob("adaptive-*.npz"):
            path.unlink()  # as if stopped
        seen: list[str] = []
        again = attack.run(targets, ("fgsm",), [Ball(0.02)], lambda what, *_: seen.append(what))
    assert again == first
    seen = [what for what in seen if what != ANSWERS]
    assert seen
    assert all("adaptive" in what for what in seen)  # what was there is not done again
    other, _ = evaluation(model, out=out, fingerprint={"model": "b"})
    with pytest.raises(ValueError, match="attacks with another model"):
        other.run(targets, ("fgsm",), [Ball(0.02)], ignored)


@pytest.mark.parametrize("sampling", [None, Sampling(2.0)])
def test_stopped_between_batches_it_goes_on_as_if_it_never_was(tmp_path: Path, sampling: Sampling | None) -> None:
    model = lively(2)
    target = learned_target(model, sampling=sampling)
    done: list[tuple[str, int, int | None]] = []

    def stop(what: str, images: int, total: int | None) -> None:
        done.append((what, images, total))
        if "pgd" in what:
            raise KeyboardInterrupt

    def attack(out: Path | None) -> RobustnessEvaluation:
        return evaluation(model, out=out, batch_size=10)[0]

    with frozen(model):
        uninterrupted = attack(None).run([target], ("fgsm", "pgd"), [Ball(0.02)], ignored)
        with pytest.raises(KeyboardInterrupt):
            attack(tmp_path).run([target], ("fgsm", "pgd"), [Ball(0.02)], stop)
        again: list[tuple[str, int, int | None]] = []
        resumed = attack(tmp_path).run([target], ("fgsm", "pgd"), [Ball(0.02)], lambda *seen: again.append(seen))
    assert resumed == uninterrupted
    what = next(what for what, *_ in done if "pgd" in what)
    assert [images for who, images, _ in done if who == what] == [10]
    assert [(images, total) for who, images, total in again if who != ANSWERS] == [(20, 24), (24, 24)]
    answers = [images for who, images, _ in again if who == ANSWERS]  # it tells that it lives, not only batch by batch
    assert answers == sorted(answers)
    assert len(answers) > 2 * 3  # the steps of two batches


def test_a_target_that_draws_is_judged_by_its_share_of_right_answers() -> None:
    target = learned_target(lively(2), sampling=Sampling(2.0))
    images = pixels(24)
    torch.manual_seed(0)
    right = judge(target, images, torch.zeros(24, dtype=torch.int64)).right
    assert ((right > 0) & (right < 1)).any()
    assert set((right * 8).tolist()) <= set(range(9))


# Masking --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_auto_attack")
def test_honest_gradients_show_no_sign_and_hidden_ones_do() -> None:
    honest, normal = linear_target(size=8)
    images = grey(40, size=8)
    labels = (((images - 0.5) * normal).sum(dim=(1, 2, 3)) > 0).long()

    def hiding(pixels: Tensor) -> Answer:
        """The same classes from pixels in 16 steps: no gradient anywhere."""
        return honest.deployed((pixels * 16).round() / 16 + 0 * pixels)

    hidden = Target("hidden", hiding, {"fixed": hiding})
    images, ball = images.float(), Ball(0.1)
    found = {
        target.name: {sign.check: sign for sign in signs_of_masking(target, images, labels, ball, Climb(steps=5), 2)}
        for target in (honest, hidden)
    }
    assert all(sign.passed for sign in found["linear"].values()), found["linear"]
    failed = {check for check, sign in found["hidden"].items() if not sign.passed}
    assert {"images whose loss has no gradient", "images whose loss rises along it"} <= failed


def test_the_picture_has_a_panel_a_target(tmp_path: Path) -> None:
    row = {"clean": 0.9, "robust": 0.5, "robust_interval": [0.4, 0.6]}
    rows = [
        {**row, "target": target, "attack": attack, "eps": eps}
        for target in ("backbone", "adaptive")
        for attack in ("fgsm", "worst")
        for eps in (0.01, 0.02)
    ]
    plot_robustness([*rows, {**row, "target": "adaptive", "attack": "patch", "eps": None}], tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no attack with a radius"):
        plot_robustness([{**row, "target": "adaptive", "attack": "patch", "eps": None}], tmp_path / "c.png")
