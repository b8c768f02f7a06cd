"""Models by name: those that come with the package, directories, and ids of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from miaformer.model.model import MIAFormer

BUNDLED = Path(__file__).parent / "bundled"  # a directory a model, as `save_pretrained` writes it


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def load(name: str | Path) -> MIAFormer:
    """A model in evaluation mode, in float32.

    name: one of `bundled_models()`, a directory that `save_pretrained` or `miaformer train` wrote, or OWNER/NAME on the
    hub. A directory of the same name goes before a bundled model.

    Raises ValueError, naming what there is, where there is no such model, or where one of its files is damaged.
    """
    spec = str(name)
    if Path(spec).exists():
        return MIAFormer.from_pretrained(spec).float().eval()
    if spec in bundled_models():
        return MIAFormer.from_pretrained(BUNDLED / spec).float().eval()
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        have = ", ".join(bundled_models())
        bundled = f"no bundled model (there is {have})" if have else "no bundled model"
        raise ValueError(f"no model {spec!r}: no such directory, {bundled}, and hub ids have the form OWNER/NAME")
    try:
        return MIAFormer.from_pretrained(spec).float().eval()
    except OSError as error:  # of the network, or of the hub's answer
        raise ValueError(f"no model {spec!r}: no such directory, and the hub did not return it: {error}") from error
