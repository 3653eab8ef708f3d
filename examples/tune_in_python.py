"""The main job from Python: a PyTorch module and data in memory.

python examples/tune_in_python.py [OUTPUT_FOLDER]
"""

import sys

import bitwright as bw
from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo

output = sys.argv[1] if len(sys.argv) > 1 else "out"
module = load_demo("cnn")  # any nn.Module in eval mode
_, _, pictures, labels = load_digits_split()
data = [{"x": pictures[i : i + 1], "label": int(labels[i])} for i in range(100)]

settings = bw.Settings(target="bm1684", expected_cos=0.98, max_float_ops=5, inference_num=16)
result = bw.tune(module, data, output=output, settings=settings, example_inputs=pictures[:2])

for name, stage in result.stages.items():
    print(f"{name:6} cosine {stage.cosine:.4f}  top-1 {100 * stage.accuracy.top1:.1f} %")
print("float operators:", result.choice.float_groups)
