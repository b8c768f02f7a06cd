"""The page at / of `miaformer serve`, in a real browser: what it shows is what the server says."""

from __future__ import annotations

import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested in a browser")

import httpx  # noqa: E402
import uvicorn  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import miaformer  # noqa: E402
from miaformer.prediction.predictor import Predictor  # noqa: E402
from miaformer.serving import Settings, create_app  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
# Of the picture of each block, how many patches are seen through.
DIMMED = """([rows, columns]) => [...document.querySelectorAll("#strip canvas")].map((canvas) => {
  const { width, height } = canvas, pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const alpha = (row, column) =>
    pixels[4 * (Math.floor((row + 0.5) * height / rows) * width + Math.floor((column + 0.5) * width / columns)) + 3];
  return [...Array(rows * columns).keys()].filter((n) => alpha(Math.floor(n / columns), n % columns) < 255).length;
})"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@contextmanager
def serving(predictor: Predictor, full: bool = False, **settings: Any) -> Iterator[str]:
    """The address of a real server, as patient as a busy machine needs. full: somebody has its last place."""
    app = create_app(predictor, Settings(p95_ms=60_000.0, **settings), "cifar10-small")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with app.state.server.batcher.room(settings["max_queue"]) if full else nullcontext():
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(miaformer.load("cifar10-small"))


@pytest.fixture(scope="module")
def address(predictor: Predictor) -> Iterator[str]:
    with serving(predictor, max_pixels=3_000_000) as at:
        yield at


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@contextmanager
def visiting(browser: Any, address: str, width: int = 1200, **settings: Any) -> Iterator[Any]:
    """A page in its own window. Checks at the end that nothing went wrong, and nobody else was asked for anything."""
    wrong: list[str] = []

    def heard(message: Any) -> None:
        # That a request was refused is said by the browser itself: some tests are about that.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(request.url)

    window = browser.new_context(
        **{"viewport": {"width": width, "height": 900}, "reduced_motion": "reduce", **settings}
    )
    page = window.new_page()
    page.on("console", heard)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", asked)
    page.goto(address)
    yield page
    window.close()
    assert not wrong


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Iterator[Any]:
    """Already shows something. Tests that use it bring a picture of their own."""
    with visiting(browser, address) as opened:
        settle(opened)
        yield opened


def settle(page: Any) -> None:
    """Wait until what was asked is answered, and on the page."""
    page.wait_for_selector("#stage[aria-busy=false]")


def picture(colours: str, size: tuple[int, int] = (80, 60), orientation: int | None = None) -> bytes:
    """Of two colours, the first one above."""
    above, below = colours.split()
    drawn = Image.new("RGB", size, below)
    ImageDraw.Draw(drawn).rectangle((0, 0, size[0], size[1] // 2 - 1), fill=above)
    exif = Image.Exif()
    if orientation:
        drawn = drawn.transpose(Image.Transpose.ROTATE_90)  # as a camera stores it that is held upright
        exif[0x0112] = orientation
    encoded = io.BytesIO()
    drawn.save(encoded, "JPEG", quality=95, exif=exif)
    return encoded.getvalue()


def give(page: Any, content: bytes, name: str = "given.jpg", how: str = "chosen") -> dict[str, Any]:
    """What the server says of a file that a person brings to the page."""
    with page.expect_response("**/explain*") as answered:
        if how == "chosen":
            page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": content})
        else:
            page.evaluate(
                """([how, name, bytes]) => {
                  const brought = new DataTransfer();
                  brought.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
                  document.body.dispatchEvent(how === "dropped"
                    ? new DragEvent("drop", { dataTransfer: brought, bubbles: true })
                    : new ClipboardEvent("paste", { clipboardData: brought, bubbles: true }));
                }""",
                [how, name, list(content)],
            )
    settle(page)
    said: dict[str, Any] = answered.value.json()
    return said


def shown(page: Any, *ids: str) -> list[str]:
    return [page.inner_text(f"#{one}").replace("\xa0", " ") for one in ids]


def test_first_visitor_sees_an_example_whole(browser: Any, address: str) -> None:
    with visiting(browser, address, width=360) as page:
        settle(page)
        label, verdict, where, server = shown(page, "label", "verdict", "where", "server")
        assert label == "ship"
        assert verdict == "Holds:"
        assert where.startswith("ship.png")
        assert server.startswith("cifar10-small, 10 classes, 32 × 32 pixels.")
        assert page.locator("#strip li").count() == 6
        assert page.locator("#heads i").count() == 6 * 4
        assert page.locator("#marks span").count() == 13
        assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing leaves a phone's screen
        page.click("[aria-label='Try a plane']")
        page.wait_for_selector("#label:text('airplane')")


@pytest.mark.parametrize("how", ["chosen", "dropped", "pasted"])
def test_label_is_the_one_that_predict_gives(page: Any, address: str, how: str) -> None:
    content = picture("skyblue darkgreen")
    answer = give(page, content, f"{how}.jpg", how)
    assert shown(page, "where")[0].startswith(f"{how}.jpg")
    for key, step in (("Home", answer["steps"][0]), ("End", answer["steps"][-1])):
        page.press("#budget", key)
        predicted = httpx.post(f"{address}/predict", content=content, params={"budget": step["budget"]}).json()
        best = predicted["predictions"][0]
        assert shown(page, "label") == [best["class"]]
        row = page.inner_text("#guesses .first").replace("\xa0", " ")
        assert f"{100 * best['probability']:.0f} %" in row


def test_slider_shows_what_each_budget_computes(page: Any) -> None:
    answer = give(page, picture("white navy"))
    least, *_, most = [step["budget"] for step in answer["steps"]]
    for place, step in enumerate(answer["steps"]):
        page.press("#budget", "ArrowRight" if place else "Home")
        assert page.evaluate(DIMMED, step["grid"]) == [kept.count(False) for kept in step["tokens"]]
        skipped = page.eval_on_selector_all("#strip button", "all => all.map((one) => one.className === 'skipped')")
        assert skipped == [not run for run in step["depth"]]
        assert page.locator("#heads .kept").count() == sum(map(sum, step["heads"]))
        verdict, asked, spent, saved, curl, macs = shown(page, "verdict", "asked", "spent", "saved", "curl", "macs")
        holds = step["prediction"]["label"] == answer["dense"]["top_k"][0]["label"]
        assert verdict == ("Holds:" if holds else "Changes:")
        fraction = f"{step['prediction']['macs_fraction']:.2f}"
        assert macs.split() == ["at", f"{step['budget']:.2f}", fraction, "dense", "1.00"]
        assert saved.startswith(f"{step['ms'] / answer['dense']['ms']:.2f} of the dense model's time for {fraction} of")
        assert asked == f"{step['budget']:.2f}"
        assert spent.startswith(f"Asked for {asked}")
        assert least <= float(curl.rstrip("'").rpartition("=")[2]) <= most


def test_play_fades_through_the_blocks(browser: Any, address: str) -> None:
    with visiting(browser, address, reduced_motion="no-preference") as page:
        settle(page)
        page.clock.install()
        page.click("#play")
        seen = []
        for _ in range(7):
            seen.append(shown(page, "where")[0].replace(",", ":").partition(":")[0])
            page.clock.run_for(700)
        assert seen == [*(f"Block {block} of 6" for block in range(1, 7)), "ship.png"]
        page.click("#strip li:nth-child(2) button")
        assert shown(page, "where")[0].startswith("Block 2 of 6")
        page.press("#block", "End")
        assert shown(page, "where")[0].startswith("Block 6 of 6")


def test_wrong_file_is_told_in_the_server_s_words(page: Any) -> None:
    give(page, picture("red blue"), "before.jpg")
    said = give(page, b"Dear diary", "diary.txt")
    assert "not a picture" in said["detail"]
    assert shown(page, "told") == [said["detail"]]
    assert shown(page, "where")[0].startswith("before.jpg")  # what was there stays
    give(page, picture("red blue"), "after.jpg")
    assert shown(page, "told") == [""]


def test_later_picture_supersedes_the_one_under_way(page: Any) -> None:
    gone: list[str] = []
    page.on("requestfailed", lambda request: gone.append(request.url))
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": picture("red blue")})
    page.wait_for_selector("#where:text('three.jpg')")
    assert shown(page, "told") == [""]
    assert len(gone) == 2


def test_picture_with_too_many_pixels_is_made_smaller_and_upright(page: Any, address: str) -> None:
    large = picture("red blue", (1200, 3000), orientation=6)
    assert httpx.post(f"{address}/explain", content=large).status_code == 413
    page.set_input_files("#file", {"name": "phone.jpg", "mimeType": "image/jpeg", "buffer": large})
    page.wait_for_selector("#where:text('phone.jpg')")
    page.press("#budget", "End")
    above, below = page.evaluate(
        """() => {
          const large = document.getElementById("large"), context = large.getContext("2d");
          return [10, large.height - 10].map((y) => [...context.getImageData(10, y, 1, 1).data]);
        }"""
    )
    assert above[0] > 200 > 60 > above[2]  # red, green, blue
    assert below[2] > 200 > 60 > below[0]


def test_server_that_is_busy_or_gone_is_told_in_a_sentence(browser: Any, predictor: Predictor) -> None:
    with (
        serving(predictor, full=True, max_queue=1, max_pictures=1) as address,
        visiting(browser, address) as page,
    ):
        page.click("[aria-label='Try a plane']")
        page.wait_for_selector("#told:text('The server is busy: try again in')")
        assert page.is_hidden("#stage")
        page.context.set_offline(True)
        page.click("#told button")
        page.wait_for_selector("#told:text('The server does not answer')")
        assert page.is_enabled("#told button")


def test_light_and_dark_are_both_readable(page: Any) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper, *inks = page.evaluate(
            """() => ["--paper", "--ink", "--quiet", "--accent"].map(
              (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"""
        )
        papers.add(paper)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb{_rgb(paper)}"
        assert min(_contrast(ink, paper) for ink in inks) >= 4.5  # WCAG 2, level AA
    assert len(papers) == 2


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def _contrast(one: str, other: str) -> float:
    """Of WCAG 2: ratio of relative luminances."""

    def luminance(colour: str) -> float:
        channels = [part / 255 for part in _rgb(colour)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)
