"""The demo's pictures: scikit-learn's bundled 8x8 digits, enlarged to 16x16 and normalised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import MissingExtra

TRAIN_COUNT = 1297
TEST_COUNT = 500
SIZE = 16  # pixels per side after enlarging; 8x8 leaves no room for strided layers
INK_MAX = 16.0  # scikit-learn's digits count dark pixels of 4x4 cells: 0..16
MEAN, STD = 0.305, 0.319  # of the enlarged training pictures of seed 0, ink scaled to 0..1


class DigitsSplit(NamedTuple):
    """Training and test pictures with their labels; the four parts are disjoint draws of one data set.

    *train_x*: `[1297, 1, 16, 16]` float32, normalised ink. *train_y*: `[1297]` int64 in 0..9.
    *test_x*: `[500, 1, 16, 16]` float32. *test_y*: `[500]` int64.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits_split(seed: int = 0) -> DigitsSplit:
    """The digits, shuffled by *seed* and split into 1297 training and 500 test pictures.

    The same seed gives the same split on every machine; the committed demo weights belong to seed 0.
    *raises* `MissingExtra` if scikit-learn is not installed.
    """
    ink, labels = _read_digits()
    pictures = normalise(ink)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_COUNT], order[TRAIN_COUNT : TRAIN_COUNT + TEST_COUNT]
    return DigitsSplit(pictures[train], labels[train], pictures[test], labels[test])


def normalise(ink: Tensor) -> Tensor:
    """Enlarge and centre raw digits.

    *ink*: `[n, 8, 8]` float32, 0..16. *returns*: `[n, 1, 16, 16]` float32, about zero mean and unit variance.
    """
    enlarged = F.interpolate(ink[:, None] / INK_MAX, size=SIZE, mode="bilinear", align_corners=False)
    return (enlarged - MEAN) / STD


def _read_digits() -> tuple[Tensor, Tensor]:
    """Raw digits. *returns*: ink `[1797, 8, 8]` float32 in 0..16 and labels `[1797]` int64."""
    try:
        from sklearn.datasets import load_digits  # optional dependency
    except ImportError as error:
        raise MissingExtra("bitwright demo", package="scikit-learn", extra="demo") from error
    bunch = load_digits()
    ink = torch.from_numpy(bunch.images).to(torch.float32)
    return ink, torch.from_numpy(bunch.target).to(torch.int64)
