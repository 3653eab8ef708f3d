"""TensorBoard logs of a training job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.errors import MissingExtra


class TrainingLog:
    """Curves in *folder*; None writes none. *raises* `MissingExtra` without the package tensorboard."""

    def __init__(self, folder: Path | None) -> None:
        self._writer = None if folder is None else _writer(folder)

    def add(self, epoch: int, **figures: float) -> None:
        """One point of each curve."""
        for name, figure in figures.items():
            if self._writer is not None:
                self._writer.add_scalar(name, figure, epoch)

    def close(self) -> None:
        """Flush to disk."""
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise MissingExtra("tensorboard: true", package="tensorboard", extra="tensorboard") from e
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
