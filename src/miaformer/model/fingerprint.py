"""A model's digest: two models of the same one give the same answers."""

from __future__ import annotations

import hashlib

import torch

from miaformer.model.model import MIAFormer


def fingerprint(model: MIAFormer, size: int = 4) -> str:
    """A digest, of `size` bytes, of all that answers depend on: weights, settings, calibration, preparation, names."""
    digest = hashlib.blake2b(digest_size=size)
    about = (model.adapt_config, model.calibration, sorted(model.pretrained_cfg.items()))
    digest.update(repr(about).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
