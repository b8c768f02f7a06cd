"""Which models can be adapted: every ViT that the installed timm knows by name, and classes of transformers.

    python benchmarks/zoo.py     # writes docs/models.md

Each timm model is built without memory for weights, and asked what `adapt` asks. That those it takes are reproduced is
shown by `make test-zoo`, which holds this page to be current too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import timm
import torch

from miaformer.vit.backbone import check_supported
from miaformer.vit.transformers_models import INSTEAD, MODELS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MODULES = {
    "vision_transformer": "ViT, DINOv2, CLIP, SigLIP, MAE, FlexiViT and others",
    "deit": "DeiT and DeiT III",
    "eva": "EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs, Sapiens2",
}


def refusal(name: str) -> str | None:
    """Why `adapt` refuses a model of this name; None: it takes it."""
    with torch.device("meta"):
        backbone = timm.create_model(name)
    try:
        check_supported(backbone)
    except (TypeError, ValueError) as error:
        part = str(error).partition(", which is not supported")[0].removeprefix("Block 0 of the backbone has ")
        kind, _, type_name = part.partition(" ")
        return f"{kind.replace('type', 'block')} `{type_name}`"
    return None


def page() -> str:
    """docs/models.md"""
    refused: dict[str, str] = {}
    rows, taken = [], {}
    for module, about in MODULES.items():
        names = sorted(timm.list_models(module=module))
        reasons = {name: refusal(name) for name in names}
        refused |= {name: reason for name, reason in reasons.items() if reason is not None}
        taken[module] = [name for name, reason in reasons.items() if reason is None]
        rows.append(f"| `{module}` | {about} | {len(taken[module])} of {len(names)} |")
    reasons_counted = Counter(refused.values())
    lines = [
        "# Which models can be adapted",
        "",
        f"`python benchmarks/zoo.py` writes this page, from timm {timm.__version__}. A fine-tuned, resized or "
        "hand-built model of the same parts can be adapted too.",
        "For any other model, the error names the part that is not supported.",
        "",
        "## timm",
        "",
        "| module | families | names that adapt |",
        "|---|---|---|",
        *rows,
        "",
        "The others have parts that are not supported:",
        "",
        "| part | names |",
        "|---|---|",
        *(
            f"| {reason} | {', '.join(f'`{name}`' for name in sorted(refused) if refused[name] == reason)} |"
            for reason in sorted(reasons_counted)
        ),
        "",
        *(line for module, names in taken.items() for line in listed(module, names)),
        "## transformers",
        "",
        "See [Start from a transformers or open_clip model](howto/transformers.md).",
        "",
        "| class | becomes timm's |",
        "|---|---|",
        *(f"| `{name}` | `{model.timm_class.__name__}` |" for name, model in MODELS.items()),
        "",
        "| class that is refused | instead |",
        "|---|---|",
        *(f"| `{name}` | {instead} |" for name, instead in INSTEAD.items()),
        "",
    ]
    return "\n".join(lines)


def listed(module: str, names: list[str]) -> list[str]:
    """A list that can be opened."""
    return [f'??? note "Names in `{module}` that adapt"', "", "    " + ", ".join(f"`{name}`" for name in names), ""]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE}")
