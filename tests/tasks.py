"""Tasks that the tests of parallel searches run, in a module that workers can import."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import DataError, UnknownName


@dataclass(frozen=True)
class Powers:
    """Jobs are exponents; the result tells the worker and its thread count too. Each opening leaves a file in *folder*."""

    base: Tensor
    folder: str

    def open(self) -> Callable[[Any], Any]:
        Path(self.folder, f"{os.getpid()}").touch(exist_ok=False)
        return lambda job: [float((self.base**job).sum()), os.getpid(), torch.get_num_threads()]


@dataclass(frozen=True)
class Sleeps:
    """Jobs are seconds."""

    def open(self) -> Callable[[Any], Any]:
        return self.sleep

    @staticmethod
    def sleep(job: Any) -> Any:
        time.sleep(job)
        return [job, os.getpid()]


@dataclass(frozen=True)
class Misbehaves:
    """Jobs say how."""

    def open(self) -> Callable[[Any], Any]:
        return self.misbehave

    @staticmethod
    def misbehave(job: Any) -> Any:
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "exit":
            os._exit(3)
        if job == "unknown":
            raise UnknownName("--target", kind="target", name="bm1685", known=["bm1684"])
        if job == "data":
            raise DataError("x.npy", expected="numbers", found="text", remedy="Look at it.")
        if job == "bug":
            return {}["missing"]
        return job


@dataclass(frozen=True)
class CannotOpen:
    """Fails before its first job."""

    def open(self) -> Callable[[Any], Any]:
        raise DataError("val/", expected="pictures", found="none", remedy="Look there.")


@dataclass(frozen=True)
class Holds:
    """A task that holds something."""

    held: Any

    def open(self) -> Callable[[Any], Any]:
        return lambda job: job


def mean_output(model: nn.Module) -> float:
    """A metric: the mean of the outputs on fixed pictures."""
    x = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    return float(model(x).mean())


def fails(model: nn.Module) -> float:
    raise ValueError("no such folder: val/")


def infinite(model: nn.Module) -> float:
    return math.inf


def words(model: nn.Module) -> Any:
    return "0.9"


def first_of(outputs: dict[str, Any]) -> dict[str, Any]:
    """A post-processing: half of the first output's numbers."""
    name = next(iter(outputs))
    return {"half": outputs[name].reshape(-1)[:5] * 0.5}


METRICS: dict[str, Callable[[nn.Module], Any]] = {
    f.__name__: f for f in (mean_output, fails, infinite, words)
}
