"""Quantization-aware training against calibration alone, and against a float control of the same steps (ResNet-20, CIFAR-10).

    python -m benchmarks.qat [int8 | int4] [SEED ...]

Writes one file per width and seed (default: int8, where little is lost, with one seed; int4 weights with five).
Any fine-tuning on these pictures gains points, so what training recovers is measured against a float network that was
fine-tuned with the same pictures, steps, rates and seed: recovery = (QAT - PTQ) / (float control - PTQ). PTQ is calibrated with
weights by `min_max`, the better one; learned weight scales start from `mse`, as in a recipe of `bitwright train`. Every network,
the control too, takes its batch statistics anew from the same hundred training batches at the end.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks.shared import loader, save
from benchmarks.training import RATE, Cifar, resnet20, train
from bitwright import (
    FakeQuantState,
    convert,
    default_qat_qconfig_setter,
    get_default_qconfig,
    load_observer_params,
    prepare,
    set_fake_quantize,
    update_batchnorm,
)
from bitwright.plan.qconfig import UniformQconfigSetter

#: Width of the weights -> epochs, seeds.
EPOCHS = {"int8": 2, "int4": 2}
SEEDS = {"int8": [0], "int4": [0, 1, 2, 3, 4]}
STATISTICS = 100


def calibrated(network: nn.Module, data: Cifar, width: str, weights: str = "min_max") -> nn.Module:
    """*network* with ranges from ten batches of 50 training pictures, those of its *weights* by this observer."""
    qconfig = get_default_qconfig(
        activation_observer="mse", weight_observer=weights, weight_qkwargs={"dtype": width}
    )
    model = prepare(network, data.train_x[:2], UniformQconfigSetter(qconfig, "calibration")).eval()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    with torch.no_grad():
        for i in range(10):
            model(data.train_x[50 * i : 50 * i + 50])
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model


def trained(network: nn.Module, data: Cifar, width: str, kind: str, seed: int) -> nn.Module:
    """*network* calibrated and trained with quantizers of one *kind*."""
    weight = "fake_quant" if kind == "pact" else kind  # PACT is about activations
    qconfig = get_default_qconfig(kind, weight, weight_qkwargs={"dtype": width})
    model = prepare(network, data.train_x[:2], UniformQconfigSetter(qconfig, kind))
    load_observer_params(calibrated(network, data, width, "mse" if kind == "lsq" else "min_max"), model)
    set_fake_quantize(model, FakeQuantState.QAT)
    train(model.train(), data, EPOCHS[width], seed)
    update_batchnorm(model, statistics(data, seed))
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    return model


def statistics(data: Cifar, seed: int) -> Iterator[Tensor]:
    """Training pictures to take batch statistics from, none in the order of a training."""
    return (x for x, _ in islice(data.batches(1, 1000 + seed), STATISTICS))


def drift(network: nn.Module, data: Cifar) -> dict[str, float]:
    """Accuracy after 20 steps at rate 0, where nothing but ranges and batch statistics can move."""
    start = calibrated(network, data, "int8")
    model = prepare(network, data.train_x[:2], default_qat_qconfig_setter)
    load_observer_params(start, model)
    before = data.accuracy(start)
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, (x, y) in enumerate(data.batches(1)):
        if step == 20:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    return {"calibrated": before, "after_20_steps_at_rate_0": data.accuracy(model)}


def main() -> None:
    load = loader()
    data, network = Cifar(load), resnet20(load)
    asked = sys.argv[1:]
    seeds = [int(a) for a in asked if a.isdigit()]
    for width in [a for a in asked if not a.isdigit()] or list(EPOCHS):
        for seed in seeds or SEEDS[width]:
            save(f"qat_{width}_{seed}", measure(data, network, width, seed))


def measure(data: Cifar, network: nn.Module, width: str, seed: int) -> dict[str, Any]:
    """All trainings of one width with one seed."""
    result: dict[str, Any] = {
        "model": "cifar10_resnet20_jpegft",
        "weights": width,
        "epochs": EPOCHS[width],
        "rate": RATE,
        "float": data.accuracy(network),
    }
    if width == "int8":
        result["default_setter_at_rate_0"] = drift(network, data)
    control = copy.deepcopy(network)
    train(control.train(), data, EPOCHS[width], seed)
    update_bn(statistics(data, seed), control)
    result["float_control"] = data.accuracy(control.eval())
    result["ptq"] = data.accuracy(calibrated(network, data, width))
    result["ptq_mse"] = data.accuracy(calibrated(network, data, width, "mse"))
    room = result["float_control"] - result["ptq"]
    for kind in ("fake_quant", "lsq", "pact"):
        model = trained(network, data, width, kind, seed)
        result[kind] = data.accuracy(model)
        result[f"{kind}_converted"] = data.accuracy(convert(model))
        result[f"{kind}_recovery"] = round((result[kind] - result["ptq"]) / room, 3) if room > 0 else None
        print(width, kind, result, flush=True)
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
