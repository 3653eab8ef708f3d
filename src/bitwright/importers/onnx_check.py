"""Comparing a graph that was just loaded with ONNX Runtime on the file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import ModelProto, helper
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay

_RELATIVE = 1e-3
_ABSOLUTE = 1e-4  # times the largest magnitude of the value


def check_against_runtime(graph: Graph, model: ModelProto, example: Mapping[str, Tensor], where: str) -> None:
    """Run *graph* and ONNX Runtime (no optimisation) on *model* and compare all float outputs.

    *example*: inputs by name. *raises* `ModelError` naming the first value that differs by more than 1e-3 relative to
    itself and 1e-4 relative to its largest magnitude.
    """
    feeds = {name: x.numpy() for name, x in example.items()}
    outputs = [o.name for o in model.graph.output]
    theirs = _run(model, outputs, feeds, where)
    ours = _execute(graph, example, where)
    if all(agrees(ours[name], theirs[name]) for name in outputs):
        return
    _blame(graph, model, example, where)


def _blame(graph: Graph, model: ModelProto, example: Mapping[str, Tensor], where: str) -> None:
    """Run every operator on ONNX Runtime's own values; *raises* `ModelError` for the first that computes otherwise.

    If none does, the outputs differ because rounding errors grew on the way (a variance as a difference of two large
    numbers does that), which is nobody's mistake.
    """
    produced = {o for n in model.graph.node for o in n.output}
    names = [n for n, v in graph.values.items() if not v.is_constant and n in produced]
    exposed = ModelProto()
    exposed.CopyFrom(model)
    held = {o.name for o in model.graph.output}
    exposed.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in held)
    theirs = _run(exposed, names, {name: x.numpy() for name, x in example.items()}, where)
    replay = Replay(graph)
    env: dict[str, Any] = {**replay.run(example, keep=None), **example}
    for name, array in theirs.items():
        env[name] = torch.from_numpy(np.array(array))
    for op in graph.ops:
        replay.run_op(op.name, env, {})
        for name in (n for n in op.outputs if n in theirs):
            if not agrees(env[name], theirs[name]):
                raise ModelError(
                    f"{where}, value {name!r} of {op.kind} {op.name!r}",
                    expected="what ONNX Runtime computes from the same inputs",
                    found=_difference(env[name], theirs[name]),
                    remedy="This is an error of ours: please report it with the model; check=False skips the comparison.",
                )
            env[name] = torch.from_numpy(np.array(theirs[name]))


def _difference(ours: Tensor, theirs: npt.NDArray[Any]) -> str:
    if tuple(ours.shape) != theirs.shape:
        return f"the shape {list(ours.shape)} instead of {list(theirs.shape)}"
    largest = np.abs(ours.detach().double().numpy() - theirs.astype(np.float64)).max()
    return f"another result (largest difference {largest:.3g})"


def _execute(graph: Graph, example: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    try:
        return Replay(graph).run(example, keep=None)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ModelError(
            where,
            expected="a graph that runs on random inputs",
            found=" ".join(str(error).split()),
            remedy="Give input_shapes that the model accepts; else please report it with the model.",
        ) from error


def agrees(ours: Any, theirs: npt.NDArray[Any]) -> bool:
    """True if a float value of ours equals ONNX Runtime's within the tolerance; other values need equal shapes."""
    x = ours.detach()
    if tuple(x.shape) != theirs.shape:
        return False
    if theirs.dtype.kind != "f" or not theirs.size:
        return True
    finite = theirs[np.isfinite(theirs)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    y = theirs.astype(np.float64)
    return bool(np.allclose(x.double().numpy(), y, rtol=_RELATIVE, atol=_ABSOLUTE * largest, equal_nan=True))


def _run(
    model: ModelProto, outputs: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]], where: str
) -> dict[str, npt.NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return dict(zip(outputs, session.run(list(outputs), dict(feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise ModelError(
            where,
            expected="a model that ONNX Runtime executes on random inputs",
            found=" ".join(str(error).split()),
            remedy="Repair the model, or give input_shapes that it accepts.",
        ) from error
