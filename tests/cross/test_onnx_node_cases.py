"""The standard's own test cases, one node each: loaded with constants folded in, run by us, compared with the answers.

The cases come with the `onnx` package. What is refused must be refused for a listed reason; the few answers that differ
are listed with why.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_onnx import load_onnx
from bitwright.importers.onnx_prepare import NEWEST_OPSET
from bitwright.ops.spelling import ONNX

#: Reasons for which a form may be refused.
REFUSALS = re.compile(
    r"found opset [1-8]\b|another type|outputs besides the normalised one|keep_aspect_ratio_policy|tf_crop_and_resize"
    r"|antialias|AveragePool '\w+' \(dilations|mask output|training_mode|must be known before run time|standard alpha"
    r"|infinities of one sign|the output Indices|auto_pad=SAME|peephole|\(layout\)|Attention"
)
#: Cases whose answer is not ours, and why.
DIFFERENT = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad": "ONNX Runtime divides by another count, and so do we",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime uses the whole output length, and so do we",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime uses the whole output length, and so do we",
    "test_pow_types_int64_float32": "an integer to a real power is real here, rounded down in ONNX",
    "test_pow_types_int32_float32": "an integer to a real power is real here, rounded down in ONNX",
    "test_reduce_max_empty_set": "the maximum of nothing",
    "test_reduce_max_empty_set_bool": "the maximum of nothing",
    "test_reduce_min_empty_set": "the minimum of nothing",
}


@functools.cache
def cases() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    with warnings.catch_warnings():  # the package computes its answers now, with overflows on purpose
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            if len(case.model.graph.node) == 1 and case.name not in DIFFERENT:
                found[case.model.graph.node[0].op_type].append(case)
    return found


def with_constants(model: ModelProto, inputs: Sequence[Any]) -> tuple[ModelProto, dict[str, torch.Tensor]]:
    """The model at an opset that is read, with all inputs but the first as constants; and the first input."""
    made = ModelProto()
    made.CopyFrom(model)
    made.ir_version = 10
    for imported in made.opset_import:
        imported.version = min(imported.version, NEWEST_OPSET)
    names = [i.name for i in made.graph.input]
    for name, array in list(zip(names, inputs, strict=True))[1:]:
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return made, {name: torch.from_numpy(np.array(x)) for name, x in zip(names[:1], inputs, strict=False)}


def is_ordinary(arrays: Sequence[Any]) -> bool:
    """False for strings, sequences, optionals and number formats that numpy lacks."""
    return all(isinstance(a, (np.ndarray, np.generic)) and np.asarray(a).dtype.kind in "biuf" for a in arrays)


def answer(graph: Graph, env: dict[str, Any], name: str) -> np.ndarray:
    tensor = env[name] if name in env else graph.constant(name)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().numpy()


@pytest.mark.parametrize("op_type", sorted(ONNX))
def test_cases_of_the_standard(op_type: str) -> None:
    compared = 0
    for case in cases()[op_type]:
        inputs, outputs = case.data_sets[0]
        if not is_ordinary([*inputs, *outputs]):
            continue
        model, feeds = with_constants(case.model, inputs)
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError:
            continue  # needs a newer opset
        try:
            graph = load_onnx(model, check=False)
        except ModelError as refusal:
            assert REFUSALS.search(str(refusal)), f"{case.name}: {refusal}"  # noqa: PT017
            continue
        env = Replay(graph).run(feeds, keep=None)
        for output, expected in zip(case.model.graph.output, outputs, strict=True):
            ours, theirs = answer(graph, env, output.name), np.asarray(expected)
            assert ours.dtype == theirs.dtype, case.name
            assert ours.shape == theirs.shape, case.name
            rough = theirs.dtype == np.float16
            np.testing.assert_allclose(
                ours, theirs, rtol=2e-3 if rough else 1e-4, atol=1e-5, err_msg=case.name
            )
        compared += 1
    if not compared:
        pytest.skip("the onnx package has no case of a form that is executed")
