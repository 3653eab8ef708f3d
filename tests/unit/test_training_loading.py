"""Bugs that loading ranges and checkpoints once had, each by its symptom."""

from __future__ import annotations

import pytest
import torch
from tests.unit.qat_cases import calibrate, pixels, prepared
from torch import nn

from bitwright import FakeQuantState, load_observer_params, set_fake_quantize
from bitwright.train.fake_quants import Quantizer

pytestmark = pytest.mark.usefixtures("one_thread")


def quantizer(model: nn.Module, path: str) -> Quantizer:
    found = model.get_submodule(path)
    assert isinstance(found, Quantizer)
    return found


def test_one_batch_moves_a_calibrated_range_by_the_averaging_constant() -> None:
    """The first batch after a calibration of ten weighed an eleventh, and 20 replaced two thirds of what was calibrated."""
    calibrated = calibrate(prepared(), *(pixels(4, seed) for seed in range(10)))
    model = prepared()
    load_observer_params(calibrated, model)
    model.train()
    observer = quantizer(model, "_inputs.x.activation_post_process").observer
    before = observer.hi.clone()

    set_fake_quantize(model, FakeQuantState.QAT)
    model(torch.full((1, 3, 6, 6), 9.0))

    assert torch.allclose(observer.hi, before + 0.01 * (9.0 - before))
