"""Reports say what happened: budgets are met, numbers are those of the images, controls are compared at equal cost."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vits import lively, pictures

from miaformer import MIAFormer
from miaformer.engine.decisions import Decisions
from miaformer.evaluation import (
    POLICIES,
    calibrate,
    contenders,
    describe_environment,
    evaluate,
    spearman,
    static_decisions,
)
from miaformer.model.policy import Static

POINT = {  # names that programs read
    "policy",
    "budget",
    "price",
    "accuracy",
    "macs_fraction",
    "macs_fraction_p95",
    "macs_fraction_max",
    "macs_fraction_std",
    "depth_kept",
    "heads_kept",
    "tokens_kept",
}
CALIBRATED_ON = 384


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


def labelled(images: Tensor, size: int = 128) -> list[Batch]:
    labels = torch.randint(10, (len(images),), generator=torch.Generator().manual_seed(5))
    return [Batch(*pair) for pair in zip(images.split(size), labels.split(size), strict=True)]


def uncalibrated() -> MIAFormer:
    """A small model whose decisions differ between images, and change gently with the price."""
    model = lively(settings={"num_classes": 10, "img_size": 16, "depth": 3}).float()
    with torch.no_grad():
        for controller in model.controllers:
            controller.gates.weight.mul_(0.4)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(uncalibrated().backbone, 1408, seed=3)


@pytest.fixture(scope="module")
def held_out(images: Tensor) -> list[Batch]:
    """What calibration sees."""
    return labelled(images[:CALIBRATED_ON])


@pytest.fixture(scope="module")
def test_set(images: Tensor) -> list[Batch]:
    """What it does not."""
    return labelled(images[CALIBRATED_ON:])


@pytest.fixture(scope="module")
def model(held_out: list[Batch]) -> MIAFormer:
    found = uncalibrated()
    calibrate(found, held_out, "pictures")
    return found


def fractions(model: MIAFormer, batches: list[Batch], **asked: float) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.run(batch.images, **asked).trace.macs_fraction.double() for batch in batches])


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.55, 0.7])
def test_a_calibrated_budget_is_met(
    model: MIAFormer, held_out: list[Batch], test_set: list[Batch], budget: float
) -> None:
    assert fractions(model, held_out, budget=budget).mean().item() == pytest.approx(budget, abs=0.01)
    assert fractions(model, test_set, budget=budget).mean().item() == pytest.approx(budget, abs=0.02)


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_decisions_for_a_static_file_are_one_for_all_and_meet_the_budget(
    model: MIAFormer, held_out: list[Batch], budget: float
) -> None:
    decisions = static_decisions(model, budget, held_out)
    assert isinstance(decisions, Decisions)
    assert len(decisions.depth) == 1
    with torch.inference_mode():
        spent = model.run(held_out[0].images, policy=Static(decisions)).trace.macs_fraction
    assert spent.min() == spent.max()
    assert float(spent[0]) == pytest.approx(budget, abs=0.02)


def test_calibration_measures_greedy_sparse_decisions_of_all_images(model: MIAFormer, held_out: list[Batch]) -> None:
    table = model.calibration
    assert table is not None
    assert (table.num_images, table.data) == (CALIBRATED_ON, "pictures")
    for index in (0, len(table.prices) // 2, -1):
        measured = fractions(model, held_out, price=table.prices[index]).mean().item()
        assert measured == pytest.approx(table.fractions[index], abs=1e-6)


def test_calibration_says_how_far_it_is_and_leaves_the_mode_as_it_was(held_out: list[Batch]) -> None:
    model = uncalibrated().train()
    seen: list[tuple[str, int]] = []
    calibrate(model, held_out[:1], tolerance=0.5, on_progress=lambda stage, done: seen.append((stage, done)))
    assert model.training
    assert seen == [("calibrate", done) for done in range(1, len(seen) + 1)]
    assert len(seen) >= 13
    assert model.backbone.patch_embed.proj.weight.requires_grad


def test_calibration_needs_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        calibrate(uncalibrated(), [])


# Rank correlation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # scipy.stats.spearmanr's own example
        (
            [1, 1, 1, 2, 2, 3],
            [6, 5, 5, 3, 3, 1],
            -15 / 247.5**0.5,
        ),  # ties in both: Pearson's r of the mean ranks, by hand
        ([3, 1, 2], [30, 10, 20], 1.0),
        ([3, 1, 2], [-9, 0, -1], -1.0),
        ([1, 2, 3], [4, 4, 4], 0.0),
    ],
)
def test_spearman(x: list[float], y: list[float], wanted: float) -> None:
    assert spearman(torch.tensor(x).float(), torch.tensor(y)) == pytest.approx(wanted, abs=1e-12)


def test_spearman_does_not_mind_order_or_monotone_change() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, generator=generator), torch.randint(6, (200,), generator=generator)
    order = torch.randperm(200, generator=generator)
    assert spearman(x[order], y[order]) == pytest.approx(spearman(x, y), abs=1e-12)
    assert spearman(x.exp(), 3 * y) == pytest.approx(spearman(x, y), abs=1e-12)


def test_spearman_of_unlike_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"equal length, got \(3,\) and \(2,\)"):
        spearman(torch.zeros(3), torch.zeros(2))


# Reports --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(model: MIAFormer, held_out: list[Batch], test_set: list[Batch]) -> dict:
    return evaluate(model, test_set, [0.6, 0.4], POLICIES, calibration=held_out, seed=7)


def test_a_report_is_what_the_design_says(report: dict, model: MIAFormer) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["dense"].keys() == {"accuracy", "macs"}
    assert report["dense"]["macs"] == model.cost().backbone
    assert all(point.keys() == POINT for point in report["points"])
    named = [(point["policy"], point["budget"]) for point in report["points"]]
    others = ("learned", "static", "random", "cls-attention")
    assert named == [("full", 1.0), *[(name, 0.4) for name in others], *[(name, 0.6) for name in others]]
    for point in report["points"]:
        assert (point["price"] is not None) == (point["policy"] == "learned")
        assert 0 < point["macs_fraction"] <= point["macs_fraction_p95"] <= point["macs_fraction_max"] <= 1
        assert all(0 < point[share] <= 1 for share in ("depth_kept", "heads_kept", "tokens_kept"))
    assert report["adaptivity"].keys() == {"spearman_difficulty_macs", "by_budget"}
    assert report["controllers"]["macs_fraction"] == model.controller_macs() / model.cost().backbone
    assert report["left_out"] == []
    environment = report["environment"]
    assert environment.keys() == {
        *("seed", "versions", "device", "processor", "threads", "git_commit", "command", "date"),
    }
    assert environment["seed"] == 7
    assert environment["versions"].keys() == {"miaformer", "torch", "timm", "python", "onnxruntime"}


def test_a_learned_point_is_what_running_the_images_gives(
    report: dict, model: MIAFormer, test_set: list[Batch]
) -> None:
    point = next(p for p in report["points"] if (p["policy"], p["budget"]) == ("learned", 0.4))
    with torch.inference_mode():
        outputs = [model.run(batch.images, budget=0.4) for batch in test_set]
        losses = torch.cat([F.cross_entropy(model.backbone(b.images), b.labels, reduction="none") for b in test_set])
    labels = torch.cat([batch.labels for batch in test_set])
    correct = torch.cat([output.logits for output in outputs]).argmax(dim=1) == labels
    macs = torch.cat([output.trace.macs for output in outputs]).double() / model.cost().backbone
    depth = torch.cat([output.trace.depth for output in outputs])
    heads = torch.cat([output.trace.heads for output in outputs])
    tokens = torch.cat([output.trace.tokens for output in outputs])
    assert point["accuracy"] == pytest.approx(correct.double().mean().item())
    assert point["macs_fraction"] == pytest.approx(macs.mean().item(), abs=1e-6)
    assert point["macs_fraction_p95"] == pytest.approx(macs.quantile(0.95).item(), abs=1e-6)
    assert point["macs_fraction_max"] == pytest.approx(macs.max().item(), abs=1e-6)
    assert point["depth_kept"] == pytest.approx(depth.double().mean().item())
    assert point["heads_kept"] == pytest.approx(heads[depth].double().mean().item())
    assert point["tokens_kept"] == pytest.approx(tokens[depth].double().mean().item())
    assert point["price"] == model.price_of(0.4)
    by_budget = {row["budget"]: row["spearman_difficulty_macs"] for row in report["adaptivity"]["by_budget"]}
    assert by_budget[0.4] == pytest.approx(spearman(losses, macs.float()), abs=1e-6)
    assert report["adaptivity"]["spearman_difficulty_macs"] == pytest.approx(sum(by_budget.values()) / 2)


def test_dense_and_full_agree_with_the_backbone(report: dict, model: MIAFormer, test_set: list[Batch]) -> None:
    with torch.inference_mode():
        right = [model.backbone(batch.images).argmax(dim=1) == batch.labels for batch in test_set]
    accuracy = torch.cat(right).double().mean().item()
    assert report["dense"]["accuracy"] == pytest.approx(accuracy)
    full = report["points"][0]
    assert full["accuracy"] == pytest.approx(accuracy)
    assert full["macs_fraction_std"] == pytest.approx(0, abs=1e-9)


def test_controls_cost_what_the_learned_policy_costs(report: dict) -> None:
    for point in report["points"][1:]:
        # 16 tokens in 3 blocks: a token is about 0.02 of the MACs, and random means are those of 1,024 images
        tolerance = {"static": 0.012, "cls-attention": 0.05}.get(point["policy"], 0.02)
        assert point["macs_fraction"] == pytest.approx(point["budget"], abs=tolerance), point
    spread = {(p["policy"], p["budget"]): p["macs_fraction_std"] for p in report["points"]}
    assert spread["static", 0.4] == pytest.approx(0, abs=1e-9)
    assert spread["random", 0.4] > 0.02
    assert spread["learned", 0.4] > 0.02


def test_a_report_can_be_repeated(model: MIAFormer, held_out: list[Batch], test_set: list[Batch], report: dict) -> None:
    again = evaluate(model, test_set, [0.4, 0.6], POLICIES, calibration=held_out, seed=7)
    assert again["points"] == report["points"]
    other = evaluate(model, test_set, [0.4], ["random"], calibration=held_out, seed=8)
    assert other["points"][0] != next(p for p in report["points"] if (p["policy"], p["budget"]) == ("random", 0.4))


def test_a_cap_holds_for_every_policy_and_controls_still_cost_the_same(
    model: MIAFormer, held_out: list[Batch], test_set: list[Batch]
) -> None:
    capped = evaluate(model, test_set[:4], [0.55], POLICIES, cap=0.5, calibration=held_out)
    assert all(point["macs_fraction_max"] <= 0.5 + 1e-9 for point in capped["points"])
    spent = {point["policy"]: point["macs_fraction"] for point in capped["points"]}
    assert spent["learned"] < 0.5
    assert spent["static"] == pytest.approx(spent["learned"], abs=0.02)
    assert spent["random"] == pytest.approx(spent["learned"], abs=0.02)


def test_a_budget_that_a_policy_cannot_meet_is_named_and_the_rest_is_evaluated(
    model: MIAFormer, held_out: list[Batch], test_set: list[Batch]
) -> None:
    assert model.calibration is not None
    too_little = model.calibration.range[0] - 0.02
    found = evaluate(model, test_set[:1], [too_little, 0.5], ("learned", "static"), calibration=held_out)
    assert [(p["policy"], p["budget"]) for p in found["points"]] == [("learned", 0.5), ("static", 0.5)]
    assert [(o["policy"], o["budget"]) for o in found["left_out"]] == [("learned", too_little), ("static", too_little)]
    assert f"budget={too_little:.3f} is below" in found["left_out"][0]["reason"]
    with pytest.raises(ValueError, match=r"is below .* the least that this model spends"):
        evaluate(model, test_set[:1], [too_little], ["learned"])


def test_an_uncalibrated_model_is_evaluated_without_learned_decisions(test_set: list[Batch]) -> None:
    model = uncalibrated()
    with pytest.raises(ValueError, match="not calibrated"):
        evaluate(model, test_set, [0.5])
    found = evaluate(model, test_set, [0.5], ("random", "full"))
    assert found["adaptivity"] == {"spearman_difficulty_macs": None, "by_budget": []}
    assert found["points"][1]["macs_fraction"] == pytest.approx(0.5, abs=0.02)


def test_evaluation_reports_progress_and_leaves_the_mode_as_it_was(
    model: MIAFormer, held_out: list[Batch], test_set: list[Batch]
) -> None:
    seen: list[tuple[str, int]] = []
    copied = copy.deepcopy(model).train()
    evaluate(
        copied, test_set[:2], [0.5], calibration=held_out, on_progress=lambda stage, done: seen.append((stage, done))
    )
    assert copied.training
    assert [done for stage, done in seen if stage == "controls"] == [128, 256, 384]
    assert [done for stage, done in seen if stage == "evaluate"] == [128, 256]


def test_batches_are_passed_over_once(model: MIAFormer, held_out: list[Batch], test_set: list[Batch]) -> None:
    def once(batches: list[Batch]) -> Iterator[Batch]:
        yield from batches

    found = evaluate(model, once(test_set), [0.4, 0.6], calibration=once(held_out))
    assert found["num_images"] == sum(len(batch.images) for batch in test_set)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ["best"]}, "unknown policy best: use some of learned, static"),
        ({"budgets": [1.5]}, r"budget=1\.5 must be a fraction"),
        ({"budgets": []}, "at least one policy and one budget"),
        ({"policies": []}, "at least one policy and one budget"),
        ({"calibration": None}, "need calibration batches"),
        ({"calibration": []}, "no calibration images"),
        ({"cap": 0.0001}, r"cap=\S+ is less than"),
        ({"batches": []}, "no images to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_error(
    model: MIAFormer, held_out: list[Batch], test_set: list[Batch], arguments: dict, message: str
) -> None:
    usual = {"batches": test_set[:1], "budgets": [0.5], "calibration": held_out[:1]}
    with pytest.raises(ValueError, match=message):
        evaluate(model, **{**usual, **arguments})


def test_labels_that_the_model_does_not_have_are_an_error(model: MIAFormer, test_set: list[Batch]) -> None:
    wrong = [Batch(test_set[0].images, torch.full_like(test_set[0].labels, 10))]
    with pytest.raises(ValueError, match="label 10 does not fit a model of 10 classes"):
        evaluate(model, wrong, [], ["full"])


def test_contenders_are_named_budget_by_budget(model: MIAFormer, held_out: list[Batch]) -> None:
    found, left_out = contenders(model, [0.6, 0.4, 0.6], ("static", "learned", "static"), calibration=held_out)
    assert [(c.name, c.budget) for c in found] == [
        ("static", 0.4),
        ("learned", 0.4),
        ("static", 0.6),
        ("learned", 0.6),
    ]
    assert left_out == []


def test_the_environment_names_device_and_commit() -> None:
    found = describe_environment("cpu", seed=3)
    assert found["device"].startswith("cpu (")
    assert found["seed"] == 3
    assert found["git_commit"] is None or len(found["git_commit"].rstrip("+")) == 40
    json.dumps(found)
