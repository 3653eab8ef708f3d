"""Quantization-aware training against calibration alone, and against a float control of the same steps (ResNet-20, CIFAR-10).

    python -m benchmarks.qat [int8 | int4] [SEED ...]

Writes one file per width and seed (default: int8, where little is lost, with one seed; int4 weights with four).
Any fine-tuning on these pictures gains points, so what training recovers is measured against a float network that was
fine-tuned with the same pictures, steps, rates and seed: recovery = (QAT - PTQ) / (float control - PTQ), of top-1 and, with less
chance in it, of the cross-entropy. PTQ is calibrated with weights by `min_max`, which is better without training; int4 training
starts from `mse` and keeps that scale (plain, PACT) or learns it (LSQ), as the ready-made setters do. Every network, the control
too, is measured twice: as it is, and with batch statistics taken anew from the same hundred training batches.
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
EPOCHS = {"int8": 2, "int4": 6}
#: How weights are calibrated before training, and how far each batch moves their range in it.
START = {"int8": ("min_max", 1.0), "int4": ("mse", 0.0)}
SEEDS = {"int8": [0], "int4": [0, 1, 2, 3]}
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
    start, constant = START[width]
    qconfig = get_default_qconfig(
        kind,
        weight,
        weight_observer=start,
        weight_qkwargs={"dtype": width, "averaging_constant": constant},
    )
    model = prepare(network, data.train_x[:2], UniformQconfigSetter(qconfig, kind))
    load_observer_params(calibrated(network, data, width, start), model)
    set_fake_quantize(model, FakeQuantState.QAT)
    train(model.train(), data, EPOCHS[width], seed)
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
        "float": data.score(network),
        "ptq": data.score(calibrated(network, data, width)),
    }
    if width == "int8":
        result["default_setter_at_rate_0"] = drift(network, data)
    if START[width][0] != "min_max":
        result["ptq_as_training_starts"] = data.score(calibrated(network, data, width, START[width][0]))
    control = copy.deepcopy(network)
    train(control.train(), data, EPOCHS[width], seed)
    result["control"] = {"as_it_is": data.score(control.eval())}
    update_bn(statistics(data, seed), control)
    result["control"]["statistics_anew"] = data.score(control.eval())
    for kind in ("fake_quant", "lsq", "pact"):
        model = trained(network, data, width, kind, seed)
        result[kind] = {"as_it_is": data.score(model), "converted": data.score(convert(model))}
        update_batchnorm(model, statistics(data, seed))
        result[kind]["statistics_anew"] = data.score(model)
        print(width, seed, kind, result[kind], flush=True)
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
