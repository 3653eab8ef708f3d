"""The error sketch by hand: the sensitivity of everything, and of any combination, from a few backward passes.

python examples/error_sketch.py
"""

import bitwright as bw
from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo

_, _, pictures, _ = load_digits_split()
module = load_demo("cnn")
graph = bw.fold_batchnorm(bw.capture(module, pictures[:2])).eval()
name = graph.info.inputs[0].name
batches = [{name: pictures[i : i + 8]} for i in range(0, 32, 8)]

target = bw.load_target("generic-int8")
solver = bw.Solver(graph, target, bw.collect(graph, batches))
plan = solver.solve(bw.assign(graph, target))

evaluator = bw.Evaluator(graph, lambda size: ({name: x} for x in pictures[:32].split(size)))
sketch = bw.ErrorSketch(evaluator, probes=8)

methods = ["max", "percentile", "kl"]
rows, _ = bw.sketch_sensitivity(sketch, plan, bw.candidate_reads(graph, plan, solver.solve, methods))
print("operator  loss alone at int8, sketched ± standard error; measured")
exact = {r.name: r for r in bw.measure_sensitivity(evaluator, plan, solver.solve, methods=methods)}
for row in rows[:5]:
    measured = exact[row.name].losses[row.method]
    print(f"{row.name:12} {row.method:10} {row.loss:.2e} ± {row.errors[row.method]:.0e}; {measured:.2e}")

for tried in (plan, *bw.joint_thresholds(sketch, plan, solver.solve, methods)):
    reads = bw.quantized_reads(graph, tried)
    sketch.measure(sketch.missing([reads]))  # nothing that was measured before is measured again
    print(
        f"whole network: predicted {sketch.predict(reads).loss:.2e}, true {1 - evaluator.evaluate(tried):.2e}"
    )

print("pairs that amplify (+) or cancel (-) each other most:")
for pair in bw.explain(sketch, plan).pairs[:3]:
    print(f"{pair.first} and {pair.second}: {pair.effect:+.1e} ± {pair.error:.0e}")
