"""Our training and torchao's PT2E training beside each other: same network, pictures, seed, steps and rates.

    pip install torchao; python -m benchmarks.qat_torchao

Both: int8 per-channel weights, uint8 asymmetric activations (the X86 quantizer; our target `onnxruntime`).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torchao
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.shared import loader, save, timed
from benchmarks.training import Cifar, resnet20, train
from bitwright import FakeQuantState, convert, default_qat_qconfig_setter, prepare, set_fake_quantize

EPOCHS = 1


def ours(network: nn.Module, data: Cifar) -> tuple[Any, float]:
    """Top-1 of the simulation and of the converted model, and seconds of training."""
    model = prepare(network, data.train_x[:2], default_qat_qconfig_setter, target="onnxruntime").train()
    _, seconds = timed(lambda: train(model, data, EPOCHS))
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    return {"simulated": data.accuracy(model), "converted": data.accuracy(convert(model))}, seconds


def theirs(network: nn.Module, data: Cifar) -> tuple[Any, float]:
    """The same for torchao."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    example = data.train_x[:64]
    shapes = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = torch.export.export(network.train(), (example,), dynamic_shapes=shapes).module()
    model = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(model)
    _, seconds = timed(lambda: train(model, data, EPOCHS))
    move_exported_model_to_eval(model)
    simulated = data.accuracy(model)
    converted = convert_pt2e(copy.deepcopy(model))
    move_exported_model_to_eval(converted)
    return {"simulated": simulated, "converted": data.accuracy(converted)}, seconds


def main() -> None:
    load = loader()
    data = Cifar(load)
    our_accuracy, our_seconds = ours(resnet20(load), data)
    print(our_accuracy, our_seconds, flush=True)
    their_accuracy, their_seconds = theirs(resnet20(load), data)
    result = {
        "epochs": EPOCHS,
        "torchao": torchao.__version__,
        "bitwright_top1": our_accuracy,
        "torchao_top1": their_accuracy,
        "time_torchao_to_bitwright": round(their_seconds / our_seconds, 3),
    }
    save("qat_torchao", result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
