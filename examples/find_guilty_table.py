"""Which look-up table costs the accuracy? All tables in fixed point, ranked by what each does alone, the worst one put back.

python examples/find_guilty_table.py [OUTPUT_FOLDER]
"""

import copy
import sys
from pathlib import Path

import torch

from bitwright.analysis import QuantAnalysis
from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo
from bitwright.nn.qat.segment_lut import QuantizedQATSegmentLUT
from bitwright.numerics.lut import TableSettings
from bitwright.quantization import (
    FakeQuantState,
    default_calibration_qconfig_setter,
    prepare,
    set_fake_quantize,
)

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
float_model, digits = load_demo("transformer"), load_digits_split()

qat_model = prepare(float_model, digits.test_x[:2], default_calibration_qconfig_setter, target="journey6")
qat_model.eval()
set_fake_quantize(qat_model, FakeQuantState.CALIBRATION)
with torch.no_grad():
    for images in digits.train_x[:100].split(20):
        qat_model(images)
set_fake_quantize(qat_model, FakeQuantState.VALIDATION)

# Every function that the chip looks up, in fixed point; one of the tables is a poor one.
qat_lut_model = copy.deepcopy(qat_model)
poor = qat_lut_model.get_submodule("blocks.0.attention_norm.rsqrt")
poor.table_settings = TableSettings(strategy="evenly", num_tables=1)
QuantizedQATSegmentLUT.convert_segment_lut(qat_lut_model)


def distance() -> float:
    """How far the tables move the outputs, as a mean."""
    with torch.no_grad():
        return float((qat_lut_model(digits.test_x) - qat_model(digits.test_x)).abs().mean())


analysis = QuantAnalysis(qat_model, qat_lut_model, "fake_quant", out_dir=output)
analysis.auto_find_bad_case(digits.test_x.split(32), metric="L1")
analysis.run()
analysis.compare_per_layer()  # compare_per_layer_out.csv
table = analysis.sensitivity(metric="L1")["0"]  # output_0_L1_sensitive_ops.txt
print(table)
worst = table.rows[0]["op_name"]

print(f"with all tables in fixed point the outputs move by {distance():.6f}")
qat_lut_model.get_submodule(worst).quantized_forward = False
print(f"with {worst} put back to float, by {distance():.6f}")
