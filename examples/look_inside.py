"""Step by step: capture, calibrate, solve, simulate, export, and compare on ONNX Runtime.

python examples/look_inside.py
"""

import torch

import bitwright as bw

module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3, padding=1),
    torch.nn.BatchNorm2d(8),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(512, 4),
).eval()
x = torch.randn(16, 3, 8, 8)

graph = bw.fold_batchnorm(bw.capture(module, x))  # an fx graph of named operators
print(graph)

target = bw.load_target("generic-int8")
plan = bw.assign(graph, target)  # what is quantized, and which operators form a group
print("groups:", plan.groups)

name = graph.info.inputs[0].name
statistics = bw.collect(graph, [{name: x}])  # one pass serves every threshold method
plan = bw.Solver(graph, target, statistics).solve(plan)
for value, entry in plan.values.items():
    print(f"{value:10} {entry.role:10} {entry.qparams.spec.dtype.name:6} scale {entry.qparams.scale[0]:.6f}")

simulated = bw.Replay(graph).run({name: x}, bw.quantized_reads(graph, plan))
output = graph.info.outputs[0]
print("largest difference to float:", float((simulated[output] - module(x)).abs().max()))

model = bw.export_qdq(graph, plan)
proof = bw.verify(graph, plan, model, [{name: x}])  # raises if ONNX Runtime computes other codes
print("ONNX Runtime agrees:", proof.to_json())
