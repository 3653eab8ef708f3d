"""Fixtures of the command line's tests, and of those that train."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.cli_cases import CLASSES, SAMPLES, Command, Outcome, make_model

from bitwright.cli.main import run


@pytest.fixture
def bitwright(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    def call(*arguments: object) -> Outcome:
        status = run([str(a) for a in arguments])
        return Outcome(status, *capsys.readouterr())

    with warnings.catch_warnings():
        yield call
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many small steps are several times faster in one thread, where other work shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "net.onnx")


@pytest.fixture(scope="module")
def x() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((SAMPLES, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=x, label=np.arange(SAMPLES) % CLASSES)
    return path
