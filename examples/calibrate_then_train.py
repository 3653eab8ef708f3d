"""Calibration, then quantization-aware training: the flow of vendor toolchains, under the same names.

python examples/calibrate_then_train.py [OUTPUT_FOLDER]
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo
from bitwright.quantization import (
    FakeQuantState,
    check_qat_model,
    default_calibration_qconfig_setter,
    default_qat_qconfig_setter,
    export,
    load_observer_params,
    prepare,
    set_fake_quantize,
)

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
float_model, digits = load_demo("cnn"), load_digits_split()
example = digits.test_x[:2]


def accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float((model(digits.test_x).argmax(1) == digits.test_y).float().mean())


# A calibration model: observers that find good ranges. The float model's own code is not touched.
calibration = prepare(float_model, example, default_calibration_qconfig_setter, target="bm1684")
calibration.eval()
set_fake_quantize(calibration, FakeQuantState.CALIBRATION)
with torch.no_grad():
    for i in range(5):
        calibration(digits.train_x[20 * i : 20 * i + 20])
set_fake_quantize(calibration, FakeQuantState.VALIDATION)
print(f"float {accuracy(float_model):.1%}, calibrated {accuracy(calibration):.1%}")

# A model to train, from the same float model, with the ranges that calibration found.
qat = prepare(float_model, example, default_qat_qconfig_setter, target="bm1684")
load_observer_params(calibration, qat)
check_qat_model(qat, example, output, verbose=False)  # model_check_result.txt
qat.train()
set_fake_quantize(qat, FakeQuantState.QAT)
optimizer = torch.optim.SGD(qat.parameters(), lr=1e-3, momentum=0.9, weight_decay=4e-5)
for step in range(20):
    chosen = torch.arange(32 * step, 32 * step + 32)
    loss = F.cross_entropy(qat(digits.train_x[chosen]), digits.train_y[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

qat.eval()
set_fake_quantize(qat, FakeQuantState.VALIDATION)
written = export(qat, output / "digits_qat.onnx")
print(f"trained {accuracy(qat):.1%}, written to {written.path}")
