"""A function of one's own as a look-up table: 12-bit companded samples, codes 0..4095, decoded to -1..1.

python examples/segment_lut.py
"""

import torch

import bitwright as bw
from bitwright.nn import SegmentLUT


def decode(code: torch.Tensor) -> torch.Tensor:
    """Steps are fine around the middle and coarse at the ends (mu-law)."""
    u = code / 2047.5 - 1
    return u.sign() * torch.expm1(u.abs() * 5.545) / 255


torch.set_grad_enabled(False)
codes = torch.arange(4096.0).reshape(-1, 16)
module = torch.nn.Sequential(SegmentLUT(decode, input_range=(0, 4095)), torch.nn.Linear(16, 4)).eval()

# int16 activations; one operator of the kind SegmentLUT, called "0" as its module is.
qconfig = bw.get_default_qconfig(activation_qkwargs={"dtype": "int16"})
model = bw.prepare(module, codes[:2], bw.ModuleNameQconfigSetter({"": qconfig})).eval()
bw.set_fake_quantize(model, bw.FakeQuantState.CALIBRATION)
model(codes)
bw.set_fake_quantize(model, bw.FakeQuantState.VALIDATION)
expected = model(codes)

print("tables:", bw.convert_segment_lut(model))
decoder = model.get_submodule("0")
for strategy in ("evenly", "curvature", "mix", "optimal"):
    for count in (1, 6, 24):
        decoder.table_settings = bw.TableSettings(strategy=strategy, num_tables=count, input_range=(0, 4095))
        largest, rms = decoder.table.error(decode)
        wrong = float((model(codes) - expected).abs().max())
        print(
            f"{strategy:10} {count:2} tables: {largest:7.2f} steps at most, {rms:6.3f} rms; output off by {wrong:.6f}"
        )

decoder.lut.quantized_forward = False  # back to the float function
print("put back:", bool(torch.equal(model(codes), expected)))
