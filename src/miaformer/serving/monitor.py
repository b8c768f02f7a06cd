"""Notices inputs that cost more than they should, for nothing: from the MACs that every trace says anyway.

A budget is a mean over data like the calibration set. Inputs made to burn compute (`miaformer.lab.attacks.compute`), or
data that drifts, raise that mean; a cap bounds what one image takes, and this says that something is going on.
One-sided CUSUM (Page 1954): what images spend beyond the usual is summed up, in standard deviations, less an allowance;
usual images keep the sum near 0, and a rise of the mean by more than the allowance makes it grow until it passes the
threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ALLOWANCE = 0.25  # standard deviations: rises of the mean by more than twice this are found fast
THRESHOLD = 30.0  # see tests/test_monitor.py for how seldom usual spending passes it


@dataclass
class SpendingMonitor:
    """Watches the MACs fractions of images, in the order in which they come.

    mean, std: of images as they should be, at the budget in use; `fit` measures them. allowance, threshold: in standard
    deviations, see above.
    """

    mean: float
    std: float
    allowance: float = ALLOWANCE
    threshold: float = THRESHOLD
    images: int = field(default=0, init=False)  # seen since the last reset
    alarm_at: int | None = field(default=None, init=False)  # how many had been seen at the first alarm
    _sum: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.mean < np.inf and 0 < self.std < np.inf):
            raise ValueError(f"mean={self.mean!r} must be a MACs fraction, std={self.std!r} positive")
        if self.allowance < 0 or self.threshold <= 0:
            raise ValueError(
                f"allowance={self.allowance!r} must not be negative, threshold={self.threshold!r} positive"
            )

    @classmethod
    def fit(cls, macs_fraction: Tensor | Sequence[float] | NDArray[Any], **settings: float) -> SpendingMonitor:
        """From the MACs fractions (n,) of usual images. Where all cost the same, a hundredth of that is the spread."""
        values = np.asarray(macs_fraction, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"give the MACs fractions of two images or more, (n,), not {values.shape}")
        mean = float(values.mean())
        return cls(mean, max(float(values.std(ddof=1)), 0.01 * mean), **settings)

    @property
    def alarm(self) -> bool:
        """Whether images have come to cost more than they should, since the last reset."""
        return self.alarm_at is not None

    def see(self, macs_fraction: Tensor | Sequence[float] | NDArray[Any]) -> bool:
        """Take note of images (n,); returns `alarm`."""
        values = np.asarray(macs_fraction, dtype=np.float64).ravel()
        if not np.isfinite(values).all():
            raise ValueError("MACs fractions must be finite numbers")
        for value in values.tolist():
            self.images += 1
            self._sum = max(0.0, self._sum + (value - self.mean) / self.std - self.allowance)
            if self._sum > self.threshold and self.alarm_at is None:
                self.alarm_at = self.images
        return self.alarm

    def reset(self) -> None:
        self.images, self.alarm_at, self._sum = 0, None, 0.0
