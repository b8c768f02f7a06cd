"""A file in 8-bit integers answers nearly as the model does, and its budgets hold once they are calibrated on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import class_folders
from test_export import calibrated
from vits import lively, pictures, relative

from miaformer import MIAFormer
from miaformer.cli import main

pytest.importorskip("onnxruntime")
import onnx

from miaformer.data import Batch
from miaformer.evaluation.calibration import price_table
from miaformer.evaluation.int8 import calibrated_int8, compare_int8
from miaformer.export import export_onnx, open_session, run_session
from miaformer.model.budget import Calibration


def batches(model: MIAFormer, count: int, seed: int) -> list[Batch]:
    images = pictures(model.backbone, count, seed=seed).float()
    with torch.inference_mode():
        return [Batch(images, model.backbone(images).argmax(dim=1), torch.arange(count))]


def initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Those of the graph and of all its branches."""
    branches = [one.g for node in graph.node for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return [*graph.initializer, *(weight for branch in branches for weight in initializers(branch))]


def test_answers_are_near_and_weights_are_a_quarter(tmp_path: Path) -> None:
    model = calibrated("plain")
    export_onnx(model, tmp_path / "int8.onnx", int8=True, trace=True)
    proto = onnx.load(tmp_path / "int8.onnx")
    layers = [
        layer for block in model.backbone.blocks for layer in block.modules() if isinstance(layer, torch.nn.Linear)
    ]
    weights = initializers(proto.graph)
    integers = [one for one in weights if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2]
    assert sum(int(np.prod(one.dims)) for one in integers) == sum(layer.weight.numel() for layer in layers)
    session, compared, worst = open_session(tmp_path / "int8.onnx", 1), 0, 0.0
    for image in pictures(model.backbone, 24, seed=4).float().split(1):
        found = run_session(session, image.numpy(), 0.7)
        with torch.inference_mode():
            wanted = model.run(image, budget=0.7)
        if all(np.array_equal(found[n], getattr(wanted.trace, n).numpy()) for n in ("depth", "heads", "tokens")):
            compared += 1
            worst = max(worst, relative(torch.from_numpy(found["logits"]), wanted.logits))
    assert compared >= 3
    assert 1e-5 < worst < 0.1  # 7 bits a weight, 8 an input, and not float32


def test_budgets_are_calibrated_on_the_file(tmp_path: Path) -> None:
    model = calibrated("plain")
    own = model.calibration
    images = batches(model, 48, seed=6)
    twin = calibrated_int8(model, images)
    assert model.calibration is own
    assert twin.calibration != own
    assert twin.calibration.num_images == 48
    (half,) = compare_int8(model, twin, images, [0.5])
    assert half.macs_fraction == pytest.approx(0.5, abs=0.01)
    assert 0 < half.flipped < 0.3
    assert 0 <= half.accuracy <= 100


def test_a_wrong_table_would_be_seen() -> None:
    model = calibrated("plain")
    images = batches(model, 24, seed=6)
    twin = calibrated_int8(model, images)
    table = twin.calibration
    twin.calibration = Calibration(tuple(price * 3 for price in table.prices), table.fractions, table.num_images)
    (half,) = compare_int8(model, twin, images, [0.5])
    assert half.macs_fraction != pytest.approx(0.5, abs=0.01)


def test_the_command_calibrates_compares_and_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miaformer.cli import export

    model = lively(1, {"num_classes": 3}).float()
    images = pictures(model.backbone, 16, seed=5).float()
    with torch.inference_mode():
        model.calibration = price_table(
            lambda p: model.run(images, price=p).trace.macs_fraction.mean().item(), 16, coarse=5
        )
    model.save_pretrained(tmp_path / "model")
    data = class_folders(tmp_path / "data", each=12)
    monkeypatch.setattr(export, "MOST_FLIPPED", -1.0)
    given = [str(tmp_path / "model"), str(tmp_path / "int8.onnx"), "--int8", "--data", str(data)]
    assert main(["export", *given]) == 0
    printed = capsys.readouterr().out
    assert "decisions that differ" in printed
    assert "of the decisions differ from float32" in printed
    budgets = json.loads(open_session(tmp_path / "int8.onnx").get_modelmeta().custom_metadata_map["budgets"])
    assert budgets != list(model.calibration.range)  # the file's own


def test_one_image_is_too_few() -> None:
    model = calibrated("plain")
    with pytest.raises(ValueError, match=r"two images at least.*got 1"):
        calibrated_int8(model, batches(model, 1, seed=0))


def test_a_file_with_an_unknown_operator_is_named(tmp_path: Path) -> None:
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("images", "logits")]
    node = onnx.helper.make_node("Unheard", ["images"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", made[:1], made[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"cannot run .*odd.onnx: .*Unheard") as error:
        open_session(tmp_path / "odd.onnx")
    assert "\n" not in str(error.value)
