"""A small network and its samples for tests of the command line, and what a call came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLES, CLASSES = 12, 5


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failure, without the lines of progress before it."""
        assert self.status == 2
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert lines[-1].startswith("bitwright: error: ")
        assert not any(line.startswith("bitwright: error: ") for line in lines[:-1])
        return lines[-1]


Command = Callable[..., Outcome]


def random_weight(name: str, *shape: int, seed: int) -> onnx.TensorProto:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3
    x.flat[0] *= 30  # an outlier, so that int8 loses something
    return numpy_helper.from_array(x, name)


def make_model(path: Path, *nodes: onnx.NodeProto) -> Path:
    """Two convolutions and a classifier `[n, 3, 8, 8]` -> `[n, 5]`; *nodes*: follow on the value `last`."""
    chain = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Sigmoid", ["c2"], ["s2"], "sigmoid"),
        helper.make_node("GlobalAveragePool", ["s2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["last" if nodes else "y"], "classifier", transB=1),
        *nodes,
    ]
    weights = [
        random_weight("w1", 6, 3, 3, 3, seed=1),
        random_weight("b1", 6, seed=2),
        random_weight("w2", 8, 6, 3, 3, seed=3),
        random_weight("w3", CLASSES, 8, seed=4),
        random_weight("b3", CLASSES, seed=5),
    ]
    graph = helper.make_graph(
        chain,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    )
    model.ir_version = 8
    onnx.save(model, path)
    return path
