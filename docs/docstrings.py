"""Reads docstrings as this house writes them, for mkdocstrings: griffe alone knows neither of these.

- A comment behind a dataclass's field says what the field is: `depth: Tensor  # (B, L) bool`.
- Parameters are told in a running paragraph: "images: (B, 3, H, W). budget: mean MACs, a fraction."
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Collection
from typing import Any

import griffe


class HouseDocstrings(griffe.Extension):
    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = as_list(func.docstring.value, [p.name.lstrip("*") for p in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if not any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            return
        fields = [
            member
            for name, member in cls.members.items()
            if isinstance(member, griffe.Attribute) and member.annotation is not None and not name.startswith("_")
        ]
        told = "" if cls.docstring is None else as_list(cls.docstring.value, [field.name for field in fields])
        about = "\n".join(f"    {field.name}: {comment}" for field in fields if (comment := _comment(field)))
        cls.docstring = griffe.Docstring(f"{told}\n\nAttributes:\n{about}" if about else told, parent=cls)


def as_list(text: str, names: Collection[str]) -> str:
    """The same docstring, each description that names one of `names` (or several, "mean, std: ...") as an item of a
    list. What is in a section of its own already, or in code, is left alone.
    """
    if not names:
        return text
    name = "|".join(map(re.escape, names))
    start = re.compile(rf"(?:(?<=\n)|(?<=[.;)\]] )|(?<=[.;]\n))((?:{name})(?:, (?:{name}))*): (?=\S)")
    paragraphs = text.split("\n\n")
    for place, paragraph in enumerate(paragraphs[1:], 1):
        if not paragraph.startswith(" ") and re.match(rf"(?:{name})(?:, (?:{name}))*: ", paragraph):
            items = start.sub(r"\n- `\1`: ", "\n" + paragraph)
            paragraphs[place] = re.sub(r"[ ;]*\n+(?=- )", "\n", items).strip()
    return "\n\n".join(paragraphs)


def _comment(field: griffe.Attribute) -> str:
    """Behind the last line of a field; of a field that has one, its docstring; empty where there is neither."""
    if field.docstring is not None:
        return " ".join(field.docstring.value.split())
    lines = field.lines_collection[field.filepath][(field.lineno or 1) - 1 : field.endlineno]
    source = io.StringIO("\n".join(line.strip() for line in lines) + "\n")
    try:
        comments = [
            token.string for token in tokenize.generate_tokens(source.readline) if token.type == tokenize.COMMENT
        ]
    except (tokenize.TokenError, IndentationError):
        return ""
    return comments[-1].lstrip("#: ") if comments else ""
