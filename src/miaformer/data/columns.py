"""Which columns of a table hold pictures and labels, where a user says so: `photos.parquet?image=photo&label=kind`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: they are found."""

    image: str | None = None
    label: str | None = None

    def __bool__(self) -> bool:
        return self.image is not None or self.label is not None


def with_columns(spec: str, image: str | None, label: str | None) -> str:
    """A data spec that names them, as `split_columns` takes it apart; unnamed ones stay as they are."""
    bare, named = split_columns(spec)
    columns = Columns(image or named.image, label or named.label)
    parts = [f"{kind}={quote(name)}" for kind, name in vars(columns).items() if name is not None]
    return f"{bare}?{'&'.join(parts)}" if parts else spec


def split_columns(spec: str) -> tuple[str, Columns]:
    """A spec without its columns, and those. Raises ValueError where what follows `?` names other things."""
    bare, mark, query = spec.rpartition("?")
    if not mark or Path(spec).exists():
        return spec, Columns()
    named = {kind: unquote(name) for kind, _, name in (part.partition("=") for part in query.split("&"))}
    if not all(named.values()) or not named.keys() <= {"image", "label"}:
        raise ValueError(f"{spec}: no such file; what follows '?' may name columns: ?image=COLUMN&label=COLUMN")
    return bare, Columns(**named)
