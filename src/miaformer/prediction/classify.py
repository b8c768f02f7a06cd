"""From a batch of pictures to rows: the part that a worker needs, wherever pictures come from and rows go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miaformer.data.images import ImageError
from miaformer.prediction.entries import Entry, Unreadable, reason
from miaformer.prediction.predictor import check_classifies
from miaformer.prediction.rows import Row, encoded, writable

if TYPE_CHECKING:
    from torch import Tensor

    from miaformer.model.requests import Budget
    from miaformer.prediction.predictor import Predictor


class RowMaker(ABC):
    """Makes a row of each picture, by one model and one way to spend; what cannot be read gets a row that says why.

    A batch is any sequence of (name, path or bytes). Its parts, to prepare and to run, can be called apart: pictures of
    the next batch can be prepared in threads while the model runs this one.
    """

    def __init__(self, predictor: Predictor, *, budget: Budget | None = None, cap: Budget | None = None) -> None:
        """budget, cap: as `MIAFormer.run` takes them.

        Raises ValueError or TypeError as `MIAFormer.run` does.
        """
        self.predictor = predictor
        self._spend: dict[str, Any] = {"budget": budget, "cap": cap}
        predictor.try_once(**self._spend)

    @abstractmethod
    def _read(self, pictures: Sequence[Tensor]) -> list[Row]:
        """What the model says of pictures, (3, H, W) each."""

    def __call__(self, batch: Sequence[Entry | tuple[str, Any]]) -> list[Row]:
        """A row for each, in their order."""
        entries = [Entry(*entry) for entry in batch]
        return self.rows(entries, [self.prepare(entry) for entry in entries])

    def prepare(self, entry: Entry) -> Tensor | Unreadable:
        """Pixels as `Predictor.run` takes them, (3, H, W), or why there are none."""
        if isinstance(entry.content, Unreadable):
            return entry.content
        try:
            return self.predictor.pixels(entry.content, entry.name)
        except ImageError as error:
            return Unreadable(reason(error, entry.name))

    def rows(self, entries: Sequence[Entry], prepared: Sequence[Tensor | Unreadable]) -> list[Row]:
        pictures = [picture for picture in prepared if not isinstance(picture, Unreadable)]
        found = iter(self._read(pictures) if pictures else ())
        rows: list[Row] = []
        for entry, picture in zip(entries, prepared, strict=True):
            row = {"error": writable(picture.reason)} if isinstance(picture, Unreadable) else next(found)
            rows.append({"path": writable(entry.name), **row})
        return rows


class BatchClassifier(RowMaker):
    """Rows say the likeliest classes."""

    def __init__(
        self, predictor: Predictor, *, top_k: int = 5, budget: Budget | None = None, cap: Budget | None = None
    ) -> None:
        """Raises ValueError where the model has no classifier, and as `RowMaker` does."""
        check_classifies(predictor.model)
        super().__init__(predictor, budget=budget, cap=cap)
        self.top_k = top_k

    def _read(self, pictures: Sequence[Tensor]) -> list[Row]:
        output = self.predictor.run(pictures, **self._spend)
        return [prediction.to_json() for prediction in self.predictor.read(output, self.top_k)]


class BatchEmbedder(RowMaker):
    """Rows hold the features of their picture."""

    def _read(self, pictures: Sequence[Tensor]) -> list[Row]:
        output = self.predictor.embed(pictures, **self._spend)
        assert output.features is not None
        numbers = output.features.float().cpu().numpy()
        spent = self.predictor.spent(output)
        return [{"embedding": encoded(one), **vars(each)} for one, each in zip(numbers, spent, strict=True)]
