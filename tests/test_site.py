"""The documentation site: it builds, its links lead somewhere, it needs no other host, and its examples run."""

from __future__ import annotations

import argparse
import html
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
from command_line import class_folders
from PIL import Image
from vits import enliven

import miaformer
from miaformer import cli
from miaformer.cli import build_parser
from miaformer.data import Batches, build_transform, open_data
from miaformer.evaluation import calibrate
from miaformer.training import RECIPES, get_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUNNABLE = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.skipif(not PAGES, reason="there is no docs/ beside these tests")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


class Read(HTMLParser):
    """What a built page refers to, and what in it can be referred to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []  # by the browser, without anybody's click
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.classes |= set(found.get("class", "").split())
        if "src" in found:
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found["href"])
        elif "href" in found:
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=environment, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Read]:
    return {path: Read(path) for path in site.rglob("*.html")}


# What is built -------------------------------------------------------------------------------------------------------


def test_every_link_and_picture_leads_somewhere(site: Path, built: dict[Path, Read]) -> None:
    assert len(built) > len(PAGES)  # and a 404
    broken = []
    for path, page in built.items():
        if path.name == "404.html":  # served from anywhere, so its links are absolute
            continue
        for link in page.links + page.loaded:
            target = urlsplit(link)
            if target.scheme or link.startswith("//"):
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            fragment = unquote(target.fragment) if file.suffix == ".html" else ""
            if not file.is_file() or (fragment and fragment not in built[file].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_pages_load_nothing_from_another_host(site: Path, built: dict[Path, Read]) -> None:
    loaded = [link for page in built.values() for link in page.loaded]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    styles += [style for page in built.values() for style in re.findall(r"<style.*?</style>", page.text, re.DOTALL)]
    assert len(loaded) > 100
    assert styles
    for style in styles:
        loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", style) + re.findall(r"@import\s+[\"']([^\"']+)", style)
    assert [link for link in loaded if re.match(r"(https?:)?//", link)] == []
    # The theme's script fetches these from elsewhere where a page has them.
    assert not any({"mermaid", "tabbed-set-emoji"} & page.classes for page in built.values())


def test_everything_public_is_in_the_reference(built: dict[Path, Read]) -> None:
    ids = {name for page in built.values() for name in page.ids}
    assert [name for name in miaformer.__all__ if f"miaformer.{name}" not in ids and name != "policy"] == []
    assert "miaformer.model.policy.Policy" in ids


def test_the_reference_tells_what_parameters_and_fields_are(site: Path) -> None:
    model = (site / "reference" / "model.html").read_text(encoding="utf-8")
    assert "<li><code>cap</code>: the most MACs any one image takes" in model
    use = (site / "reference" / "use.html").read_text(encoding="utf-8")
    assert "from a request's arrival to its answer" in html.unescape(use)  # a comment behind Settings.p95_ms


def test_the_command_line_reference_is_what_the_parsers_say(site: Path) -> None:
    page = _plain((site / "reference" / "cli.html").read_text(encoding="utf-8"))
    for name, command in _commands().items():
        for action in command._actions:
            if action.dest != "help" and action.help and action.help != argparse.SUPPRESS:
                said = argparse.HelpFormatter("miaformer")._expand_help(action)
                assert _plain(html.escape(said)) in page, f"{name}: {action.dest}"
        for line in (command.epilog or "").splitlines():
            assert _plain(html.escape(line)) in page
    assert argparse.SUPPRESS not in page


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "make_pictures.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) > 10
    for path in drawn:
        assert path.read_bytes() == (DOCS / "images" / path.name).read_bytes(), "run docs/make_pictures.py"


# What is written -----------------------------------------------------------------------------------------------------


def test_every_command_on_a_page_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = defaultdict(int)
    for page in PAGES:
        for words in _command_lines(page.read_text(encoding="utf-8")):
            try:
                args = build_parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {capsys.readouterr().err}")
            found[args.command] += 1
    assert found.keys() >= {"train", "eval", "predict", "explain", "report", "serve", "export", "bench", "demo"}


def test_recipes_and_extras_are_all_told() -> None:
    data = (DOCS / "howto" / "data.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        stages = ", ".join(f"{stage.kind} {stage.epochs:g}" for stage in recipe.stages)
        assert re.search(rf"^\| `{recipe.name}` \|.*\| {stages} \|$", data, re.MULTILINE), recipe.name
    start = (DOCS / "start.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([a-z]+)` \|", start, re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert told == extras.keys() - {"all", "dev", "docs"}


# What is run ---------------------------------------------------------------------------------------------------------

SMALL_VIT = "timm.create_model('vit_tiny_patch16_224', num_classes=3, **SMALL)"
INSTEAD = {  # of what would take a network or hours
    'timm.create_model("deit_small_patch16_224", pretrained=True)': SMALL_VIT,
    'timm.create_model("vit_small_patch14_dinov2", pretrained=True, img_size=224)': "features_of()",
    '"photos/", "features"': '"photos/", QUICK_FEATURES',
    '"path/to/images", "finetune"': '"photos/", QUICK',
    ".scaled(0.3).with_changes(batch_size=50)": ".scaled(0.15).with_changes(batch_size=12)",
    'AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")': "hub_model()",
    '"vit_small_patch16_224", weights="mine.pth"': '"vit_tiny_patch16_224", weights="mine.pth", **SMALL',
    'AutoImageProcessor.from_pretrained("google/vit-base-patch16-224")': "hub_processor()",
    'open_clip.create_model_and_transforms("ViT-B-16-SigLIP2", pretrained="webli")': "small_clip()",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples find where they run: pictures/ and photos/ with class folders, their embeddings.npz, mine.pth, and
    a model for digits.
    """
    root = tmp_path_factory.mktemp("workplace")
    class_folders(root / "photos", each=20)
    (root / "pictures").symlink_to("photos")
    for number, name in enumerate(("tabby", "airliner")):
        Image.new("RGB", (40, 30), (90 * number, 120, 30)).save(root / "photos" / f"{name}.jpg")
    assert cli.main(["embed", "cifar10-small", str(root / "photos"), "--out", str(root / "embeddings.npz")]) == 0
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL).state_dict(), root / "mine.pth")
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**SMALL, "img_size": 20, "patch_size": 4})
    model = enliven(miaformer.adapt(backbone)).eval()
    transform = build_transform(model.data_config())
    few = Batches(open_data("digits", "calibration"), transform, 16, seed=0, shuffle=False, drop_last=False)
    calibrate(model, [next(iter(few.epoch(0)))])
    model.save_pretrained(root / "runs" / "digits" / "model")
    return root


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that examples may use."""
    monkeypatch.chdir(workplace)
    quick = get_recipe("finetune").scaled(0.04)
    quick = quick.with_changes(batch_size=12, num_workers=0, precision="no", augmentation={"hflip": 0.5})
    sized = get_recipe("features").scaled(0.1)
    sized = sized.with_changes(batch_size=12, num_workers=0, precision="no", augmentation={"hflip": 0.5})
    torch.manual_seed(0)
    names: dict[str, Any] = {"QUICK_FEATURES": sized, "features_of": _without_classifier}
    return {**names, "SMALL": SMALL, "QUICK": quick, "images": torch.randn(2, 3, 32, 32), **_from_hub()}


def _without_classifier() -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)


NEEDED = {"transformers": "transformers", "serve": "fastapi", "export": "onnxscript", "openvino": "openvino"}


@pytest.mark.parametrize("page", [page for page in PAGES if RUNNABLE.search(page.read_text())], ids=lambda p: p.stem)
def test_examples_run(page: Path, in_workplace: dict[str, Any]) -> None:
    if page.stem in NEEDED:
        pytest.importorskip(NEEDED[page.stem])
    for example in RUNNABLE.findall(page.read_text(encoding="utf-8")):
        for written, run in INSTEAD.items():
            example = example.replace(written, run)
        assert "pretrained=True" not in example
        exec(compile(example, str(page), "exec"), in_workplace)


def test_most_pages_have_examples_and_nothing_is_replaced_in_vain() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(RUNNABLE.findall(text)) >= 12
    assert [written for written in INSTEAD if written not in text] == []
    assert not re.search(r"(?<!<!-- runs -->\n)```python", text), "an example that nobody runs"


def _from_hub() -> dict[str, Any]:
    """Stands in for the hub: a ViT of transformers with weights drawn at random."""

    def hub_model() -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
        names = {number: f"class{number}" for number in range(3)}
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label=names, **sizes))

    def hub_processor() -> Any:
        from transformers import ViTImageProcessor

        return ViTImageProcessor(size={"height": 32, "width": 32})

    def small_clip() -> Any:
        from open_clip.model import CustomTextCLIP
        from open_clip.transform import PreprocessCfg, image_transform_v2

        clip = CustomTextCLIP(16, {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}, {"layers": 1})
        clip.visual.trunk = _without_classifier()
        clip.visual.head = torch.nn.Identity()
        return clip, None, image_transform_v2(PreprocessCfg(size=32), is_train=False)

    return {"hub_model": hub_model, "hub_processor": hub_processor, "small_clip": small_clip}


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def _command_lines(page: str) -> Iterator[list[str]]:
    """The arguments of every `miaformer` in shell blocks, launched directly or by another program."""
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "miaformer" in words[:1] or ("-m" in words and "miaformer" in words):
                yield words[words.index("miaformer") + 1 :]


def _plain(text: str) -> str:
    """Words alone: no tags, no spaces, quotes and backticks as they come."""
    return re.sub(r"\s|`", "", html.unescape(html.unescape(re.sub(r"<[^>]+>", "", text))))
