"""Files that are too large to travel at once: cut into parts, and put together where they are needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PART_BYTES = 24 << 20  # beside a checkout of 38 MB, within 64


def pack(sources: list[Path], out: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write files, and all files in folders, as parts `out/part-01`, ...: folders to carry one after the other."""
    files = [
        (source, source.name) if source.is_file() else (path, f"{source.name}/{path.relative_to(source)}")
        for source in sources
        for path in ([source] if source.is_file() else sorted(one for one in source.rglob("*") if one.is_file()))
    ]
    pieces: list[tuple[str, int, bytes]] = []
    for path, name in files:
        content = path.read_bytes()
        for place, start in enumerate(range(0, max(len(content), 1), part_bytes)):
            pieces.append((name, place, content[start : start + part_bytes]))
    folders: list[Path] = []
    room = 0
    for name, place, content in pieces:
        if len(content) > room or not folders:
            folders.append(out / f"part-{len(folders) + 1:02}")
            folders[-1].mkdir(parents=True)
            room = part_bytes
        room -= len(content)
        piece = hashlib.sha256(content).hexdigest()
        (folders[-1] / piece[:16]).write_bytes(content)
        with (folders[-1] / "index.jsonl").open("a") as index:
            index.write(json.dumps({"name": name, "offset": place * part_bytes, "sha256": piece}) + "\n")
    return folders


def unpack(folders: list[Path], out: Path) -> None:
    """Add the pieces of some parts, in their order, to the files in `out`. Raises ValueError for a damaged one."""
    for folder in folders:
        for line in (folder / "index.jsonl").read_text().splitlines():
            entry = json.loads(line)
            content = (folder / entry["sha256"][:16]).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ValueError(f"{folder}: {entry['name']} is damaged from byte {entry['offset']:,} on")
            path = out / entry["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with path.open("r+b") as file:
                if file.seek(0, 2) < entry["offset"]:
                    raise ValueError(f"{folder}: {entry['name']} lacks what comes before: unpack parts in their order")
                file.seek(entry["offset"])
                file.write(content)
