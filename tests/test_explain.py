"""`miaformer explain` shows what was executed, where it was, on pages that need nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from command_line import classifier, run
from PIL import Image
from test_plots import assert_readable, texts
from vits import enliven, lively, vit

import miaformer
from miaformer import cli
from miaformer.data.images import open_image
from miaformer.prediction.explanation import Explanation, explain, seen_picture
from miaformer.prediction.predictor import Predictor
from miaformer.reports.explaining import write_explanations

pytest.importorskip("matplotlib")


def noise(count: int, predictor: Predictor) -> torch.Tensor:
    return torch.randn(count, 3, *predictor.model.image_size(), generator=torch.Generator().manual_seed(0))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth blobs of colour: what resizing blurs only little."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)


# Explanations ---------------------------------------------------------------------------------------------------------


def test_an_explanation_says_what_was_executed() -> None:
    predictor = Predictor(classifier())
    images = noise(6, predictor)
    caps = [1.0, 0.5, 0.9, 0.4, 0.8, 0.7]
    found = explain(predictor, images, cap=caps, top_k=2)
    trace = predictor.run(images, cap=caps).trace
    for i, one in enumerate(found):
        assert (one.budget, one.cap, one.grid) == (None, caps[i], (4, 4))
        assert one.depth == trace.depth[i].tolist()
        assert one.heads == trace.heads[i].tolist()
        assert one.tokens == trace.tokens[i].tolist()
        assert one.prediction.macs_fraction == trace.macs_fraction[i] <= caps[i] + 1e-6
        assert len(one.prediction.top_k) == 2
    assert len({one.prediction.macs_fraction for one in found}) > 1
    written = json.loads(json.dumps(found[0].to_json()))
    assert list(written) == ["prediction", "budget", "cap", "grid", "depth", "heads", "tokens", "looks"]
    assert written["grid"] == [4, 4]


def test_budgets_are_one_for_all_or_one_each(calibrated: Path) -> None:
    predictor = Predictor(miaformer.load(calibrated))
    images = noise(3, predictor)
    budgets = [0.4, 0.6, 0.8]
    together = explain(predictor, images, budget=budgets)
    for i, one in enumerate(together):
        (alone,) = explain(predictor, images[i : i + 1], budget=budgets[i])
        assert (one.budget, one.tokens, one.heads) == (budgets[i], alone.tokens, alone.heads)
    with pytest.raises(ValueError, match="one for each of 3 images"):
        explain(predictor, images, budget=[0.4, 0.5])


def test_a_skipped_block_has_neither_heads_nor_tokens() -> None:
    predictor = Predictor(classifier())
    images = noise(32, predictor)
    output = predictor.run(images, price=1.0)
    found = explain(predictor, images, cap=0.3)
    skipped = [(one, block) for one in found for block, runs in enumerate(one.depth) if not runs]
    assert skipped
    assert not output.trace.depth.all()
    assert not any(any(one.heads[block]) or any(one.tokens[block]) for one, block in skipped)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"img_size": 16}, {}),
        ({"img_size": (24, 40), "patch_size": (4, 8)}, {"crop_pct": 0.9}),
        ({"img_size": 32}, {"crop_pct": 0.8}),
        ({"img_size": 32}, {"crop_pct": 0.875, "crop_mode": "squash"}),
    ],
    ids=["square", "not square", "cropped", "squashed"],
)
@pytest.mark.parametrize("size", [(366, 256), (201, 317), (900, 60), (20, 20)])
def test_the_picture_shown_is_what_the_model_saw(
    settings: dict[str, Any], config: dict[str, Any], size: tuple[int, int]
) -> None:
    backbone = vit(**settings)
    backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, **config}
    height, width = backbone.patch_embed.img_size
    backbone.pretrained_cfg["input_size"] = (3, height, width)
    predictor = Predictor(miaformer.adapt(backbone))
    picture = photo(*size)
    seen = seen_picture(predictor, picture)
    assert max(seen.size) <= 512
    patch = backbone.patch_embed.patch_size
    rows, columns = height // patch[0], width // patch[1]
    assert (seen.width % columns, seen.height % rows) == (0, 0)
    given = (predictor.prepare_picture(picture) * 0.25 + 0.5).permute(1, 2, 0).numpy()
    shown = np.asarray(seen.resize((width, height), Image.BICUBIC)) / 255
    off = np.abs(shown - given).mean()
    assert off < 0.02
    if min(size) > 100:  # a shift by a pixel would show
        assert all(np.abs(np.roll(shown, step, axis) - given).mean() > 2 * off for step in (-1, 1) for axis in (0, 1))


def test_what_the_model_pads_is_grey() -> None:
    backbone = vit(img_size=16)
    backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_mode": "border", "input_size": (3, 16, 16)}
    seen = np.asarray(seen_picture(Predictor(miaformer.adapt(backbone)), Image.new("RGB", (300, 100), "red")))
    assert (seen[0] == 128).all()
    assert (seen[len(seen) // 2] == (255, 0, 0)).all()


# The command ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a test asks of a page: its text, its elements, and what it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.tags
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in wanted.items())
        ]

    def assert_stands_alone(self) -> None:
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe")
            for name in ("src", "href"):
                target = attributes.get(name)
                local = tag == "a" and target is not None and re.fullmatch(r"[\w%.-]+\.html", target)
                assert target is None or target.startswith(("data:", "#")) or local, (tag, target)
        assert "url(" not in self.source.replace("url(#", "")
        assert "@import" not in self.source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures whose names are hard: alike in two folders and in case, the index's, with markup; and a broken one."""
    root = tmp_path / "photos"
    names = ("a/cat.png", "b/cat.png", "b/Cat.jpg", "a/index.png", 'b/we"ird <b>&#$x$ ünï?.png')
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(60 + 10 * seed, 50, seed).save(path)
    (root / "a" / "broken.png").write_bytes((root / "a" / "cat.png").read_bytes()[:200])
    return root


def test_one_picture_gets_a_page_and_a_png(
    capsys: pytest.CaptureFixture[str], calibrated: Path, folder: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out", tmp_path / "explained.json"
    picture = folder / "a" / "cat.png"
    asked = ("--budget", "0.4", "0.6", "--cap", "0.9", "--top-k", "2", "--json", report)
    status, said, err = run(capsys, "explain", calibrated, picture, "--out", out, *asked)
    assert (status, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["cat.html", "cat.png"]
    assert "cat.html: open it" in said
    written = json.loads(report.read_text())
    (entry,) = written["pictures"]
    predictor = Predictor(miaformer.load(calibrated))
    image = predictor.prepare(picture)
    expected = [explain(predictor, [image], budget=b, cap=0.9, top_k=2)[0] for b in (0.4, 0.6)]
    assert entry["explanations"] == [json.loads(json.dumps(one.to_json())) for one in expected]
    assert written["dense_macs"] == predictor.model.cost().backbone
    assert written["environment"]["versions"]["miaformer"] == miaformer.__version__

    page = Page(out / "cat.html")
    page.assert_stands_alone()
    assert not page.all("a")  # there is no index to go to
    assert len(page.all("ol", class_="strip")) == 2
    for one in expected:
        assert f"{one.prediction.macs_fraction:.3f}" in page.text
        assert str(one.prediction.top_k[0].name) in page.text
        assert f"Budget {one.budget:g}, cap 0.9" in page.text
    assert page.all("img", alt=f"{picture}, as the model saw it")
    check_strips(page, expected)
    with Image.open(out / "cat.png") as drawn:
        assert (drawn.format, min(drawn.size) > 300) == ("PNG", True)


def check_strips(page: Page, expected: list[Explanation]) -> None:
    """As many patches are dimmed, heads filled and blocks left out as were skipped."""
    blocks = [
        (runs, heads, tokens)
        for one in expected
        for runs, heads, tokens in zip(one.depth, one.heads, one.tokens, strict=True)
    ]
    dimmed = [sum(map(int, re.findall(r"h(\d+)v1", str(found["d"])))) for found in page.all("path", class_="dim")]
    assert dimmed == [len(t) - sum(t) for runs, _, t in blocks if runs and not all(t)]
    assert len(page.all("rect", class_="kept")) == sum(sum(heads) for _, heads, _ in blocks)
    assert len(page.all("rect", class_="absent")) == sum(not runs for runs, _, _ in blocks)
    labels = [found["aria-label"] for found in page.all("svg", role="img")]
    assert [label.endswith(": skipped") for label in map(str, labels)] == [not runs for runs, _, _ in blocks]


def test_python_writes_what_the_command_writes(
    capsys: pytest.CaptureFixture[str], calibrated: Path, folder: Path, tmp_path: Path
) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = write_explanations(Predictor(miaformer.load(calibrated)), paths, tmp_path / "ours", [0.5, 0.5, 0.8])
    command = ["explain", str(calibrated), str(folder), "--out", str(tmp_path / "theirs"), "--budget", "0.5", "0.8"]
    assert cli.main([*command, "--json", str(tmp_path / "a.json")]) == 1
    written, ours = json.loads((tmp_path / "a.json").read_text()), json.loads(json.dumps(found.to_json()))
    for report in (written, ours):
        report["pictures"].sort(key=lambda one: one["path"])
    assert [one["explanations"] for one in written["pictures"]] == [one["explanations"] for one in ours["pictures"]]
    assert written["failed"] == ours["failed"]
    assert len(list((tmp_path / "ours").glob("*.png"))) == len(paths) - 1
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }


def test_a_folder_gets_an_index_and_bad_pictures_stop_nothing(
    capsys: pytest.CaptureFixture[str], calibrated: Path, folder: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out", tmp_path / "explained.json"
    gone = folder / "gone.png"
    status, _, err = run(
        capsys, "explain", calibrated, folder, gone, "--out", out, "--budget", 0.5, "--json", report, "--batch-size", 2
    )
    assert status == 1
    assert "2 failed" in err
    assert all(name in err.replace("\n", "") for name in ("broken.png", "gone.png"))
    index = Page(out / "index.html")
    index.assert_stands_alone()
    links = [unquote(str(link["href"])) for link in index.all("a")]
    assert len({link.casefold() for link in links}) == 5
    assert "index.html" not in links
    written = json.loads(report.read_text())
    assert links == [entry["page"] for entry in written["pictures"]]
    spent = [entry["explanations"][0]["prediction"]["macs_fraction"] for entry in written["pictures"]]
    assert spent == sorted(spent)
    assert len(set(spent)) > 1
    assert [f"{fraction:.3f} of the MACs" for fraction in spent] == re.findall(r"[\d.]+ of the MACs", index.text)
    assert {Path(row["path"]).name for row in written["failed"]} == {"broken.png", "gone.png"}
    assert "broken.png" in index.text
    assert "truncated" in index.text
    assert 'we"ird <b>&#$x$ ünï?.png' in index.text  # as it is called, not as markup
    for link in links:
        page = Page(out / link)
        page.assert_stands_alone()
        assert [found["href"] for found in page.all("a")] == ["index.html"]
        assert (out / link).with_suffix(".png").is_file()
    assert not index.all("b")


def test_nothing_is_written_where_nothing_can_be_shown(
    capsys: pytest.CaptureFixture[str], calibrated: Path, uncalibrated: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for model, *arguments, reason in (
        (calibrated, folder, "--budget", 1.5, "must be a fraction"),
        (calibrated, folder, "--budget", 0.5, 0.001, "below"),
        (uncalibrated, folder, "--budget", 0.5, "not calibrated"),
        (calibrated, folder, "--top-k", 0, "--top-k 0 must be at least 1"),
        (calibrated, tmp_path / "empty", "no pictures in this folder"),
        (tmp_path / "gone", folder, "no model"),
    ):
        status, said, err = run(capsys, "explain", model, *arguments, "--out", out)
        assert (status, said, err.count("\n")) == (2, "", 1)
        assert reason in err
    assert not out.exists()


def test_an_uncalibrated_model_shows_everything_executed(
    capsys: pytest.CaptureFixture[str], uncalibrated: Path, folder: Path, tmp_path: Path
) -> None:
    assert run(capsys, "explain", uncalibrated, folder / "a" / "cat.png", "--out", tmp_path / "out")[0] == 0
    page = Page(tmp_path / "out" / "cat.html")
    assert "No budget" in page.text
    assert not page.all("path", class_="dim")


def test_the_png_is_readable_however_deep_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.text import Text

    from miaformer.reports import explanation_plot

    figures: list[Any] = []
    save = explanation_plot.save
    monkeypatch.setattr(explanation_plot, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    for depth, heads, count in ((3, 3, 1), (14, 16, 2)):
        settings = {"depth": depth, "num_heads": heads, "embed_dim": 2 * heads, "img_size": (16, 24)}
        model = enliven(lively(settings=settings).float())
        predictor = Predictor(model, names=["a very long name of a class, and more of it", *"bcde"])
        shown = explain(predictor, noise(count, predictor), cap=[0.9, 0.5, 0.3][:count])
        explanation_plot.plot_explanation(shown, photo(48, 32), tmp_path / "x.png", "costs $5 or $6.png", 10**9)
        assert_readable(figures[-1])
        written = [text for text, _ in texts(figures[-1])]
        assert not any(text.get_parse_math() for text in figures[-1].findobj(Text) if "$" in text.get_text())
        for one in shown:
            assert f"{one.prediction.macs_fraction:.3f} of the dense MACs" in written
        assert written.count("skipped") == sum(not runs for one in shown for runs in one.depth)


def test_a_page_names_a_picture_whose_name_is_no_text(
    capsys: pytest.CaptureFixture[str], calibrated: Path, folder: Path, tmp_path: Path
) -> None:
    odd = Path(str(folder / "a") + "/odd\udcff.png")
    try:
        odd.write_bytes((folder / "a" / "cat.png").read_bytes())
    except OSError:
        pytest.skip("this file system, as on macOS, takes only names that are valid UTF-8: such a name cannot come up")
    assert run(capsys, "explain", calibrated, odd, "--out", tmp_path / "out")[0] == 0
    assert open_image(tmp_path / "out" / "odd.png").width > 300
