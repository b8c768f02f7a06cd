"""An exported file decides and answers as the model does, and skips."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import load_script
from torch import nn
from vits import ALL_STRUCTURES, WITHOUT_HEADS, lively, pictures, relative, vit

import miaformer
from miaformer import Decisions, MIAFormer
from miaformer.cli import main
from miaformer.data import build_transform
from miaformer.evaluation.calibration import price_table
from miaformer.model.budget import Calibration
from miaformer.model.policy import Fixed

pytest.importorskip("onnxruntime")
from miaformer.export import export_onnx, export_static, open_session, run_session

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_inference.py"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "tokens alone": ("plain", {"grains": ("tokens",)}),
    "heads alone": ("plain", {"grains": ("heads",)}),
    "rows in multiples": ("plain", {"token_multiple": 4}),
    "registers, coupled": ("registers", {"mlp_width": "coupled"}),
    "layer scale and qk-norm, per block": ("layer_scale_qk_norm", {"token_scope": "per_block"}),
    "average pooling": ("no_class_token_avg", {}),
    "subsets, full MLP": ("distilled", {"head_choice": "subset", "mlp_width": "full"}),
    "attention pooling": ("map_pool", {"mlp_width": "coupled", "token_multiple": 4}),
    "gated MLP, RMS norms": ("aim", {}),
    "norms inside": ("scale_norms_layer", {}),
    "images leave": ("plain", {"depth_choice": "nested"}),
    "images without a class token leave": ("no_class_token_avg", {"depth_choice": "nested"}),
    "tokens not dithered": ("plain", {"dither": False}),
    "convolutional stem": ("conv_stem", {}),
    "rotary embeddings in halves": ("dinov3", {}),
    "rotary embeddings in turn": ("eva02", {"token_scope": "per_block"}),
    "rotary embeddings of each head": ("rope_mixed", {}),
    "post-norm": ("post_norm", {}),
    "grouped queries": ("grouped_queries", WITHOUT_HEADS),
    "grouped queries, subsets": ("grouped_queries", {**WITHOUT_HEADS, "head_choice": "subset", "mlp_width": "coupled"}),
}


@cache
def calibrated(case: str) -> MIAFormer:
    structure, config = CASES[case]
    model = lively(1, ALL_STRUCTURES[structure], **config).float()
    images = pictures(model.backbone, 16, seed=5).float()
    with torch.inference_mode():
        model.calibration = price_table(
            lambda price: model.run(images, price=price).trace.macs_fraction.mean().item(), 16, coarse=9, most=12
        )
    return model


SLOW = {
    "tokens alone",
    "heads alone",
    "layer scale and qk-norm, per block",
    "average pooling",
    "norms inside",
    "tokens not dithered",
    "images leave",
    "grouped queries, subsets",
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in sorted(CASES)]
)
def test_an_exported_file_decides_and_answers_as_the_model(case: str, tmp_path: Path) -> None:
    model = calibrated(case)
    export_onnx(model, tmp_path / "model.onnx", trace=True)
    session = open_session(tmp_path / "model.onnx", 1)
    images = pictures(model.backbone, 8, seed=7).float()
    least, most = model.calibration.range[0], min(model.calibration.range[1], 1.0)
    seen, different = [], 0
    for budget in (least, (least + most) / 2, most):
        for cap in (None, 0.6, 0.4):
            for image in images.split(1):
                with torch.inference_mode():
                    wanted = model.run(image, budget=budget, cap=cap)
                found = run_session(session, image.numpy(), budget, 4.0 if cap is None else cap)
                trace = wanted.trace
                same = all(np.array_equal(found[n], getattr(trace, n).numpy()) for n in ("depth", "heads", "tokens"))
                different += not same
                seen.append(float(found["macs_fraction"][0]))
                if same:
                    assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
                    assert found["macs_fraction"][0] == pytest.approx(trace.macs_fraction.item(), abs=1e-6)
                if cap is not None:
                    assert found["macs_fraction"][0] <= cap + 1e-7
    assert different <= 2  # of 72: a logit within rounding of its threshold
    assert len({round(fraction, 4) for fraction in seen}) > 8  # and there was something to decide


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(calibrated("plain"), path)
    return path


@pytest.mark.parametrize("kind", ["huge", "black", "constant", "noise"])
def test_no_image_breaks_the_cap_of_a_file(kind: str, plain_file: Path) -> None:
    model = calibrated("plain")
    session = open_session(plain_file, 1)
    images = pictures(model.backbone, 4, seed=2).float()
    shown = {
        "huge": images * 1e8,
        "black": images * 0,
        "constant": images[..., :1, :1].expand_as(images).contiguous(),
        "noise": torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 30,
    }[kind]
    for cap in (0.15, 0.3, 0.5, 0.8):
        for image in shown.split(1):
            found = run_session(session, image.numpy(), 1.0, cap)
            assert found["macs_fraction"][0] <= cap + 1e-7
            assert np.isfinite(found["logits"]).all()


def test_a_file_holds_each_weight_once(plain_file: Path) -> None:
    weights = sum(p.numel() * p.element_size() for p in calibrated("plain").parameters())
    assert plain_file.stat().st_size < 1.6 * weights + 400_000  # and the graph beside them


@pytest.mark.parametrize(
    ("case", "standard_ops"),
    [
        ("average pooling", False),
        ("subsets, full MLP", True),
        ("grouped queries", False),
        pytest.param("registers, coupled", False, marks=pytest.mark.slow),
        pytest.param("gated MLP, RMS norms", True, marks=pytest.mark.slow),
        pytest.param("attention pooling", False, marks=pytest.mark.slow),
        pytest.param("images leave", True, marks=pytest.mark.slow),
        pytest.param("rotary embeddings in turn", False, marks=pytest.mark.slow),
        pytest.param("rotary embeddings of each head", True, marks=pytest.mark.slow),
        pytest.param("grouped queries, subsets", True, marks=pytest.mark.slow),
    ],
)
def test_a_static_file_executes_its_decisions_on_batches_without_control_flow(
    case: str, standard_ops: bool, tmp_path: Path
) -> None:
    import onnx

    model = calibrated(case)
    cost = model.cost()
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(1, cost.depth, *shape, generator=generator) < 0.6

    decisions = Decisions(draw(), draw(cost.num_heads), draw(cost.num_patches))
    export_static(model, tmp_path / "static.onnx", decisions, standard_ops=standard_ops)
    nodes = onnx.load(tmp_path / "static.onnx").graph.node
    assert not {node.op_type for node in nodes} & {"If", "Loop", "Scan", "NonZero"}
    assert ("com.microsoft" in {node.domain for node in nodes}) == (not standard_ops)
    session = open_session(tmp_path / "static.onnx", 1)
    for batch in (1, 3, 8):
        images = pictures(model.backbone, batch).float()
        with torch.inference_mode():
            wanted = model.run(images, Fixed(decisions))
        found = run_session(session, images.numpy())
        assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
        assert found["macs_fraction"] == pytest.approx(wanted.trace.macs_fraction.numpy(), abs=1e-6)


def test_a_file_at_a_price_needs_no_calibration(tmp_path: Path) -> None:
    model = lively(1).float()
    with pytest.raises(ValueError, match="not calibrated, so its file would know no budget"):
        export_onnx(model, tmp_path / "model.onnx")
    export_onnx(model, tmp_path / "model.onnx", price=1.0)
    image = pictures(model.backbone, 1).float()
    found = run_session(open_session(tmp_path / "model.onnx", 1), image.numpy(), 0.123)
    with torch.inference_mode():
        assert relative(torch.from_numpy(found["logits"]), model.run(image, price=1.0).logits) < 1e-4


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    many = miaformer.adapt(vit(embed_dim=30, num_heads=5), head_choice="subset")
    with pytest.raises(ValueError, match="at most 4 heads; this backbone has 5"):
        export_onnx(many, tmp_path / "m.onnx", price=1.0)
    odd = miaformer.adapt(vit(act_layer=nn.Mish))
    with pytest.raises(ValueError, match="does not know the activation Mish"):
        export_onnx(odd, tmp_path / "m.onnx", price=1.0)
    half = miaformer.adapt(vit()).to(torch.bfloat16)
    with pytest.raises(ValueError, match="takes a float32 model on the CPU, this one is torch"):
        export_onnx(half, tmp_path / "m.onnx", price=1.0)
    two = Decisions.full(2, 4, 3, 25)
    with pytest.raises(ValueError, match="one policy for all images, got those of 2"):
        export_static(lively(0).float(), tmp_path / "m.onnx", two)
    assert not list(tmp_path.iterdir())


def test_the_command_and_the_example_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = calibrated("plain")
    model.label_names = ["ant", "bee", "cat", "dog", "eel"]
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "m.onnx")]) == 0
    assert "budgets from" in capsys.readouterr().out
    picture = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'miaformer', 'timm'} & set(sys.modules)"
    )
    arguments = [str(EXAMPLE), str(tmp_path / "m.onnx"), str(tmp_path / "picture.png"), "--budget", "0.5"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "picture.png: " in done.stdout
    assert "of the dense MACs" in done.stdout
    assert any(name in done.stdout for name in model.label_names)
    session = open_session(tmp_path / "m.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["label_names"]) == model.label_names
    assert tuple(json.loads(meta["data_config"])["input_size"]) == (3, 20, 20)


@pytest.mark.parametrize("size", [(380, 256), (256, 341), (80, 60), (31, 97), (32, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_example_prepares_pictures_as_the_package_does(size: tuple[int, int], crop_pct: float) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    config = {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    found = runpy.run_path(str(EXAMPLE))["prepared"](picture, config)
    assert np.abs(found[0] - build_transform(config)(picture).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "--data is for --static and --int8"),
        (["--static", "0.5"], "--static finds its decisions on images"),
        (["--static", "0.5", "--data", "digits", "--trace"], "takes no --trace"),
        (["--static", "0.5", "--data", "digits", "--int8"], "and no --int8"),
        (["--int8", "--price", "1", "--data", "digits"], "--price leaves no budgets to calibrate"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nowhere", "out.onnx", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_budgets_that_single_precision_cannot_tell_apart_are_one(tmp_path: Path) -> None:
    model = copy.deepcopy(calibrated("plain"))
    model.calibration = Calibration((0.01, 0.02, 1.0, 20.0), (0.9, 0.9 - 3e-8, 0.5, 0.1), num_images=4)
    export_onnx(model, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    image = pictures(model.backbone, 1).float()
    for budget in (1.0, 0.9, 0.7, 0.3):
        with torch.inference_mode():
            wanted = model.run(image, price=0.02) if budget >= 0.9 else model.run(image, budget=budget)
        found = run_session(session, image.numpy(), budget)
        assert found["macs_fraction"][0] == pytest.approx(wanted.trace.macs_fraction.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("budget", "cap", "said"),
    [
        (float("nan"), 4.0, "budget=nan"),
        (0.0, 4.0, "budget=0"),
        (0.5, 0.01, "cap=0.01 .* at least"),
        (0.5, -1, "cap=-1"),
        (0.5, float("nan"), "cap=nan"),
    ],
)
def test_what_a_file_cannot_keep_to_is_refused(budget: float, cap: float, said: str, plain_file: Path) -> None:
    session = open_session(plain_file, 1)
    with pytest.raises(ValueError, match=said):
        run_session(session, np.zeros((1, 3, 16, 16), np.float32), budget, cap)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_images_that_are_none_are_refused(wrong: float, plain_file: Path) -> None:
    image = np.zeros((1, 3, 16, 16), np.float32)
    image[0, 1, 2, 3] = wrong
    with pytest.raises(ValueError, match="NaN or infinite"):
        run_session(open_session(plain_file, 1), image)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_script("examples/onnx_inference.py").run(open_session(plain_file, 1), image, 0.5, 4.0)


def test_decisions_of_another_model_are_not_exported(tmp_path: Path) -> None:
    model = lively(0).float().train()
    cost = model.cost()
    for sizes in ((5, 3, 16), (2, 3, 16), (3, 5, 16), (3, 3, 9)):
        assert sizes != (cost.depth, cost.num_heads, cost.num_patches)
        with pytest.raises(ValueError, match="decisions for"):
            export_static(model, tmp_path / "m.onnx", Decisions.full(1, *sizes))
    export_static(model, tmp_path / "m.onnx", Decisions.full(1, cost.depth, cost.num_heads, cost.num_patches))
    assert model.training  # as it was
