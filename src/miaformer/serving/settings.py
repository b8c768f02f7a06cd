"""What an operator decides of a server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miaformer.prediction.predictor import Predictor


@dataclass(frozen=True)
class Settings:
    """budget: what a picture is given where nobody asks and nothing waits; min_budget: the least that load may lower it
    to. None: by the model, see `for_model`.

    Raises ValueError, naming the setting, for what cannot be.
    """

    budget: float | None = None
    min_budget: float | None = None
    p95_ms: float = 500.0  # the objective: from a request's arrival to its answer
    cap: float | None = None  # the most that any picture may take, whatever its request says
    max_batch: int = 32  # pictures
    max_queue: int = 256  # pictures that wait or are decoded
    max_upload_bytes: int = 10 * 2**20  # of a request
    max_held_bytes: int = 256 * 2**20  # of all requests that are being read or decoded
    max_pixels: int = 25_000_000  # of a picture
    max_pictures: int = 32  # of a request
    upload_seconds: float = 10.0  # for a request to arrive whole
    answer_seconds: float = 30.0  # for it to be answered then
    decoders: int = 2  # threads
    static: bool = False  # execute everything, without controllers: the server to compare with
    allow_origins: tuple[str, ...] = ()  # sites whose pages may ask: https://example.org, or * for any
    page: bool = True  # a page to play with at /, and what it asks for at /explain

    def __post_init__(self) -> None:
        for name in ("p95_ms", "upload_seconds", "answer_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number")
        for name in ("max_batch", "max_queue", "max_upload_bytes", "max_pixels", "max_pictures", "decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
                raise ValueError(
                    f"allow_origins: {origin!r} is not a valid origin: use the form https://example.org in lower case, "
                    "or * for any"
                )
        if self.max_held_bytes < self.max_upload_bytes:
            raise ValueError(
                f"max_held_bytes={self.max_held_bytes} is less than one upload may have, {self.max_upload_bytes}"
            )
        if self.max_queue < self.max_pictures:
            raise ValueError(f"max_queue={self.max_queue} is less than one request may have, {self.max_pictures}")
        if self.budget is not None and self.min_budget is not None and self.min_budget > self.budget:
            raise ValueError(f"min_budget={self.min_budget:g} is more than budget={self.budget:g}")

    def for_model(self, predictor: Predictor) -> Settings:
        """These, with the budgets that they leave open: the most that the model can spend, and half of that.

        An uncalibrated model has none, and neither has a static server. Raises ValueError for budgets that the model
        cannot meet, and for a cap below what any picture takes.
        """
        model = predictor.model
        if self.cap is not None:
            model.check_cap(self.cap)
        if self.static or (model.calibration is None and self.budget is None and self.min_budget is None):
            return replace(self, budget=None, min_budget=None)
        if model.calibration is None:
            raise ValueError("the model is not calibrated, so it knows no budgets: leave budget and min_budget out")
        least, most = model.calibration.range
        budget = self.budget or most
        min_budget = self.min_budget or min(budget, max(least, budget / 2))
        for asked in (budget, min_budget):
            model.check_budget(asked)
        return replace(self, budget=budget, min_budget=min_budget)
