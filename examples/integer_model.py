"""A network in integer operators alone, and its look-up tables, from Python.

python examples/integer_model.py [OUTPUT_FOLDER]
"""

import sys
from collections import Counter
from pathlib import Path

import onnx

import bitwright as bw
from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
module = load_demo("transformer")  # softmax, layer norms and GELU become look-up tables
_, _, pictures, labels = load_digits_split()
data = [{"x": pictures[i : i + 1], "label": int(labels[i])} for i in range(100)]

settings = bw.Settings(target="journey6", expected_cos=0.99, inference_num=16, export="both")
made = bw.tune(module, data, output=output, settings=settings, example_inputs=pictures[:2])
path = next(output.glob("*_integer.onnx"))
print({name: round(stage.cosine, 4) for name, stage in made.stages.items()})
print("widened:", dict(made.choice.groups))
print("nodes:", Counter(n.op_type for n in onnx.load(path).graph.node).most_common(6))
for name, proof in made.exports.proofs.items():
    print(
        f"{name}: largest difference {max(d.steps for d in proof.per_op)} step(s) over {len(proof.per_op)} operators"
    )

# Which table costs most, if a chip divides them evenly, in two segments?
found = bw.run_luts(
    module,
    data,
    output=output / "luts",
    settings=settings,
    plan=output / "plan.json",
    table_settings=bw.TableSettings(strategy="evenly", num_tables=2),
    tolerance=0.0001,
    example_inputs=pictures[:2],
)
print("to blame:", found.to_blame, "guilty:", found.blame.guilty)
for remedy in found.remedies:
    print(f"  {remedy.name}: {remedy.remedy}: {remedy.score[0]:.6f} -> {remedy.score[1]:.6f}")
