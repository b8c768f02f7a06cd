"""The skeleton of every page, and its smallest parts: tags that escape what they are given, tables, bars, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from miaformer.data.files import whole_file

_VOID = {"img", "meta", "br"}
_SMALL = 128  # pixels: up to here a picture is stored without loss, and shown with its pixels as squares


class Markup(str):
    """HTML that stands as it is. Every other string is escaped."""


def tag(kind: str, /, *content: object, **attributes: object) -> Markup:
    """An element: `tag("p", "a < b", class_="quiet")`. Attributes that are None are left out; `_` becomes `-`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{kind}{given}>" + ("" if kind in _VOID else f"{join(content)}</{kind}>"))


def join(content: Iterable[object]) -> Markup:
    """One after the other, each escaped unless it is markup; None is nothing."""
    parts = (
        part if isinstance(part, Markup) else html.escape(str(part), False) for part in content if part is not None
    )
    return Markup("".join(parts))


def document(title: str, *body: object) -> str:
    """A whole page."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = join(
        (
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Markup(style)),
        )
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{join(body)}\n</body>\n</html>\n'


def write_page(path: Path, page: str) -> None:
    """Whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None, strong: Iterable[int] = ()
) -> Markup:
    """The first column is text, the others are numbers. strong: places of the rows that stand out."""
    kind = [None, *["number"] * (len(columns) - 1)]
    strong = set(strong)
    head = tag("tr", *(tag("th", name, scope="col", class_=side) for name, side in zip(columns, kind, strict=True)))
    body = [
        tag(
            "tr",
            *(tag("td", cell, class_=side) for cell, side in zip(row, kind, strict=True)),
            class_="strong" if place in strong else None,
        )
        for place, row in enumerate(rows)
    ]
    below = None if caption is None else tag("caption", caption)
    whole = tag("table", below, tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption or columns[0])


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values, side by side where there is room."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items()), class_="facts")


def bar(share: float, says: str | None = None, ticks: Iterable[float] = ()) -> Markup:
    """A share of a whole, with ticks at others. says: to those who hear it; None where the text beside it does."""
    told: dict[str, Any] = {"aria_hidden": "true"} if says is None else {"role": "img", "aria_label": says}
    marks = (tag("b", style=f"left:{_length(tick)}") for tick in ticks)
    return tag("div", tag("i", style=f"width:{_length(share)}"), *marks, class_="bar", **told)


def picture(image: Image.Image, alt: str, class_: str | None = None) -> Markup:
    return tag(
        "img",
        src=data_uri(image),
        alt=alt,
        width=image.width,
        height=image.height,
        class_=class_,
        style="image-rendering:pixelated" if is_small(image) else None,
    )


def is_small(image: Image.Image) -> bool:
    return max(image.size) <= _SMALL


def data_uri(image: Image.Image) -> str:
    """The picture itself, encoded: small ones without loss."""
    encoded = io.BytesIO()
    kind = "png" if is_small(image) else "jpeg"
    image.save(encoded, kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def percent(share: float, digits: int = 1) -> str:
    """With a space that no line breaks at."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _length(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"
