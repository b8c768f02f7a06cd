"""A person's own model: whatever wraps the weights in a file, the model answers as it did where it was saved."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import timm
import torch
from command_line import run
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vits import GROUPED_QUERIES, pictures, randomise, vit

import miaformer
from miaformer import load_backbone
from miaformer.cli.arguments import open_model
from miaformer.model.classes import read_class_names
from miaformer.vit import hub
from miaformer.vit.checkpoint_files import read_checkpoint

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}
State = dict[str, Tensor]


def made(name: str = NAME, seed: int = 0, **settings: Any) -> VisionTransformer:
    """What somebody trained: for images of 16 x 16 and 5 classes."""
    settings = {"img_size": 16, "num_classes": 5, **SIZES, **settings}
    return randomise(timm.create_model(name, **settings), seed).eval()


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same_answers(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    images = pictures(wanted, 2)
    with torch.inference_mode():
        assert torch.equal(found.eval()(images), wanted(images))


# Wrappers ------------------------------------------------------------------------------------------------------------

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled and distributed": lambda s: prefixed(s, "_orig_mod.module."),
    "attribute": lambda s: prefixed(s, "model."),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": OPTIMIZER},
    "model_state": lambda s: {"model_state": prefixed(s, "module."), "best": 0.5},
    "metrics of numpy": lambda s: {"model": s, "best": np.float64(0.3), "step": np.int64(3), "losses": [np.float32(1)]},
    "timm's training": lambda s: {"arch": NAME, "state_dict": s, "args": argparse.Namespace(lr=0.1), "version": 2},
    "DeiT's training": lambda s: {"model": s, "optimizer": OPTIMIZER, "args": argparse.Namespace(), "scaler": {}},
    "Lightning": lambda s: {
        "state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
    },
    "Lightning, net": lambda s: {"state_dict": prefixed(s, "net.")},
    "Lightning, backbone": lambda s: {"state_dict": prefixed(s, "backbone.")},
    "teacher": lambda s: {"teacher": prefixed(s, "backbone.") | {"teacher_head.weight": torch.ones(2)}},
    "average": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "average of the model": lambda s: (
        prefixed({k: v + 1 for k, v in s.items()}, "model.") | prefixed(s, "ema_model.module.")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_whatever_wraps_the_weights_the_answers_are_those_of_the_saved_model(wrapper: str, tmp_path: Path) -> None:
    model = made()
    path = saved(WRAPPED[wrapper](model.state_dict()), tmp_path / "mine.pth")
    found = load_backbone(NAME, path, **SIZES)
    assert_same_answers(found, model)
    assert found.num_classes == found.pretrained_cfg["num_classes"] == 5
    assert found.patch_embed.img_size == (16, 16)  # as in the file, not as timm's default


# Named as timm's; small ones. What their makers' own files call otherwise, and what timm leaves out.
EVA_SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
OF_EVA: dict[str, tuple[tuple[str, str], ...]] = {
    "vit_small_patch16_dinov3": (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")),
    "eva02_base_patch14_224": (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.norm", "mlp.ffn_ln")),
    "vit_small_patch16_rope_mixed_224": (),
}
LEFT_OUT: State = {"mask_token": torch.ones(1, 24), "rope_embed.periods": torch.ones(2)}


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", OF_EVA)
def test_files_of_the_other_family_are_read_too(name: str, released: bool, tmp_path: Path) -> None:
    settings = {**EVA_SIZES, "num_classes": 5, "img_size": 16}
    model = randomise(timm.create_model(name, **settings), 0).eval()
    state = prefixed(model.state_dict(), "module.")
    if released:
        state = {**model.state_dict()}
        for ours, theirs in OF_EVA[name]:
            state = {key.replace(ours, theirs): value for key, value in state.items()}
        if "dinov3" in name:
            state |= LEFT_OUT
    found = load_backbone(name, saved(state, tmp_path / "mine.pth"), image_size=16, **EVA_SIZES)
    assert_same_answers(found, model)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(["model", "module", "net.vit", "state_dict", "0"]), st.booleans()))
)
def test_keys_and_prefixes_may_be_nested_in_any_order(tmp_path_factory: Any, nesting: list[tuple[str, bool]]) -> None:
    state = vit().state_dict()
    content: Any = state
    for key, is_key in nesting:
        content = {key: content} if is_key or not isinstance(next(iter(content.values())), Tensor) else prefixed(
            content, f"{key}."
        )  # fmt: skip
    read = read_checkpoint(saved(content, tmp_path_factory.getbasetemp() / "nested.pt"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
def test_safetensors_are_known_by_their_content(suffix: str, tmp_path: Path) -> None:
    model = made()
    save_file(prefixed(model.state_dict(), "module."), tmp_path / f"mine.{suffix}")
    assert_same_answers(load_backbone(NAME, tmp_path / f"mine.{suffix}", **SIZES), model)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    model = made()
    path = saved({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "half.pt")
    found = load_backbone(NAME, path, **SIZES)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert_same_answers(found, model.half().float())


# Image sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, (8, 24)])
def test_position_embeddings_are_resampled_as_timm_does(size: Any, tmp_path: Path) -> None:
    model = made()
    path = saved(model.state_dict(), tmp_path / "mine.pth")
    found = load_backbone(NAME, path, size, **SIZES)
    grid = [side // 4 for side in ((size, size) if isinstance(size, int) else size)]
    assert found.patch_embed.img_size == tuple(4 * side for side in grid)
    assert torch.equal(found.pos_embed, resample_abs_pos_embed(model.pos_embed, grid, num_prefix_tokens=1))
    overlay = {"state_dict": model.state_dict(), "num_classes": 5}
    timms = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, img_size=size, **SIZES
    ).eval()
    assert_same_answers(found, timms)


def test_an_image_size_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=0 must be positive"):
        load_backbone(NAME, image_size=0)


# Classifiers ---------------------------------------------------------------------------------------------------------


def test_a_classifier_that_fits_is_kept_and_has_its_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    path = saved(model.state_dict(), tmp_path / "mine.pth")
    found = load_backbone(NAME, path, 16, list("abcde"), **SIZES)
    assert_same_answers(found, model)
    assert miaformer.adapt(found).label_names == list("abcde")
    assert_same_answers(load_backbone(NAME, path, 16, 5, **SIZES), model)
    assert caplog.records == []


@pytest.mark.parametrize("classes", [7, list("abcdefg")])
def test_a_classifier_that_does_not_fit_is_replaced_and_a_line_says_so(
    classes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made()
    path = saved(model.state_dict(), tmp_path / "mine.pth")
    found = load_backbone(NAME, path, 16, classes, **SIZES).eval()
    assert found.num_classes == 7
    images = pictures(model, 2)
    with torch.inference_mode():
        assert torch.equal(found.forward_features(images), model.forward_features(images))
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"mine\.pth has a classifier of 5 classes: the new one for 7 classes", line)


def test_a_file_without_a_classifier_gives_none_unless_classes_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(num_classes=0)
    path = saved(model.state_dict(), tmp_path / "mine.pth")
    assert_same_answers(load_backbone(NAME, path, **SIZES), model)
    assert load_backbone(NAME, path, classes=2, **SIZES).num_classes == 2
    assert "mine.pth has no classifier: the new one for 2 classes" in caplog.text


def test_classes_are_a_number_or_a_list() -> None:
    for wrong in ("cat", -1):
        with pytest.raises(ValueError, match=f"classes={wrong!r} must be the number"):
            load_backbone(NAME, classes=wrong)


# Releases ------------------------------------------------------------------------------------------------------------


def test_dinov2s_own_release(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    model = made(name, num_classes=0, img_size=28, patch_size=14)
    release = {"mask_token": torch.zeros(1, 24), **model.state_dict()}
    found = load_backbone(name, saved(release, tmp_path / "dinov2_vits14_pretrain.pth"), **{**SIZES, "patch_size": 14})
    assert_same_answers(found, model)


def test_dinov2s_own_release_with_registers(tmp_path: Path) -> None:
    """There a class token has a position embedding, and registers have another name."""
    name = "vit_small_patch14_reg4_dinov2"
    model = made(name, num_classes=0, img_size=28, patch_size=14)
    release = model.state_dict()
    release |= {"register_tokens": release.pop("reg_token"), "mask_token": torch.zeros(1, 24)}
    release["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), release["pos_embed"]], dim=1)
    found = load_backbone(name, saved(release, tmp_path / "reg4.pth"), **{**SIZES, "patch_size": 14})
    assert_same_answers(found, model)
    assert found.patch_embed.img_size == (28, 28)


def test_deits_own_releases(tmp_path: Path) -> None:
    distilled = made("deit_tiny_distilled_patch16_224")
    path = saved({"model": distilled.state_dict()}, tmp_path / "deit.pth")
    found = load_backbone("deit_tiny_distilled_patch16_224", path, **SIZES)
    assert_same_answers(found, distilled)
    assert load_backbone("deit_tiny_distilled_patch16_224", path, classes=2, **SIZES).head_dist.out_features == 2
    third = made("deit3_small_patch16_224")
    names = {name: re.sub(r"ls(\d)\.gamma", r"gamma_\1", name) for name in third.state_dict()}
    release = {names[name]: tensor for name, tensor in third.state_dict().items()}
    found = load_backbone("deit3_small_patch16_224", saved({"model": release}, tmp_path / "deit3.pth"), **SIZES)
    assert_same_answers(found, third)


def test_a_decoder_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made(num_classes=0)
    decoder = {"decoder_embed.weight": torch.ones(2, 2), "decoder_blocks.0.norm1.weight": torch.ones(2)}
    path = saved({"model": model.state_dict() | decoder}, tmp_path / "mae.pth")
    assert_same_answers(load_backbone(NAME, path, 16, **SIZES), model)
    assert "left out: decoder_blocks.0.norm1.weight, decoder_embed.weight" in caplog.text


# What is refused -----------------------------------------------------------------------------------------------------


class ExecutedError(BaseException):  # which no handler of bad files may catch
    """The file's code has run."""


class Hostile:
    def __reduce__(self) -> Any:
        return _execute, ()


def _execute() -> None:
    raise ExecutedError


def test_objects_in_a_pickle_are_refused_and_never_executed(tmp_path: Path) -> None:
    path = saved({"state_dict": made().state_dict(), "config": Hostile()}, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"mine\.ckpt holds Python objects .*_execute.*torch\.save\(checkpoint"):
        load_backbone(NAME, path, **SIZES)
    with pytest.raises(ExecutedError):
        torch.load(path, weights_only=False)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-900])
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(made().state_dict(), path)
    for damage in (_cut, lambda path: path.write_text("<html>404</html>"), lambda path: path.write_bytes(b"")):
        damage(path)
        with pytest.raises(ValueError, match=rf"mine\.{suffix} is damaged, or neither .*: copy or save it again$"):
            load_backbone(NAME, path, **SIZES)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint file .*nowhere\.pth"):
        load_backbone(NAME, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a directory: give the checkpoint file in it"):
        load_backbone(NAME, tmp_path)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"pointer\.pth is a pointer of Git LFS"):
        load_backbone(NAME, tmp_path / "pointer.pth")
    miaformer.adapt(vit()).save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"part of an adapted model: give its directory, .*adapted"):
        load_backbone(NAME, tmp_path / "adapted" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 ViTs, below 'a\.', 'b\.'"):
        load_backbone(NAME, saved({"a": vit().state_dict(), "b": vit().state_dict()}, tmp_path / "two.pth"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"embed_dim": 36}, r"of another shape: .*patch_embed\.proj\.weight \(24 x 3 x 4 x 4 in the file, 36 x 3"),
        ({"depth": 4}, r"Missing: blocks\.3\.norm1\.weight.*The file holds 3 blocks of 24 channels.*model 4 blocks"),
        ({"depth": 2}, r"Not in the model: blocks\.2\."),
        ({"init_values": 1e-5}, r"Missing: blocks\.0\.ls1\.gamma"),
        ({"patch_size": 8}, r"patch_embed\.proj\.weight \(24 x 3 x 4 x 4 in the file, 24 x 3 x 8 x 8 in the model\)"),
        ({"global_pool": "avg", "fc_norm": True}, r"Missing: fc_norm\.weight, fc_norm\.bias; not in the model: norm\."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_file_of_another_architecture_is_told_by_what_differs(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = saved(made().state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=rf"(?i)mine\.pth does not fit timm's {NAME}\. .*{told}.*name the timm model"):
        load_backbone(NAME, path, **{**SIZES, **settings})


def test_other_files_and_models_are_told(tmp_path: Path) -> None:
    resnet = saved({"conv1.weight": torch.ones(3, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"Missing: cls_token, .* The file holds no blocks of a ViT"):
        load_backbone(NAME, resnet)
    of_transformers = (
        "vit.encoder.layer.0.layernorm_before.weight",
        "layer.0.layer_scale1.lambda1",
        "vision_model.encoder.layers.0.layer_norm1.weight",
    )
    for name in of_transformers:
        with pytest.raises(ValueError, match=r"names are those of transformers.*miaformer\.adapt"):
            load_backbone(NAME, saved({name: torch.ones(3)}, tmp_path / "hugging.bin"))
    with pytest.raises(TypeError, match="got ResNet"):
        load_backbone("resnet18", resnet)
    with pytest.raises(ValueError, match="timm knows no model 'nosuch'"):
        load_backbone("nosuch", resnet)
    with pytest.raises(ValueError, match="Invalid pretrained tag"):
        load_backbone(f"{NAME}.nosuch", resnet)


def test_odd_weights_are_refused(tmp_path: Path) -> None:
    state = made().state_dict()
    name = "blocks.1.attn.qkv.weight"
    quantised = saved({**state, name: state[name].to(torch.int8)}, tmp_path / "int8.pth")
    with pytest.raises(ValueError, match=rf"int8\.pth holds {name} as torch\.int8: .*not quantised"):
        load_backbone(NAME, quantised, **SIZES)
    state[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"NaN or infinite values in {name}"):
        load_backbone(NAME, saved(state, tmp_path / "nan.pth"), **SIZES)


# The hub -------------------------------------------------------------------------------------------------------------


def test_the_hub_is_not_asked_where_weights_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "get_hf_file_metadata", asked)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", asked)
    model = made()
    path = saved(model.state_dict(), tmp_path / "mine.pth")
    assert_same_answers(load_backbone(NAME, path, pretrained=True, **SIZES), model)
    overlay = {"state_dict": model.state_dict(), "num_classes": 5}  # another source of timm's
    settings = {"pretrained_cfg_overlay": overlay, "img_size": 16, **SIZES}
    assert_same_answers(load_backbone(NAME, classes=5, pretrained=True, **settings), model)


def test_a_hub_out_of_reach_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def unreachable(url: str) -> None:
        tried.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    wanted = r"cannot be downloaded \(.*Name or service not known\).*huggingface\.co/timm/deit_tiny.*--weights FILE"
    with pytest.raises(ValueError, match=wanted):
        load_backbone("deit_tiny_patch16_224", pretrained=True)
    assert len(tried) == 2
    with pytest.raises(ValueError, match=r"no model 'owner/name': .*Name or service not known"):
        miaformer.load("owner/name")
    assert len(tried) == 4


# Names of classes ----------------------------------------------------------------------------------------------------


def test_class_names_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Äffchen\nbär\n", encoding="utf-8-sig")
    assert read_class_names(path) == ["Äffchen", "bär"]
    path.write_text("Äffchen\nbär\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"names\.txt is not valid UTF-8 .* at byte 0"):
        read_class_names(path)


# On the command line -------------------------------------------------------------------------------------------------

CLASSES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with mine.pth, a whole vit_tiny for images of 32 x 32 and 3 classes, and names.txt."""
    root = tmp_path_factory.mktemp("own")
    model = randomise(timm.create_model(NAME, img_size=32, num_classes=3, depth=12), 0)
    saved({"state_dict": prefixed(model.state_dict(), "module.")}, root / "mine.pth")
    (root / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8-sig")
    return root


def own_model(root: Path) -> list[object]:
    return [f"timm:{NAME}", "--weights", root / "mine.pth", "--classes", root / "names.txt"]


def test_predict_names_the_classes_of_an_own_model(
    capsys: pytest.CaptureFixture[str], own: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    status, _, err = run(capsys, "predict", *own_model(own), data / "val", "--out", out, "--top-k", 3)
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    model = open_model(f"timm:{NAME}", torch.device("cpu"), weights=str(own / "mine.pth"))
    predictor = miaformer.prediction.predictor.Predictor(model)
    for row in rows[:3]:
        (wanted,) = predictor.read(predictor.run([predictor.prepare(row["path"])]))
        assert row["class"] == CLASSES[wanted.top_k[0].label]
        assert row["probability"] == pytest.approx(wanted.top_k[0].probability, abs=1e-5)


def test_heads_that_share_keys_are_left_out_of_what_commands_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miaformer, "load_backbone", lambda *settings: vit(**GROUPED_QUERIES))
    assert open_model("timm:any", torch.device("cpu")).adapt_config.grains == ("depth", "tokens")
    monkeypatch.setattr(miaformer, "load_backbone", lambda *settings: vit())
    assert open_model("timm:any", torch.device("cpu")).adapt_config == miaformer.AdaptConfig()


def test_random_weights_are_told(capsys: pytest.CaptureFixture[str], own: Path, data: Path, tmp_path: Path) -> None:
    names = ["--classes", own / "names.txt", "--image-size", 32]
    status, _, err = run(capsys, "predict", f"timm:{NAME}", data / "val", "--out", tmp_path / "rows.csv", *names)
    assert status == 0
    assert err == f"miaformer: timm:{NAME} has random weights: give --weights FILE, or --pretrained\n"
    assert "class0" in (tmp_path / "rows.csv").read_text()


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("eval", ["--data", "DATA", "--policy", "random", "full", "--budgets", "0.5", "--json", "OUT/report.json"]),
        ("explain", ["DATA/val/class0/0.png", "--out", "OUT/explained", "--image-size", "48"]),
        ("bench", ["--data", "DATA", "--batch-sizes", "1", "--engines", "eager", "--seconds", "0.1", "--repeats", "1"]),
    ],
)
def test_commands_take_an_own_model(
    capsys: pytest.CaptureFixture[str], own: Path, data: Path, tmp_path: Path, command: str, more: list[str]
) -> None:
    more = [part.replace("DATA", str(data)).replace("OUT", str(tmp_path)) for part in more]
    status, out, err = run(capsys, command, *own_model(own), *more)
    assert (status, err) == (0, ""), err
    assert out


def test_options_of_an_own_model_are_refused_beside_an_adapted_one(
    capsys: pytest.CaptureFixture[str], own: Path, data: Path, calibrated: Path, tmp_path: Path
) -> None:
    predict = ["predict", data / "val", "--out", tmp_path / "rows.csv"]
    status, _, err = run(
        capsys, *predict[:1], calibrated, *predict[1:], "--weights", own / "mine.pth", "--image-size", 8
    )
    assert status == 2
    assert "--weights and --image-size: only with timm:NAME" in err
    (tmp_path / "few.txt").write_text("one\n")
    status, _, err = run(capsys, "predict", *own_model(own)[:3], *predict[1:], "--classes", tmp_path / "few.txt")
    assert status == 2
    assert "few.txt has 1 lines, the model 3 classes" in err


def test_train_starts_from_an_own_model_and_goes_on_wherever_the_file_lies(
    capsys: pytest.CaptureFixture[str], own: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = ["train", "--recipe", "finetune", "--stages", "backbone", "--data", data, "--out", tmp_path / "run",
             "--epochs-scale", "0.1", "--set", "precision=no", "--set", "num_workers=0", "--set", "batch_size=6",
             "--model", NAME, "--classes", own / "names.txt"]  # fmt: skip
    status, out, err = run(capsys, *start, "--weights", own / "mine.pth")
    assert status == 0, err
    assert "new" not in out + caplog.text  # the classifier is kept: its classes are the data's
    model = miaformer.load(tmp_path / "run" / "model")
    assert model.image_size() == (32, 32)
    assert model.label_names == CLASSES
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert re.fullmatch(r"mine\.pth [0-9a-f]{16}", recipe["weights"])
    elsewhere = tmp_path / "mine.pth"
    elsewhere.write_bytes((own / "mine.pth").read_bytes())
    status, _, err = run(capsys, *start, "--weights", elsewhere, "--resume")
    assert status == 0, err
    state = {name: tensor + 1 for name, tensor in read_checkpoint(elsewhere).items()}
    status, _, err = run(capsys, *start, "--weights", saved(state, elsewhere), "--resume")
    assert status == 2
    assert "another run, different in recipe.weights" in err


def test_train_says_how_a_checkpoint_file_is_given(
    capsys: pytest.CaptureFixture[str], own: Path, data: Path, calibrated: Path, tmp_path: Path
) -> None:
    start = ["train", "--recipe", "finetune", "--data", data, "--out", tmp_path / "run"]
    status, _, err = run(capsys, *start, "--backbone", own / "mine.pth")
    assert status == 2
    assert "mine.pth is a file" in err
    assert "--model NAME --weights FILE" in err
    status, _, err = run(capsys, *start, "--backbone", calibrated, "--weights", own / "mine.pth")
    assert status == 2
    assert "is a whole model, it takes no --weights" in err
    status, _, err = run(capsys, *start, "--classes", own / "names.txt")
    assert status == 2
    assert "--classes names the classes of a classifier in --weights FILE" in err


# Default dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_rounds_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    backbone = made()
    path = saved(backbone.state_dict(), tmp_path / "mine.pth")
    miaformer.adapt(made()).save_pretrained(tmp_path / "model")
    wanted = miaformer.load(tmp_path / "model")
    torch.set_default_dtype(dtype)
    try:
        found, static = miaformer.load(tmp_path / "model"), load_backbone(NAME, path, **SIZES)
        raw = miaformer.MIAFormer.from_pretrained(tmp_path / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (found, raw):
        for (name, value), other in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
    assert_same_answers(static, backbone)
