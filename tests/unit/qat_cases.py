"""Small networks for training with quantization, and the steps that tests of it share."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bitwright import FakeQuantState, PreparedModel, QConfig, get_default_qconfig, prepare, set_fake_quantize
from bitwright.plan.qconfig import UniformQconfigSetter
from bitwright.train.fake_quants import Quantizer

KINDS = ("fake_quant", "lsq", "pact")


class Small(nn.Module):
    """Convolutions with batch normalisation, a residual sum, dropout and a linear layer; the head is defined first."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 3 * 3, 5)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.pool, self.drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(torch.relu(x + self.bn2(self.conv2(x))))
        return self.head(self.drop(x.flatten(1)))


class Plain(nn.Module):
    """Two linear layers: the least that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Holder(nn.Module):
    """A network in a bigger one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def small(dropout: float = 0.0) -> Small:
    """A `Small` with seeded weights, and batch normalisation that a wrong formula could not survive: also negative gains."""
    torch.manual_seed(0)
    model = Small(dropout)
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.3, 1.5)
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval()


def plain() -> Plain:
    """A `Plain` with seeded weights, in training mode."""
    torch.manual_seed(0)
    return Plain()


def pixels(n: int = 8, seed: int = 1) -> Tensor:
    """`[n, 3, 6, 6]` standard normal."""
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def features(n: int = 16, seed: int = 1) -> Tensor:
    """`[n, 6]` standard normal."""
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def everywhere(qconfig: QConfig | None) -> UniformQconfigSetter:
    """*qconfig* for every operator."""
    return UniformQconfigSetter(qconfig, "everywhere")


def of_kind(
    kind: str, *, weight: str = "int8", activation: str = "int8", constant: float = 0.01
) -> UniformQconfigSetter:
    """One fake quantizer for all, with formats and the averaging constant of activations."""
    return everywhere(
        get_default_qconfig(
            kind,
            kind,
            activation_qkwargs={"dtype": activation, "averaging_constant": constant},
            weight_qkwargs={"dtype": weight},
        )
    )


@cache
def _prepared(kind: str, **options: Any) -> PreparedModel:
    return prepare(small(), pixels(2), of_kind(kind), **options)


def prepared(kind: str = "fake_quant", **options: Any) -> PreparedModel:
    """`small()` prepared with one fake quantizer for all: a copy, because preparing takes a while."""
    return copy.deepcopy(_prepared(kind, **options))


def calibrate(model: nn.Module, *batches: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """*model* in evaluation mode and state VALIDATION, after *batches* in state CALIBRATION."""
    model.eval()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    with torch.no_grad():
        for batch in batches:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model


def train(
    model: nn.Module, x: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """*steps* of gradient descent of the model's mean squared output on *x*, in state QAT. *returns*: the losses."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.02)
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def validated(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs for *x* in evaluation mode and state VALIDATION."""
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def quantizer(model: nn.Module, path: str) -> Quantizer:
    """The quantizer of *model* at *path*."""
    found = model.get_submodule(path)
    assert isinstance(found, Quantizer)
    return found
