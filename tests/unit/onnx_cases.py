"""Small ONNX models in text form, and comparing a graph with ONNX Runtime, for the tests of `load_onnx`."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import parser

from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay


def model_of(text: str, opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> {text}')


SMALL = "g (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { h = Relu(x) y = MatMul(h, w) }"


def example(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    found = {}
    for spec in graph.info.inputs:
        shape = [batch if d is None else d for d in spec.shape]
        if spec.dtype.is_floating_point:
            found[spec.name] = torch.randn(shape, generator=generator) * 0.5
        else:
            found[spec.name] = torch.randint(0, 200, shape, generator=generator).to(spec.dtype)
    return found


def run_reference(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in model.graph.output]
    return dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))


def assert_equals_reference(
    graph: Graph, model: onnx.ModelProto, batch: int, tolerance: float = 1e-4
) -> None:
    inputs = example(graph, batch)
    ours = Replay(graph).run(inputs)
    for name, theirs in run_reference(model, inputs).items():
        assert tuple(ours[name].shape) == theirs.shape
        largest = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours[name].detach().numpy(), theirs, rtol=1e-3, atol=tolerance * largest)


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops]
