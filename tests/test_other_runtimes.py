"""Files of standard operators decide and answer in ONNX Runtime and in OpenVINO as the model does in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import calibrated
from test_resolution import choosing
from vits import pictures, relative

from miaformer import Decisions, MIAFormer
from miaformer.model.policy import Fixed

pytest.importorskip("onnxruntime")
import onnx

from miaformer.export import export_onnx, export_static, open_session, run_file

Run = Callable[..., dict[str, Any]]  # inputs by their names to outputs by theirs


def onnx_runtime(path: Path) -> Run:
    session = open_session(path, 1)
    names = [one.name for one in session.get_outputs()]

    def run(**inputs: Any) -> dict[str, Any]:
        given = {name: np.asarray(value) for name, value in inputs.items()}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def openvino(path: Path) -> Run:
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda **inputs: compiled(inputs)


RUNTIMES = {"onnx runtime": onnx_runtime, "openvino": openvino}
CASES = [
    "plain",
    "average pooling",
    "rotary embeddings in halves",
    pytest.param("rotary embeddings in turn", marks=pytest.mark.slow),
    pytest.param("rotary embeddings of each head", marks=pytest.mark.slow),
    pytest.param("subsets, full MLP", marks=pytest.mark.slow),
    pytest.param("registers, coupled", marks=pytest.mark.slow),
    pytest.param("gated MLP, RMS norms", marks=pytest.mark.slow),
    pytest.param("images leave", marks=pytest.mark.slow),
]


def domains(nodes: Any) -> Iterator[str]:
    for node in nodes:
        yield node.domain
        for attribute in node.attribute:
            yield from domains(attribute.g.node)


@pytest.fixture(scope="module")
def standard_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    written: dict[tuple[str, bool], Path] = {}

    def of(case: str, int8: bool = False) -> Path:
        if (case, int8) not in written:
            path = tmp_path_factory.mktemp("standard") / "model.onnx"
            export_onnx(calibrated(case), path, trace=True, standard_ops=True, int8=int8)
            written[case, int8] = path
        return written[case, int8]

    return of


@pytest.mark.parametrize("case", CASES)
def test_standard_ops_are_those_of_the_onnx_standard_alone(case: str, standard_file: Any) -> None:
    model = onnx.load(standard_file(case))
    assert set(domains(model.graph.node)) == {""}
    assert [one.domain for one in model.opset_import] == [""]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", CASES)
def test_an_adaptive_file_decides_and_answers_as_the_model(case: str, runtime: str, standard_file: Any) -> None:
    model, run = calibrated(case), RUNTIMES[runtime](standard_file(case))
    least, most = model.calibration.range[0], min(model.calibration.range[1], 1.0)
    seen, different = [], 0
    everything = pictures(model.backbone, 1).float().numpy()  # first, for OpenVINO (docs/deploy/openvino.md)
    run(images=everything, budget=np.float32(most), cap=np.float32(4.0))
    for budget in (least, (least + most) / 2, most):
        for cap in (None, 0.5):
            for image in pictures(model.backbone, 6, seed=7).float().split(1):
                with torch.inference_mode():
                    wanted = model.run(image, budget=budget, cap=cap)
                most_macs = np.float32(4.0 if cap is None else cap)
                found = run(images=image.numpy(), budget=np.float32(budget), cap=most_macs)
                decided = {name: getattr(wanted.trace, name).numpy() for name in ("depth", "heads", "tokens", "macs")}
                same = all(np.array_equal(found[name], value) for name, value in decided.items())
                different += not same
                seen.append(float(found["macs_fraction"][0]))
                if same:
                    assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
                if cap is not None:
                    assert seen[-1] <= cap + 1e-7
    assert different <= 1  # of 36: a logit within rounding of its threshold
    assert len({round(fraction, 4) for fraction in seen}) > 8  # and there was something to decide


@pytest.fixture(scope="module")
def static_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static") / "model.onnx"
    export_static(calibrated("plain"), path, some_decisions(calibrated("plain")), standard_ops=True)
    return path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_static_file_takes_batches(runtime: str, static_file: Path) -> None:
    model, proto = calibrated("plain"), onnx.load(static_file)
    assert set(domains(proto.graph.node)) == {""}
    onnx.checker.check_model(proto, full_check=True)
    run = RUNTIMES[runtime](static_file)
    for batch in (1, 3, 8):
        images = pictures(model.backbone, batch, seed=batch).float()
        with torch.inference_mode():
            wanted = model.run(images, Fixed(some_decisions(model)))
        found = run(images=images.numpy())
        assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
        assert found["macs_fraction"] == pytest.approx(wanted.trace.macs_fraction.numpy(), abs=1e-6)
    assert model.cost().fixed < wanted.trace.macs[0] < model.cost().everything


def some_decisions(model: MIAFormer) -> Decisions:
    cost, generator = model.cost(), torch.Generator().manual_seed(5)
    heads, tokens = (
        torch.rand(1, cost.depth, n, generator=generator) < 0.6 for n in (cost.num_heads, cost.num_patches)
    )
    return Decisions(torch.ones(1, cost.depth, dtype=torch.bool), heads, tokens)


def test_int8_files_run_in_openvino_as_in_onnx_runtime(standard_file: Any) -> None:
    path = standard_file("plain", True)
    runs = [RUNTIMES[runtime](path) for runtime in RUNTIMES]
    agree = 0
    for image in pictures(calibrated("plain").backbone, 8, seed=3).float().split(1):
        given = {"images": image.numpy(), "budget": np.float32(0.5), "cap": np.float32(4.0)}
        first, second = (run(**given) for run in runs)
        same = all(np.array_equal(first[name], second[name]) for name in ("depth", "heads", "tokens", "macs"))
        agree += same
        if same:
            assert relative(torch.from_numpy(second["logits"]), torch.from_numpy(first["logits"])) < 0.03
    assert agree >= 6  # of 8: where a value lies between two steps, the runtimes may round it differently


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("structure", [{"depth": 8}, {"num_classes": 0}], ids=["three early exits", "features"])
def test_images_are_made_smaller_alike(runtime: str, structure: dict[str, int], tmp_path: Path) -> None:
    """Models that choose resolutions: every size, and looks that follow the answers of a runtime."""
    model = choosing(images=40, **structure)
    path = tmp_path / "sizes.onnx"
    export_onnx(model, path, standard_ops=True, trace=True)
    metadata = {one.key: one.value for one in onnx.load(path).metadata_props}
    run = RUNTIMES[runtime](path)

    def named(outputs: Any) -> dict[str, Any]:
        return {name: outputs[name] for name in ("logits", "macs_fraction")}

    for size in json.loads(metadata["sizes"]):  # the first run in a size is wrong in OpenVINO (docs/deploy/openvino.md)
        run(
            images=pictures(model.backbone, 1).numpy(),
            budget=np.float32(size),
            cap=np.float32(4.0),
            leave=np.float32(2.0),
        )
    for image in pictures(model.backbone, 6, seed=4).split(1):
        for budget in (0.25, 0.4, 0.5, 0.8, 1.0):
            found = run_file(lambda feed: named(run(**feed)), metadata, image.numpy(), budget)
            wanted = model.run(image, budget=budget)
            assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
            assert float(found["macs_fraction"][0]) == pytest.approx(float(wanted.trace.macs_fraction), abs=1e-6)
