"""Are the look-up tables to blame, and which? A small attention network, with tables that are too coarse.

python examples/tables_to_blame.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from bitwright.nn.qat.segment_lut import QuantizedQATSegmentLUT
from bitwright.quantization import (
    FakeQuantState,
    TableSettings,
    default_calibration_qconfig_setter,
    prepare,
    set_fake_quantize,
    set_quantized_forward,
)


class Rows(nn.Module):
    """Digits of 8 by 8 pixels, some of them dark: every row a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 32, bias=False), nn.LayerNorm(32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(256, 10)
        self.place = nn.Parameter(torch.randn(8, 32) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(x)) + self.place
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) * 32**-0.5, -1) @ v)
        return torch.log(torch.softmax(self.head(x.flatten(1)), -1) + 1e-3)


torch.manual_seed(0)
digits = load_digits()
x, y = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)
x = x * 10 ** (-1.5 * torch.rand(len(x), 1, 1))
train, test = slice(0, 1400), slice(1400, None)
float_model = Rows()
optimizer = torch.optim.AdamW(float_model.parameters(), lr=3e-3)
for _ in range(300):
    batch = torch.randint(1400, (128,))
    nn.functional.nll_loss(float_model(x[batch]), y[batch]).backward()
    optimizer.step()
    optimizer.zero_grad()
float_model.eval()


def evaluate(title: str, model: nn.Module) -> None:
    with torch.no_grad():
        share = (model(x[test]).argmax(1) == y[test]).float().mean()
    print(f"{title:50} {100 * share:5.1f} %")


evaluate("float", float_model)
qat_model = prepare(
    copy.deepcopy(float_model), example_inputs=x[:2], qconfig_setter=default_calibration_qconfig_setter
).eval()
set_fake_quantize(qat_model, FakeQuantState.CALIBRATION)
qat_model(x[train][:256])
set_fake_quantize(qat_model, FakeQuantState.VALIDATION)
evaluate("fake-quantized", qat_model)

# One table is made badly here, so that there is something to find.
qat_model.get_submodule("norm.rsqrt").table_settings = TableSettings(strategy="evenly", num_tables=1)
qat_lut_model = copy.deepcopy(qat_model)
QuantizedQATSegmentLUT.convert_segment_lut(qat_lut_model)
evaluate("all tables in fixed point", qat_lut_model)

for kind in ("exp", "reciprocal", "log", "rsqrt"):
    names = set_quantized_forward(qat_lut_model, False, kind=kind)
    evaluate(f"  put back: {', '.join(names)}", qat_lut_model)
    set_quantized_forward(qat_lut_model, True)

qat_lut_model.get_submodule("norm.rsqrt").quantized_forward = False
evaluate("norm.rsqrt put back", qat_lut_model)
qat_lut_model.get_submodule("norm.rsqrt").quantized_forward = True
qat_lut_model.get_submodule("norm.rsqrt").table_settings = TableSettings(num_tables=12)
evaluate("norm.rsqrt with 12 tables, no training needed", qat_lut_model)
