"""Features of pictures: what the classifier reads, under any decisions, in Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import class_folders, classifier, run
from test_predict_resume import journal_of
from test_resolution import choosing
from torch import Tensor
from vits import STRUCTURES, lively, pictures, relative, vit

import miaformer
from miaformer.model.policy import Full, TwoLooks
from miaformer.prediction.classify import BatchClassifier, BatchEmbedder
from miaformer.prediction.entries import Entry
from miaformer.prediction.predictor import Predictor
from miaformer.prediction.rows import EMBEDDINGS, decoded
from miaformer.prediction.run import predict
from miaformer.prediction.sources import find_inputs
from miaformer.prediction.unfinished import UnfinishedRun

pytest.importorskip("pyarrow")


@pytest.mark.parametrize("structure", ["plain", "distilled", "token_avg", "map_pool", "dinov3", "clip_features", "glu"])
def test_features_are_timms_before_the_classifier(structure: str) -> None:
    backbone = vit(1, **STRUCTURES[structure]).double()
    images = pictures(backbone, 3)
    with torch.inference_mode():
        wanted = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        model = miaformer.adapt(backbone, mlp_width="coupled").eval()  # channels change their places
        output = model.run(images, features=True)
    assert output.features is not None
    assert relative(output.features, wanted) < 1e-10
    assert model.run(images).features is None


def test_features_follow_decisions_sparse_as_masked() -> None:
    model = lively(1, depth_choice="nested")
    images = pictures(model.backbone, 8)
    with torch.inference_mode():
        sparse, masked = (model.run(images, price=1.0, execution=e, features=True) for e in ("sparse", "masked"))
        everything = model.run(images, policy=Full(), features=True)
        assert sparse.features is not None
        assert masked.features is not None
        assert everything.features is not None
        assert relative(sparse.features, masked.features) < 1e-10
        assert relative(sparse.features, everything.features) > 1e-3
        assert relative(model.backbone.head(sparse.features), sparse.logits) < 1e-10


def test_of_two_looks_features_are_the_last_ones() -> None:
    model = choosing(images=40)
    images: Tensor = pictures(model.backbone, 24)
    policy = model.at_budget(0.6)
    assert isinstance(policy, TwoLooks)
    with torch.inference_mode():
        output = model.run(images, policy=policy, features=True)
        assert output.features is not None
        assert set(output.trace.looks.tolist()) == {1, 2}
        assert relative(model.backbone.head(output.features), output.logits) < 1e-5


@pytest.mark.parametrize("name", ["plain", "dinov3", "registers"])
def test_intermediates_are_timms(name: str) -> None:
    backbone = vit(2, **STRUCTURES[name])
    images = pictures(backbone, 2)
    with torch.inference_mode():
        wanted, layers = backbone.forward_intermediates(images, [0, -1], return_prefix_tokens=True, norm=True)
        model = miaformer.adapt(backbone).eval()
        found, ours = model.forward_intermediates(images, [0, -1], return_prefix_tokens=True, norm=True)
        assert relative(found, wanted) < 1e-5
        for one, other in zip(ours, layers, strict=True):
            assert all(relative(a, b) < 1e-5 for a, b in zip(one, other, strict=True))
        flat = model.forward_intermediates(images, 2, output_fmt="NLC", intermediates_only=True)
        kept = model.forward_intermediates(images, 2, output_fmt="NLC", intermediates_only=True, price=2.0)
    assert [one.shape for one in flat] == [one.shape for one in kept]
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")  # type: ignore[arg-type]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen pictures and a damaged one."""
    folder = class_folders(tmp_path_factory.mktemp("data")) / "train"
    (folder / "class1" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_the_command_writes_what_python_gives(
    suffix: str, calibrated: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet

    out = tmp_path / f"embeddings.{suffix}"
    status, said, error = run(
        capsys, "embed", calibrated, photographs, "--out", out, "--budget", 0.6, "--device", "cpu", "--batch-size", 4
    )
    assert status == 1
    assert "1 failed" in error
    assert "18 pictures" in said + error
    predictor = Predictor(miaformer.load(calibrated))
    if suffix == "npz":
        with np.load(out) as arrays:
            paths, found, macs = arrays["path"].tolist(), arrays["embedding"], arrays["macs_fraction"]
            assert [Path(name).name for name in arrays["failed"].tolist()] == ["broken.png"]
            assert len(arrays["error"]) == 1
    else:
        rows = pyarrow.parquet.read_table(out).to_pylist()
        assert [row["embedding"] is None for row in rows] == [row["error"] is not None for row in rows]
        rows = [row for row in rows if row["error"] is None]
        paths, macs = [row["path"] for row in rows], np.array([row["macs_fraction"] for row in rows])
        found = np.array([row["embedding"] for row in rows], np.float32)
    assert found.dtype == np.float32
    assert found.shape == (18, predictor.model.num_features)
    wanted = predictor.embed([predictor.prepare(path) for path in paths], budget=0.6)
    assert wanted.features is not None
    assert relative(torch.from_numpy(found), wanted.features) < 1e-5
    assert macs == pytest.approx(wanted.trace.macs_fraction.numpy(), abs=1e-6)


def test_a_vit_without_a_classifier_is_embedded_and_not_classified(tmp_path: Path) -> None:
    model = miaformer.adapt(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=2)).eval()
    predictor = Predictor(model)
    (row,) = BatchEmbedder(predictor)([("grey", _grey(tmp_path))])
    assert decoded(row["embedding"]).shape == (192,)
    assert row["macs_fraction"] == pytest.approx(model.cost().everything / model.cost().backbone)
    with pytest.raises(ValueError, match="miaformer embed"):
        BatchClassifier(predictor)
    with pytest.raises(ValueError, match="miaformer embed"):
        predictor.read(predictor.run([predictor.prepare(_grey(tmp_path))]))


def _grey(folder: Path) -> Path:
    from PIL import Image

    path = folder / "grey.png"
    Image.new("L", (40, 30), 128).save(path)
    return path


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_run_that_was_killed_gives_the_same_file(
    suffix: str, calibrated: Path, photographs: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet

    inputs = find_inputs([str(photographs)])
    maker = BatchEmbedder(Predictor(miaformer.load(calibrated)), budget=0.6)
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    with UnfinishedRun(whole, {}, table=EMBEDDINGS) as unfinished:
        predict(inputs, maker, unfinished, batch_size=4)
    for stop in (2, 3):
        with UnfinishedRun(out, {}, resume=True, table=EMBEDDINGS) as unfinished:
            unfinished.finish = lambda: None  # type: ignore[method-assign]
            predict(inputs, maker, unfinished, batch_size=4)
        lines = journal_of(out).read_bytes().splitlines(keepends=True)
        journal_of(out).write_bytes(b"".join(lines[: 1 + stop]) + lines[1 + stop][:20])
    with UnfinishedRun(out, {}, resume=True, table=EMBEDDINGS) as unfinished:
        assert unfinished.tally.rows == 12
        predict(inputs, maker, unfinished, batch_size=4)
    if suffix == "npz":
        assert out.read_bytes() == whole.read_bytes()
    else:
        assert pyarrow.parquet.read_table(out).equals(pyarrow.parquet.read_table(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.{suffix}", f"whole.{suffix}"]


def test_files_of_nothing_but_failures_are_files_too(tmp_path: Path) -> None:
    rows = [{"path": "gone.jpg", "error": "there is none"}]
    for suffix in ("npz", "parquet"):
        EMBEDDINGS.write(tmp_path / f"rows.{suffix}", iter(rows))
    with np.load(tmp_path / "rows.npz") as arrays:
        assert arrays["embedding"].shape == (0, 0)
        assert arrays["failed"].tolist() == ["gone.jpg"]


def test_mistakes_are_named(calibrated: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--out", "embeddings.csv"], "must end in .npz or .parquet"),
        (["--out", "embeddings.npz", "--budget", "7"], "budget"),
        (["--out", "embeddings.npz", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
    ):
        status, _, error = run(capsys, "embed", calibrated, photographs, *options)
        assert status == 2
        assert message in error
        assert error.count("\n") == 1


def test_rows_are_json() -> None:
    """As the journal and Ray carry them."""
    model = classifier()
    rows = BatchEmbedder(Predictor(model))([Entry("a", b"no picture")])
    assert json.loads(json.dumps(rows)) == rows
