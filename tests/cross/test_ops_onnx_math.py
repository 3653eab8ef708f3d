"""Arithmetic, activations, norms, softmax and attention as ONNX spells them, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitwright.errors import ModelError
from bitwright.importers.from_onnx import load_onnx
from bitwright.ops.unary import _FORMS as UNARY_FORMS
from bitwright.rewrite.fold_batchnorm import fold_batchnorm

Array = npt.NDArray[Any]
ANY = np.linspace(-3.3, 3.3, 40, dtype=np.float32).reshape(2, 4, 5)
IMAGE = np.random.default_rng(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
CHANNELS = [np.random.default_rng(i).uniform(0.3, 1.4, 4).astype(np.float32) for i in range(4)]


@dataclass(frozen=True)
class Case:
    """One node: its inputs (an array marked as a constant becomes an initializer), attributes, opset."""

    op_type: str
    inputs: tuple[Array | None, ...]
    constants: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 21


def model_of(case: Case, results: int = 1) -> onnx.ModelProto:
    names = ["" if x is None else f"x{i}" for i, x in enumerate(case.inputs)]
    node = helper.make_node(
        case.op_type, names, [f"y{i}" for i in range(results)], name="node", **case.attributes
    )
    inputs, constants = [], []
    for i, x in enumerate(case.inputs):
        if x is None:
            continue
        if i in case.constants:
            constants.append(numpy_helper.from_array(x, f"x{i}"))
        else:
            inputs.append(
                helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            )
    outputs = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(results)]
    graph = helper.make_graph([node], "case", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    for i, output in enumerate(inferred.graph.output):
        if not output.type.tensor_type.HasField(
            "shape"
        ):  # operators that onnx infers nothing for keep the shape
            kept = case.inputs[0]
            assert kept is not None
            output.CopyFrom(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, kept.shape))
    return inferred


def answers(case: Case) -> tuple[Array, torch.Tensor]:
    """ONNX Runtime's answer and ours."""
    model = model_of(case)
    feed = {f"x{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feed)
    graph = load_onnx(model)
    found = graph(*(torch.from_numpy(x) for x in feed.values()))
    return expected, found.detach()


UNARY_INPUTS = {
    "Sqrt": abs(ANY),
    "Log": abs(ANY) + 0.1,
    "Reciprocal": abs(ANY) + 0.1,
    "Acosh": abs(ANY) + 1.01,
    "Round": np.round(ANY * 2) / 2,
    "IsNaN": np.where(ANY > 1, np.float32(np.nan), ANY),
    "IsInf": np.where(ANY > 1, np.float32(np.inf), ANY),
    "Not": ANY > 0,
    **dict.fromkeys(["Tan", "Asin", "Acos", "Atanh"], ANY / 4),
}


def unary(op_type: str, **attributes: Any) -> Case:
    return Case(op_type, (UNARY_INPUTS.get(op_type, ANY),), attributes=attributes)


def binary(op_type: str, a: Array = ANY, b: Array | None = None, **attributes: Any) -> Case:
    return Case(op_type, (a, ANY[:, ::-1].copy() + 0.05 if b is None else b), attributes=attributes)


def scalar(op_type: str, value: float, *, first: bool = False) -> Case:
    number = np.asarray(value, dtype=np.float32)
    x = abs(ANY) + 0.1
    return Case(op_type, (number, x) if first else (x, number), constants=(0,) if first else (1,))


INTEGERS = np.arange(-10, 10, dtype=np.int64).reshape(4, 5)
ONES, ZEROS = np.ones(5, np.float32), np.zeros(5, np.float32)
Q = np.random.default_rng(5).normal(size=(2, 3, 4, 8)).astype(np.float32)

CASES: dict[str, Case] = {
    **{form.onnx: unary(form.onnx) for form in UNARY_FORMS.values() if isinstance(form.onnx, str)},
    "Softplus": unary("Softplus"),
    "LeakyRelu 0.3": unary("LeakyRelu", alpha=0.3),
    "Elu 0.5": unary("Elu", alpha=0.5),
    "Celu 0.5": unary("Celu", alpha=0.5),
    "HardSigmoid 0.3": unary("HardSigmoid", alpha=0.3, beta=0.4),
    "Gelu tanh": unary("Gelu", approximate="tanh"),
    "ThresholdedRelu 0.7": unary("ThresholdedRelu", alpha=0.7),
    "Shrink 0.7": unary("Shrink", lambd=0.7, bias=0.2),
    **{k: binary(k) for k in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")},
    **{k: binary(k) for k in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")},
    **{k: binary(k, ANY > 0, ANY[:, ::-1] > 1) for k in ("And", "Or", "Xor")},
    **{f"{k} of three": Case(k, (ANY, ANY[:1] * 2, ANY[:, :1] + 1)) for k in ("Max", "Min", "Sum", "Mean")},
    "Pow": binary("Pow", abs(ANY) + 0.1),
    "fmod": binary("Mod", fmod=1),
    "integer Div by constants": Case("Div", (INTEGERS, np.asarray([3, -3, 2, 7, 1])), constants=(1,)),
    "integer Mod by constants": Case("Mod", (INTEGERS, np.asarray([3, -3, 2, 7, 1])), constants=(1,)),
    "integer Div by constant": Case("Div", (INTEGERS, np.asarray(3, np.int64)), constants=(1,)),
    "Add scalar": scalar("Add", 1.5),
    "Sub scalar first": scalar("Sub", 1.5, first=True),
    "Div scalar first": scalar("Div", 1.5, first=True),
    "Pow scalar": scalar("Pow", 1.5),
    "Pow scalar first": scalar("Pow", 1.5, first=True),
    "Max scalar": scalar("Max", 1.5),
    "Greater scalar": scalar("Greater", 1.5),
    "Mul by one number of rank 1": Case("Mul", (ANY, np.asarray([3], np.float32)), constants=(1,)),
    "Add one number of rank 4": Case("Add", (ANY, np.full((1, 1, 1, 1), 3, np.float32)), constants=(1,)),
    "Where": Case("Where", (ANY > 0, ANY, ANY[:1] * 2)),
    "Where with number": Case("Where", (ANY > 0, np.asarray(7, np.float32), ANY), constants=(1,)),
    "Where with two numbers": Case(
        "Where", (ANY > 0, np.asarray(7, np.float32), np.asarray(8, np.float32)), constants=(1, 2)
    ),
    "Clip": Case("Clip", (ANY, np.asarray(-1, np.float32), np.asarray(2, np.float32)), constants=(1, 2)),
    "Clip from above": Case("Clip", (ANY, None, np.asarray(2, np.float32)), constants=(2,)),
    "Clip between inputs": Case("Clip", (ANY, np.asarray(-1, np.float32), np.asarray(2, np.float32))),
    "PRelu": Case("PRelu", (IMAGE, CHANNELS[0].reshape(4, 1, 1)), constants=(1,)),
    "Softmax": Case("Softmax", (ANY,), attributes={"axis": 1}),
    "LogSoftmax": Case("LogSoftmax", (ANY,)),
    "Hardmax": Case("Hardmax", (np.round(ANY * 0),), attributes={"axis": 1}),
    "Softmax before opset 13": Case("Softmax", (ANY,), attributes={"axis": 2}, opset=11),
    "Dropout": Case("Dropout", (ANY,)),
    "BatchNormalization": Case(
        "BatchNormalization", (IMAGE, *CHANNELS), constants=(1, 2, 3, 4), attributes={"epsilon": 1e-3}
    ),
    "InstanceNormalization": Case("InstanceNormalization", (IMAGE, *CHANNELS[:2]), constants=(1, 2)),
    "GroupNormalization": Case(
        "GroupNormalization", (IMAGE, *CHANNELS[:2]), constants=(1, 2), attributes={"num_groups": 2}
    ),
    "LayerNormalization": Case("LayerNormalization", (ANY, ONES * 2, ZEROS + 1), constants=(1, 2)),
    "LayerNormalization from the front": Case(
        "LayerNormalization", (ANY, np.ones((4, 5), np.float32)), constants=(1,), attributes={"axis": 1}
    ),
    "LpNormalization 1": Case("LpNormalization", (ANY,), attributes={"axis": 1, "p": 1}),
    "LpNormalization 2": Case("LpNormalization", (ANY,)),
    "LRN": Case("LRN", (IMAGE,), attributes={"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.2}),
    "MeanVarianceNormalization": Case("MeanVarianceNormalization", (IMAGE,)),
}


@pytest.mark.parametrize("name", CASES)
def test_we_answer_as_onnx_runtime_does(name: str) -> None:
    expected, found = answers(CASES[name])
    assert str(found.numpy().dtype) == str(expected.dtype)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-6)


REFERENCE: dict[str, Case] = {
    "RMSNormalization": Case("RMSNormalization", (ANY, ONES * 2), constants=(1,), opset=23),
    "Attention": Case("Attention", (Q, Q * 2, Q * 3), opset=23, attributes={"scale": 0.2}),
    "Attention, causal": Case("Attention", (Q, Q * 2, Q * 3), opset=23, attributes={"is_causal": 1}),
    "Attention, masked": Case(
        "Attention", (Q, Q * 2, Q * 3, Q[0, 0, :, :4].copy()), constants=(3,), opset=23
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_newer_operators_answer_as_the_onnx_reference_does(name: str) -> None:
    case = REFERENCE[name]
    model = model_of(case)
    feed = {f"x{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants}
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    found = load_onnx(model)(*(torch.from_numpy(x) for x in feed.values())).detach()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-6)


def refused(case: Case, results: int = 1) -> str:
    with pytest.raises(ModelError) as caught:
        load_onnx(model_of(case, results))
    return str(caught.value)


def test_forms_that_would_be_computed_wrongly_are_refused() -> None:
    assert "alpha" in refused(Case("Selu", (ANY,), attributes={"alpha": 2.0}))
    assert "mask" in refused(Case("Dropout", (ANY,)), results=2)
    assert "sign" in refused(Case("IsInf", (ANY,), attributes={"detect_negative": 0}))


def test_a_folded_batch_norm_keeps_the_names_of_the_file() -> None:
    weight = np.random.default_rng(7).normal(size=(4, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], name="bn"),
    ]
    shape = ["N", *IMAGE.shape[1:]]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 3, 3])],
        [
            numpy_helper.from_array(a, n)
            for n, a in (("w", weight), *zip(("gamma", "beta", "mean", "var"), CHANNELS, strict=True))
        ],
    )
    loaded = load_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    folded = fold_batchnorm(loaded)
    assert folded.op_names == ["conv"]
    assert folded.op_inputs("conv") == ["x", "w", "beta"]
    assert folded.op("conv").outputs == ("y",)
    x = torch.from_numpy(IMAGE)
    torch.testing.assert_close(folded(x), loaded(x), rtol=1e-5, atol=1e-5)
