"""The page of one picture, what it was given block by block, and the index of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import quote

from PIL import Image

from miaformer.prediction.explanation import Explanation
from miaformer.prediction.predictor import Guess
from miaformer.reports.page import Markup, bar, data_uri, document, is_small, join, percent, picture, tag
from miaformer.reports.style import with_unit

THUMBNAIL = 192  # pixels
MOST_ACROSS = 12  # blocks beside one another
HEAD, GAP = 7, 2  # height of a head's square, and between two, in units of a drawing that is 100 wide


@dataclass(frozen=True)
class Explained:
    """A picture, and what it was given at each budget."""

    name: str  # its path
    page: str  # the stem of its files
    size: tuple[int, int]  # width and height, of the whole picture
    shown: Sequence[Explanation]  # one a budget, at least one


@dataclass(frozen=True)
class About:
    """What all pages of a call share."""

    model: str
    dense_macs: int  # of one picture
    trims_last_block: bool
    environment: Mapping[str, Any]


def picture_page(one: Explained, seen: Image.Image, about: About, index: bool) -> str:
    """seen: of `seen_picture`. index: whether there is one to go back to."""
    rows, columns = max((shown.grid for shown in one.shown), key=math.prod)
    alt = f"{one.name}, as the model saw it"
    hero = tag(
        "div",
        tag(
            "figure",
            picture(seen, alt, class_="seen"),
            tag("figcaption", f"As the model saw it: {rows} × {columns} patches of {_named(one)}"),
        ),
        tag("div", tag("h1", _headline(one)), _summary(one), _guesses(one.shown)),
        class_="hero",
    )
    return document(
        f"{_headline(one)}: {one.name}",
        tag("p", tag("a", "All pictures", href="index.html"), class_="quiet") if index else None,
        tag("main", hero, tag("h2", "Block by block"), _reading(one, about), *_rows(one, seen, about)),
        _footer(about),
        _symbol(seen),
    )


def index_page(pictures: Sequence[tuple[Explained, Markup]], failed: Mapping[str, str], about: About) -> str:
    """pictures: in the order to show, each with its `thumbnail`; failed: why, by path."""
    count = f"{len(pictures):,} picture{'' if len(pictures) == 1 else 's'}"
    cards = [_card(one, small) for one, small in pictures]
    return document(
        f"{count}, by what each took",
        tag(
            "main",
            tag("h1", f"{count}, by what each took"),
            tag("p", _order(pictures[0][0].shown), class_="quiet") if pictures else None,
            tag("ul", *cards, class_="cards"),
            *_failures(failed),
        ),
        _footer(about),
    )


def thumbnail(seen: Image.Image) -> Markup:
    small = seen.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture(small, alt="")


def named(guess: Guess) -> str:
    """The class, by the first of its names."""
    return guess.title.partition(",")[0]


# Parts of a picture's page --------------------------------------------------------------------------------------------


def _headline(one: Explained) -> str:
    """What the model says, at the largest of its budgets."""
    return named(_most_expensive(one).prediction.top_k[0])


def _most_expensive(one: Explained) -> Explanation:
    return max(one.shown, key=lambda shown: shown.budget or 1.0)


def _summary(one: Explained) -> Markup:
    """How sure it is, and what it says at the other budgets."""
    most_expensive = _most_expensive(one)
    sure = f"{percent(most_expensive.prediction.top_k[0].probability, 0)} sure"
    if len(one.shown) == 1:
        return tag("p", f"{sure}.", class_="quiet")
    others = {shown.asked: named(shown.prediction.top_k[0]) for shown in one.shown if shown is not most_expensive}
    if set(others.values()) == {_headline(one)}:
        return tag("p", f"{sure} at {most_expensive.asked}; the same class at every budget.", class_="quiet")
    said = "; ".join(f"at {at}: {name}" for at, name in others.items())
    return tag("p", f"{sure} at {most_expensive.asked}; {said}.", class_="quiet")


def _named(one: Explained) -> str:
    return f"{one.name} ({one.size[0]:,} × {one.size[1]:,} pixels)"


def _guesses(shown: Sequence[Explanation]) -> Markup:
    """The likeliest classes at each budget."""
    lists = [
        tag(
            "section",
            tag("h3", one.asked.capitalize()),
            tag(
                "ol",
                *(
                    tag("li", named(guess), tag("span", percent(guess.probability)), bar(guess.probability))
                    for guess in one.prediction.top_k
                ),
            ),
        )
        for one in shown
    ]
    return tag("div", *lists, class_="guesses")


def _reading(one: Explained, about: About) -> Markup:
    """How to read the strips."""
    last = " The last block computes the class token alone, from the patches shown." if about.trims_last_block else ""
    strips = (
        "Above a block its number, and how many patches it attends to; dimmed ones it does not compute, and they keep "
        f"their value. The bars below are its {len(one.shown[0].heads[0])} heads, filled where they are computed.{last}"
    )
    budgets = "A budget is a mean over many pictures: one may take less, or more. A cap is the most that any may take."
    return join((tag("p", strips, class_="quiet"), tag("p", budgets, class_="quiet")))


def _rows(one: Explained, seen: Image.Image, about: About) -> Iterable[Markup]:
    for shown in one.shown:
        yield tag("section", _spent(shown, about), strip(shown, seen.size), class_="row")


def _spent(shown: Explanation, about: About) -> Markup:
    """MACs against the budget, the cap and the dense model's."""
    spent, dense = shown.prediction, about.dense_macs
    ticks = [tick for tick in (shown.budget, shown.cap) if tick is not None]
    against = ", ".join(
        f"{name} {value:g}" for name, value in (("budget", shown.budget), ("cap", shown.cap)) if value is not None
    )
    says = f"{spent.macs_fraction:.3f} of the dense model's MACs" + (f"; {against}" if against else "")
    return tag(
        "div",
        tag("h3", shown.asked.capitalize()),
        bar(spent.macs_fraction, says, ticks),
        tag("p", tag("strong", f"{spent.macs_fraction:.3f}"), " of the dense MACs"),
        tag("p", f"{with_unit(spent.macs_fraction * dense)} of {with_unit(dense)}", class_="quiet"),
        tag("p", f"{sum(shown.depth)} of {len(shown.depth)} blocks", class_="quiet"),
        tag("p", f"{percent(spent.heads_kept, 0)} of their heads", class_="quiet"),
        tag("p", f"{percent(spent.tokens_kept, 0)} of their patches", class_="quiet"),
        *([tag("p", _second_look(shown), class_="quiet")] if shown.looks > 1 else []),
    )


def _second_look(shown: Explanation) -> str:
    rows, columns = shown.grid
    return f"second look, at {rows} × {columns} patches: the first answer was not confident"


def strip(shown: Explanation, size: tuple[int, int]) -> Markup:
    """The blocks in their order: the picture (width, height), patches dimmed that each skips, and its heads.

    The page must hold `_symbol` of the picture.
    """
    across = min(len(shown.depth), MOST_ACROSS)
    wide = across <= MOST_ACROSS // 2
    blocks = []
    for place, (runs, heads, tokens) in enumerate(zip(shown.depth, shown.heads, shown.tokens, strict=True), start=1):
        count = "skipped" if not runs else f"{sum(tokens)} of {len(tokens)}" if wide else str(sum(tokens))
        drawn = _patches(tokens, shown.grid, size) if runs else _absent(size)
        says = f"{count} patches, {sum(heads)} of {len(heads)} heads" if runs else "skipped"
        blocks.append(
            tag(
                "li",
                tag("span", tag("b", place), count, aria_hidden="true"),
                tag("svg", drawn, viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_label=f"Block {place}: {says}"),
                _heads(heads),
            )
        )
    return tag(
        "ol", *blocks, class_="strip" if wide else "strip dense", style=f"--across:{across};--phone:{3 if wide else 4}"
    )


def _patches(tokens: Sequence[bool], grid: tuple[int, int], size: tuple[int, int]) -> Markup:
    rows, columns = grid
    path = ""
    for row in range(rows):
        column = 0
        for kept, run in groupby(tokens[row * columns : (row + 1) * columns]):
            length = len(list(run))
            if not kept:
                path += f"M{column} {row}h{length}v1h-{length}z"
            column += length
    scale = f"scale({size[0] / columns:g} {size[1] / rows:g})"
    return join(
        (
            tag("use", href="#seen"),
            tag("path", d=path, class_="dim", transform=scale, shape_rendering="crispEdges") if path else None,
        )
    )


def _absent(size: tuple[int, int]) -> Markup:
    return tag("rect", x=0, y=0, width=size[0], height=size[1], class_="absent")


def _heads(heads: Sequence[bool]) -> Markup:
    """A bar a head, filled where it is computed."""
    bars = [
        tag("rect", y=place * (HEAD + GAP), width=100, height=HEAD, rx=1, class_="kept" if kept else "skipped")
        for place, kept in enumerate(heads)
    ]
    height = len(heads) * (HEAD + GAP) - GAP
    return tag("svg", *bars, class_="heads", viewBox=f"0 0 100 {height}", aria_hidden="true")


def _symbol(seen: Image.Image) -> Markup:
    """The picture, once, for all drawings of the page."""
    width, height = seen.size
    pixels = "image-rendering:pixelated" if is_small(seen) else None
    image = tag("image", href=data_uri(seen), width=width, height=height, style=pixels)
    symbol = tag("symbol", image, id="seen", viewBox=f"0 0 {width} {height}")
    return tag("svg", symbol, width=0, height=0, style="position:absolute", aria_hidden="true")


# Parts of the index ---------------------------------------------------------------------------------------------------


def _order(shown: Sequence[Explanation]) -> str:
    first = "" if len(shown) == 1 else " at the first"
    budgets = ", ".join(one.asked for one in shown)
    return f"What each takes of the dense model's MACs at {budgets}: least{first} comes first."


def _card(one: Explained, small: Markup) -> Markup:
    first = one.shown[0].prediction
    guess = first.top_k[0]
    spent = " · ".join(f"{shown.prediction.macs_fraction:.3f}" for shown in one.shown)
    of_all = " of the MACs" if len(one.shown) == 1 else ""
    return tag(
        "li",
        tag(
            "a",
            small,
            tag("strong", named(guess)),
            tag("small", f"{spent}{of_all}"),
            tag("small", "/".join(one.name.split("/")[-2:])),
            href=f"{quote(one.page)}.html",
        ),
    )


def _failures(failed: Mapping[str, str]) -> Iterable[Markup]:
    if failed:
        yield tag("h2", f"{len(failed):,} could not be read")
        for path, reason in failed.items():
            yield tag("p", tag("code", path), tag("br"), tag("span", reason, class_="warning"))


def _footer(about: About) -> Markup:
    environment = about.environment
    return tag(
        "footer",
        tag("p", f"Model {about.model}, {with_unit(about.dense_macs)} MACs a picture when dense."),
        tag("p", tag("code", environment["command"])),
        tag("p", f"miaformer {environment['versions']['miaformer']}, {environment['date']}"),
    )
