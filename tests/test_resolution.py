"""Resolution as a grain: sizes, what they cost, what is refused, controls, training, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import class_folders
from tiny_training import Quadrants
from torch import Tensor
from vits import STRUCTURES, pictures, relative, vit

import miaformer
from miaformer import MIAFormer, adapt, cli
from miaformer.data import Batch
from miaformer.engine.cost import count_macs
from miaformer.evaluation import contenders
from miaformer.evaluation.calibration import calibrate
from miaformer.model.budget import Calibration
from miaformer.model.looks import STEP, Looks
from miaformer.model.policy import Full, Look, Random, RandomSizes, TwoLooks
from miaformer.model.resolution import drawn_size, image_sizes, resized
from miaformer.reports.comparison_pictures import plot_classes
from miaformer.training import Recipe, Stage, get_recipe, train
from miaformer.training.objective import Step
from miaformer.training.policies import Draws
from miaformer.training.stages import Resolution

GRID = {"img_size": 32, "patch_size": 4}  # 8 x 8 patches, as 112 pixels in patches of 14 are


def choosing(seed: int = 0, images: int = 0, **structure: object) -> MIAFormer:
    """A model that chooses resolutions, calibrated on so many images."""
    model = adapt(vit(seed, **{**GRID, **structure}), grains=("resolution",)).eval()
    if images:
        calibrate(model, batches(model, images))
    return model


def batches(model: MIAFormer, images: int) -> list[Batch]:
    labels = torch.zeros(images, dtype=torch.int64)
    return [Batch(pictures(model.backbone, images, seed=9), labels, labels)]


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_are_grids_of_8_to_4_patches_a_side() -> None:
    assert image_sizes((112, 112), (14, 14), 0.5) == ((112, 112), (98, 98), (84, 84), (70, 70), (56, 56))
    assert image_sizes((224, 224), (16, 16), 0.5) == ((224, 224), (192, 192), (160, 160), (144, 144), (112, 112))
    assert image_sizes((8, 24), (4, 6), 0.5)[-1] == (4, 12)
    assert image_sizes((4, 4), (4, 4), 0.5) == ((4, 4),)
    assert image_sizes((10, 10), (4, 4), 0.5)[0] == (10, 10), "the backbone's own size, whole patches or not"


def test_images_are_resized_without_aliasing() -> None:
    """Stripes too fine for the smaller image become their mean, not noise."""
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    assert resized(stripes, (16, 16)).abs().max() < 0.15
    half = resized(stripes.bfloat16(), (16, 16))
    assert half.dtype == torch.bfloat16
    assert half.abs().max() < 0.15
    assert resized(stripes, (32, 32)) is stripes


@pytest.mark.parametrize(
    "structure",
    [
        "plain",
        "registers",
        "layer_scale_qk_norm",
        "not_square_no_biases",
        "eva02",
        "dinov3",
        "rope_mixed",
        "perception",
    ],
)
def test_each_size_is_timms_model_of_that_size_and_costs_what_is_counted(structure: str) -> None:
    model = choosing(**STRUCTURES[structure])
    images = pictures(model.backbone, 2)
    for size in model.image_sizes():
        output = model.run(images, policy=Look(Full(), (size,)))
        wanted = model.to_timm(size)
        assert not wanted.dynamic_img_size, "which would resample position embeddings at every call"
        with torch.inference_mode():
            assert relative(output.logits, wanted(resized(images, size))) < 1e-4
            policy = Look(Full(), (size,))
            counted = count_macs(lambda p=policy: model.run(images, policy=p))  # type: ignore[misc]
        assert counted == int(output.trace.macs.sum()) == 2 * model.cost(size).everything
        rows, columns = output.trace.grid[0].tolist()
        assert (rows * 4, columns * 4) == size or structure in ("not_square_no_biases", "perception")
        assert output.trace.tokens.shape[2] == model.cost().num_patches
        assert output.trace.tokens[:, 0].sum(dim=1).tolist() == [rows * columns] * 2


def test_everything_is_the_backbone() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = backbone(images)
        model = adapt(backbone, grains=("resolution",)).eval()
        assert relative(model(images), wanted) < 1e-5
        assert relative(model.to_timm()(images), wanted) < 1e-5


# Budgets -------------------------------------------------------------------------------------------------------------


def test_budgets_are_met_on_the_calibration_images() -> None:
    model = choosing(images=300)
    table = model.calibration
    assert table is not None
    assert table.prices == ()
    assert table.fractions == pytest.approx(
        [model.cost(size).everything / model.cost().backbone for size in model.image_sizes()]
    )
    assert Calibration.from_json(table.to_json()) == table
    images = batches(model, 300)[0].images
    least = table.range[0]
    for budget in (least - 0.008, least + 0.6 * STEP, *np.linspace(least, table.range[1], 12)):
        spent = float(model.run(images, budget=float(budget)).trace.macs_fraction.double().mean())
        assert spent <= max(float(budget), least) + STEP
        if any(abs(row.budget - budget) <= STEP / 2 for row in table.looks):
            assert spent == pytest.approx(budget, abs=STEP)


def test_without_a_pair_the_largest_size_within_the_budget_is_taken() -> None:
    model = choosing(images=20)
    table = model.calibration
    assert table is not None
    model.calibration = replace(table, looks=())
    images = pictures(model.backbone, 2)
    for budget in np.linspace(table.fractions[-1], 1, 9):
        spent = model.run(images, budget=float(budget)).trace.macs_fraction
        wanted = max(fraction for fraction in table.fractions if fraction <= budget + STEP / 2)
        assert spent.tolist() == pytest.approx([wanted, wanted])


def test_what_it_cannot_do_is_said() -> None:
    model = choosing()
    images = pictures(model.backbone, 2)
    with pytest.raises(ValueError, match="not calibrated"):
        model.run(images, budget=0.5)
    calibrate(model, batches(model, 20))
    with pytest.raises(ValueError, match="no controllers"):
        model.run(images, price=1.0)
    with pytest.raises(ValueError, match="no prices"):
        model.price_of(0.5)
    with pytest.raises(ValueError, match="here none decide"):
        model.run(images, budget=0.5, sample=True)
    with pytest.raises(ValueError, match="features of a model that chooses resolutions"):
        model.forward_features(images, budget=0.5)
    with pytest.raises(ValueError, match="makes them smaller itself"):
        model.run(resized(images, (16, 16)), budget=0.5)
    with pytest.raises(ValueError, match=r"budget=0\.050 is below"):
        model.run(images, budget=0.05)
    for refused in (lambda: model.run(images, budget=0.5, cap=0.1), lambda: model.check_cap(0.1)):
        with pytest.raises(ValueError, match="the cap is below 0"):
            refused()
    with pytest.raises(ValueError, match="'resolution' is decided alone"):
        adapt(vit(**GRID), grains=("tokens", "resolution"))
    with pytest.raises(ValueError, match="least_resolution=1 must be a share"):
        adapt(vit(**GRID), grains=("resolution",), least_resolution=1)
    assert model.forward_features(resized(images, (16, 16))).shape[1] == 17
    assert model.run(images, policy=Random(tokens=0.5)).trace.macs_fraction.max() < 0.9


def test_a_cap_alone_is_spent_in_the_sizes_that_it_allows() -> None:
    model = choosing(images=60)
    images = pictures(model.backbone, 30)
    for cap in (0.3, 0.5, 0.8):
        spent = model.run(images, cap=cap).trace.macs_fraction
        assert spent.max() <= cap
        assert spent.max() > cap - 0.2


def test_controls_spend_as_much_and_know_nothing_of_the_image() -> None:
    model = choosing(images=200)
    found, left_out = contenders(model, [0.1, 0.45, 0.6], calibration=batches(model, 10))
    assert {one.budget for one in left_out} == {0.1}
    images = batches(model, 200)[0].images
    for one in found:
        output = model.run(images, policy=replace(one.policy) if one.name == "random" else one.policy)
        mean = float(output.trace.macs_fraction.mean())
        assert mean <= one.budget + 0.06, one.name
        if one.name == "static":
            assert output.trace.looks.max() == 1
            assert len(output.trace.macs.unique()) == 1
        if one.name == "learned":
            assert isinstance(one.policy, TwoLooks)
            assert one.price is None
        if one.name == "random":
            assert isinstance(one.policy, RandomSizes)
            assert mean == pytest.approx(one.budget, abs=0.02)
            again = replace(one.policy)  # from its seed on: the images do not matter, and batches differ
            assert torch.equal(output.trace.macs, model.run(images.flip(0), policy=again).trace.macs)
            assert not torch.equal(output.trace.macs, model.run(images, policy=again).trace.macs)


# Training and files --------------------------------------------------------------------------------------------------


def test_training_draws_every_size_and_learns_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = choosing().train()
    images, seen = pictures(model.backbone, 2), []
    embedded = model.backbone.patch_embed.forward
    monkeypatch.setattr(
        model.backbone.patch_embed, "forward", lambda x: (seen.append(tuple(x.shape[2:])), embedded(x))[1]
    )
    objective = Resolution(model, Stage("resolution", epochs=1, lr=0), get_recipe("digits"), None)
    classes = model.num_classes
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        drawn = Draws.of_step(generator, 2, model.cost(), 0.25, (0.3, 0.9), slice(0, 2))
        step = Step(drawn, drawn, torch.zeros(2), torch.zeros(2), (0.0, 1.0), 1.0)
        model.zero_grad()
        objective(images, torch.eye(classes)[:2], step).loss.backward()
        assert model.backbone.pos_embed.grad.abs().sum() > 0
    assert set(seen) == set(model.image_sizes())
    macs = model.macs_of_sizes()
    rates = np.linspace(0, 1, 20_000, endpoint=False)
    drawn = [drawn_size(macs, float(rate)) for rate in rates]
    spent = [drawn.count(size) * macs[size] for size in model.image_sizes()]
    assert max(spent) < 1.01 * min(spent), "all sizes get the same compute"


def test_a_recipe_of_it_ends_with_budgets(tmp_path: Path) -> None:
    recipe = Recipe(
        "sizes",
        "",
        "vit_tiny_patch16_224",
        adapt={"grains": ("resolution",)},
        stages=(Stage("resolution", epochs=1, lr=1e-3),),
        batch_size=16,
    )
    model = choosing(num_classes=4)
    trained = train(
        model,
        Quadrants("train"),
        recipe,
        tmp_path / "run",
        calibration_data=Quadrants("calibration"),
        show_progress=False,
        device="cpu",
    )
    assert trained.calibration is not None
    assert trained.calibration.prices == ()
    loaded = MIAFormer.from_pretrained(tmp_path / "run" / "model")
    images = pictures(loaded.backbone, 4)
    assert torch.equal(loaded.run(images, budget=0.5).logits, trained.run(images, budget=0.5).logits)
    with pytest.raises(ValueError, match="has a stage resolution"):
        train(adapt(vit(num_classes=4, **GRID)), "digits", recipe, tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    "structure",
    [
        "plain",
        "dinov3",
        pytest.param("registers", marks=pytest.mark.slow),
        pytest.param("eva02", marks=pytest.mark.slow),
        pytest.param("no_class_token_avg", marks=pytest.mark.slow),
        pytest.param("map_pool", marks=pytest.mark.slow),
    ],
)
def test_an_exported_file_says_the_same_with_its_trace(structure: str, tmp_path: Path) -> None:
    from miaformer.export import export_onnx, open_session, run_session

    model = choosing(images=40, **STRUCTURES[structure])
    export_onnx(model, tmp_path / "model.onnx", trace=True)
    session = open_session(tmp_path / "model.onnx", 1)
    assert (tmp_path / "model.onnx").stat().st_size < 1.5 * sum(4 * p.numel() for p in model.parameters()) + 500_000
    for image in pictures(model.backbone, 6):
        for budget, cap in product((0.25, 0.4, 0.5, 0.8, 1.0), (None, 0.35, 0.5, 0.7, 0.9)):
            found = run_session(session, image[None].numpy(), budget, 4.0 if cap is None else cap)
            wanted = model.run(image[None], budget=budget, cap=cap)
            assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
            assert float(found["macs_fraction"][0]) == pytest.approx(float(wanted.trace.macs_fraction), abs=1e-6)
            for name in ("depth", "heads", "tokens"):
                assert torch.equal(torch.from_numpy(found[name]), getattr(wanted.trace, name))


def test_an_explanation_shows_the_grid_of_the_look() -> None:
    from miaformer.prediction.explanation import explain
    from miaformer.prediction.predictor import Predictor

    model = choosing(images=40)
    images: Tensor = pictures(model.backbone, 12)
    for one in explain(Predictor(model), images, budget=0.45):
        rows, columns = one.grid
        assert all(len(kept) == rows * columns and all(kept) for kept in one.tokens)
    assert miaformer.AdaptConfig(grains=("resolution",)).looks_twice


def test_it_is_drawn(tmp_path: Path) -> None:
    """Looks at one picture differ in their grids."""
    model = choosing(images=40, num_classes=3)
    table = model.calibration
    assert table is not None
    always = Looks(0.5, table.fractions[-1], table.fractions[0], confidence=1.1)
    model.calibration = replace(table, looks=(*(row for row in table.looks if abs(row.budget - 0.5) > 0.01), always))
    model.save_pretrained(tmp_path / "model")
    data = class_folders(tmp_path / "data", each=1)
    out = tmp_path / "out"
    budgets = ["0.3", "0.5", "1"]
    assert cli.main(["explain", str(tmp_path / "model"), str(data), "--out", str(out), "--budget", *budgets]) == 0
    assert len(list(out.rglob("*.png"))) == len(list(data.rglob("*.png")))
    assert any("second look, at " in page.read_text(encoding="utf-8") for page in out.rglob("*.html"))
    plot_classes(model, batches(model, 12), tmp_path / "classes.png", 0.5, list("abc"))
    assert (tmp_path / "classes.png").stat().st_size > 2000


def test_a_static_file_is_of_one_size(tmp_path: Path) -> None:
    from miaformer.export import export_static, open_session, run_session

    model = choosing(images=40)
    model.save_pretrained(tmp_path / "model")
    size = model.image_sizes()[2]
    export_static(model, tmp_path / "one.onnx", size)
    given = ["--static", f"{model.cost(size).everything / model.cost().backbone + 0.01}", "--data", "digits"]
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "same.onnx"), *given]) == 0
    image = pictures(model.backbone, 1)
    wanted = model.run(image, policy=Look(Full(), (size,)))
    for name in ("one", "same"):
        found = run_session(open_session(tmp_path / f"{name}.onnx", 1), image.numpy())
        assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
        assert float(found["macs_fraction"][0]) == pytest.approx(float(wanted.trace.macs_fraction), abs=1e-6)


def test_its_backbone_can_be_attacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choosing(images=20, num_classes=3).save_pretrained(tmp_path / "model")
    data = class_folders(tmp_path / "data")
    command = ("attack", tmp_path / "model", "--data", data, "--attacks", "fgsm", "--images", 6, "--no-masking-check")
    assert cli.main([str(part) for part in command]) == 0
    assert "backbone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("attack", "MODEL", "--data", "DATA", "--targets", "sampled"), "it draws no decisions"),
        (("export", "MODEL", "OUT", "--price", "1"), "has no prices"),
    ],
)
def test_commands_for_controllers_say_that_there_are_none(
    command: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choosing(images=20, num_classes=3).save_pretrained(tmp_path / "model")
    places = {"MODEL": tmp_path / "model", "OUT": tmp_path / "out.onnx", "DATA": class_folders(tmp_path / "data")}
    assert cli.main([str(places.get(part, part)) for part in command]) == 2
    assert said in capsys.readouterr().err
