"""Networks that do something else in training, for tests of what is kept of it and of what is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers with functions between them, and a head beside; what training does with them is of the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.aux, self.norm, self.act = nn.Linear(8, 3), nn.BatchNorm1d(3), nn.ReLU()
        self.lstm, self.logvar = nn.LSTM(3, 2, batch_first=True), nn.Parameter(torch.ones(3))


class OtherWeights(Net):
    """The same operator on other weights."""

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        return self.aux(x) if self.training else self.fc3(x)


class Temperature(Net):
    """The same operator by another number."""

    def forward(self, x: Tensor) -> Any:
        return self.fc3(torch.relu(self.fc1(x))) * (4.0 if self.training else 1.0)
