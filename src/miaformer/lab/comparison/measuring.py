"""What a method's entries do on each test image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.data import LabelledBatch
from miaformer.evaluation.calibration import OnProgress
from miaformer.lab.comparison.method import Entry

Array = NDArray[Any]


@torch.inference_mode()
def difficulty(static: nn.Module, batches: Iterable[LabelledBatch], device: torch.device) -> dict[str, Array]:
    """The backbone's loss and margin on each image."""
    losses: list[Array] = []
    margins: list[Array] = []
    for batch in batches:
        labels = batch.labels.to(device)
        logits = static(batch.images.to(device)).float()
        losses.append(F.cross_entropy(logits, labels, reduction="none").cpu().numpy())
        margins.append(margin(logits, labels).cpu().numpy())
    return {"dense_loss": np.concatenate(losses), "dense_margin": np.concatenate(margins)}


@torch.inference_mode()
def on_test_images(
    entries: Sequence[Entry],
    batches: Iterable[LabelledBatch],
    device: torch.device,
    on_progress: OnProgress | None = None,
) -> dict[str, Array]:
    """Of entry k what is right on each image (`correctK`), and its `macs_fractionK`."""
    correct: list[list[Array]] = [[] for _ in entries]
    fraction: list[list[Array]] = [[] for _ in entries]
    done = 0
    for batch in batches:
        images, labels = batch.images.to(device), batch.labels.to(device)
        for place, entry in enumerate(entries):
            logits, spent = (entry.sharing or entry.classify)(entry.read(images))
            correct[place].append((logits.argmax(dim=1) == labels).cpu().numpy())
            fraction[place].append(spent.float().cpu().numpy())
        done += len(images)
        if on_progress is not None:
            on_progress("measure", done)
    arrays: dict[str, Array] = {}
    for name, parts in (("correct", correct), ("macs_fraction", fraction)):
        arrays |= {f"{name}{place}": np.concatenate(part) for place, part in enumerate(parts)}
    return arrays


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's logit (B, classes) is above the next (B,)."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return right - logits.scatter(1, labels[:, None], float("-inf")).amax(dim=1)
