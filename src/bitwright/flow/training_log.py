"""TensorBoard logs of a training job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.errors import MissingExtra


class TrainingLog:
    """Curves in *folder*; None writes none. *raises* `MissingExtra` without the package tensorboard."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._make = folder, None if folder is None else _writer_class()
        self._writer: Any = None

    def begin(self, first: int) -> None:
        """Points of epoch *first* and later, left by a job that was interrupted, count no more."""
        if self._make is not None:
            self._writer = self._make(str(self._folder), purge_step=first)

    def add(self, epoch: int, **figures: float) -> None:
        """One point of each curve, on disk when this returns."""
        if self._writer is not None:
            for name, figure in figures.items():
                self._writer.add_scalar(name, figure, epoch)
            self._writer.flush()

    def close(self) -> None:
        """No more points."""
        if self._writer is not None:
            self._writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise MissingExtra("tensorboard: true", package="tensorboard", extra="tensorboard") from e
    return SummaryWriter
