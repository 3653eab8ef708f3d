"""Functions of one tensor, element by element: activations and elementary functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, TensorFunction
from bitwright.ops.elementwise import seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

Parameters = Mapping[str, Any]
_Writer = Callable[[Emitter, str, str, Parameters], None]


def _chain(*op_types: str) -> _Writer:
    """Writes op types applied one after the other."""

    def write(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
        for op_type in op_types[:-1]:
            inner = emit.temporary(op_type.lower())
            emit.node(op_type, [x], [inner])
            x = inner
        emit.node(op_types[-1], [x], [out])

    return write


def _with_constant(op_type: str, value: float, *before: str) -> _Writer:
    """Writes op types applied one after the other, then `op_type(result, value)`."""

    def write(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
        if before:
            inner = emit.temporary(before[-1].lower())
            _chain(*before)(emit, x, inner, parameters)
            x = inner
        emit.node(op_type, [x, emit.constant(np.asarray(value, dtype=np.float32), "constant")], [out])

    return write


def _write_silu(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    gate = emit.temporary("gate")
    emit.node("Sigmoid", [x], [gate])
    emit.node("Mul", [x, gate], [out])


def _write_square(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    emit.node("Mul", [x, x], [out])


def _write_trunc(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    sign, size, floor = emit.temporary("sign"), emit.temporary("abs"), emit.temporary("floor")
    emit.node("Sign", [x], [sign])
    emit.node("Abs", [x], [size])
    emit.node("Floor", [size], [floor])
    emit.node("Mul", [sign, floor], [out])


def _write_softplus(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    if parameters["beta"] == 1:
        emit.node("Softplus", [x], [out])
        return
    beta = emit.constant(np.asarray(parameters["beta"], dtype=np.float32), "beta")
    scaled, soft = emit.temporary("scaled"), emit.temporary("softplus")
    emit.node("Mul", [x, beta], [scaled])
    emit.node("Softplus", [scaled], [soft])
    emit.node("Div", [soft, beta], [out])


def _write_exp2(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    emit.node("Pow", [emit.constant(np.asarray(2.0, dtype=np.float32), "base"), x], [out])


def _write_log1p(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    one, total = emit.constant(np.asarray(1.0, dtype=np.float32), "one"), emit.temporary("sum")
    emit.node("Add", [x, one], [total])
    emit.node("Log", [total], [out])


def _write_rsqrt(emit: Emitter, x: str, out: str, parameters: Parameters) -> None:
    if parameters.get("epsilon"):
        least = emit.constant(np.asarray(0.0, dtype=np.float32), "least")
        epsilon = emit.constant(np.asarray(parameters["epsilon"], dtype=np.float32), "epsilon")
        clipped, shifted = emit.temporary("clipped"), emit.temporary("shifted")
        emit.node("Max", [x, least], [clipped])
        emit.node("Add", [clipped, epsilon], [shifted])
        x = shifted
    _chain("Sqrt", "Reciprocal")(emit, x, out, parameters)


def _rsqrt(x: Tensor, *, epsilon: float = 0.0) -> Tensor:
    # With an epsilon x is a variance: 0 or more, whatever the codes of its format.
    return torch.rsqrt(x.clamp(min=0) + epsilon) if epsilon else torch.rsqrt(x)


def _softplus(x: Tensor, *, beta: float) -> Tensor:
    # Linear above 20: there log(1 + exp(x)) - x < 2e-9, below float32's resolution.
    return F.softplus(x, beta=beta)


def _hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return (x * alpha + beta).clamp(0, 1)


def _shrink(x: Tensor, *, lambd: float, bias: float) -> Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def _thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


def _elu(x: Tensor, *, alpha: float) -> Tensor:
    return F.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float) -> Tensor:
    return F.celu(x, alpha)


def _gelu(x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Form:
    """One kind. *onnx*: an op type that has the parameters as attributes, or what writes it.

    *aten*: ATen names without further arguments. *defaults*: of ONNX, by attribute name. *bounds*: see `Op.output_range`.
    """

    function: Callable[..., Tensor]
    onnx: str | _Writer
    aten: tuple[str, ...] = ()
    defaults: Parameters = field(default_factory=dict)
    bounds: tuple[float, float] | None = None
    passthrough: bool = False


_FORMS: dict[str, _Form] = {
    "Relu": _Form(torch.relu, "Relu", ("relu",)),
    "LeakyRelu": _Form(_leaky_relu, "LeakyRelu", defaults={"alpha": 0.01}),
    "Elu": _Form(_elu, "Elu", defaults={"alpha": 1.0}),
    "Selu": _Form(torch.selu, "Selu", ("selu",)),
    "Celu": _Form(_celu, "Celu", defaults={"alpha": 1.0}),
    "Sigmoid": _Form(torch.sigmoid, "Sigmoid", ("sigmoid",), bounds=(0.0, 1.0)),
    "HardSigmoid": _Form(
        _hard_sigmoid, "HardSigmoid", defaults={"alpha": 0.2, "beta": 0.5}, bounds=(0.0, 1.0)
    ),
    "HardSwish": _Form(F.hardswish, "HardSwish", ("hardswish",)),
    "Silu": _Form(F.silu, _write_silu, ("silu",)),
    "Mish": _Form(F.mish, "Mish", ("mish",)),
    "Gelu": _Form(_gelu, "Gelu", defaults={"approximate": "none"}),
    "Tanh": _Form(torch.tanh, "Tanh", ("tanh",), bounds=(-1.0, 1.0)),
    "Softplus": _Form(_softplus, _write_softplus),
    "Softsign": _Form(F.softsign, "Softsign"),
    "LogSigmoid": _Form(F.logsigmoid, _chain("Neg", "Softplus", "Neg"), ("log_sigmoid",)),
    "ThresholdedRelu": _Form(_thresholded_relu, "ThresholdedRelu", defaults={"alpha": 1.0}),
    "Shrink": _Form(_shrink, "Shrink", defaults={"lambd": 0.5, "bias": 0.0}),
    "Exp": _Form(torch.exp, "Exp", ("exp",)),
    "Expm1": _Form(torch.expm1, _with_constant("Sub", 1.0, "Exp"), ("expm1",)),
    "Exp2": _Form(torch.exp2, _write_exp2, ("exp2",)),
    "Log": _Form(torch.log, "Log", ("log",)),
    "Log1p": _Form(torch.log1p, _write_log1p, ("log1p",)),
    "Log2": _Form(torch.log2, _with_constant("Div", math.log(2.0), "Log"), ("log2",)),
    "Log10": _Form(torch.log10, _with_constant("Div", math.log(10.0), "Log"), ("log10",)),
    "Sqrt": _Form(torch.sqrt, "Sqrt", ("sqrt",)),
    "Rsqrt": _Form(_rsqrt, _write_rsqrt, ("rsqrt",)),
    "Reciprocal": _Form(torch.reciprocal, "Reciprocal", ("reciprocal",)),
    "Square": _Form(torch.square, _write_square, ("square",)),
    "Abs": _Form(torch.abs, "Abs", ("abs",)),
    "Neg": _Form(torch.neg, "Neg", ("neg", "negative")),
    "Sign": _Form(torch.sign, "Sign", ("sign",), bounds=(-1.0, 1.0)),
    "Floor": _Form(torch.floor, "Floor", ("floor",)),
    "Ceil": _Form(torch.ceil, "Ceil", ("ceil",)),
    "Round": _Form(torch.round, "Round"),
    "Trunc": _Form(torch.trunc, _write_trunc, ("trunc", "fix")),
    "Erf": _Form(torch.erf, "Erf", ("erf",), bounds=(-1.0, 1.0)),
    "Sin": _Form(torch.sin, "Sin", ("sin",), bounds=(-1.0, 1.0)),
    "Cos": _Form(torch.cos, "Cos", ("cos",), bounds=(-1.0, 1.0)),
    "Tan": _Form(torch.tan, "Tan", ("tan",)),
    "Asin": _Form(torch.asin, "Asin", ("asin", "arcsin")),
    "Acos": _Form(torch.acos, "Acos", ("acos", "arccos")),
    "Atan": _Form(torch.atan, "Atan", ("atan", "arctan")),
    "Sinh": _Form(torch.sinh, "Sinh", ("sinh",)),
    "Cosh": _Form(torch.cosh, "Cosh", ("cosh",)),
    "Asinh": _Form(torch.asinh, "Asinh", ("asinh", "arcsinh")),
    "Acosh": _Form(torch.acosh, "Acosh", ("acosh", "arccosh")),
    "Atanh": _Form(torch.atanh, "Atanh", ("atanh", "arctanh")),
    "IsNaN": _Form(torch.isnan, "IsNaN", ("isnan",)),
    "IsInf": _Form(torch.isinf, "IsInf", ("isinf",)),
    "Not": _Form(torch.logical_not, "Not", ("logical_not",)),
    "Identity": _Form(_identity, "Identity", ("positive",), passthrough=True),
}

#: Kinds without a table: integers compute them exactly, or they jump, which no interpolation follows.
_WITHOUT_TABLE = {
    *("Relu", "LeakyRelu", "ThresholdedRelu", "Shrink", "Square", "Abs", "Neg", "Sign"),
    *("Floor", "Ceil", "Round", "Trunc", "IsNaN", "IsInf", "Not", "Identity"),
}


class Unary(Op):
    """`kind(x)` with the numbers of *parameters*, named as the ONNX attributes are."""

    def __init__(self, kind: str, **parameters: Any) -> None:
        super().__init__()
        form = _FORMS[kind]
        self.__dict__["kind"] = kind
        self.__dict__["passthrough"] = form.passthrough
        self.parameters_of_kind = parameters

    def forward(self, x: Tensor) -> Tensor:
        return _FORMS[self.kind].function(x, **self.parameters_of_kind)

    def table_function(self) -> TensorFunction | None:
        if self.kind in _WITHOUT_TABLE:
            return None
        return partial(_FORMS[self.kind].function, **self.parameters_of_kind)

    def output_range(self) -> tuple[float, float] | None:
        return _FORMS[self.kind].bounds

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        form, x = _FORMS[self.kind], inputs[0]
        assert x is not None
        if isinstance(form.onnx, str):
            emit.node(form.onnx, [x], self.outputs, **self.parameters_of_kind)
        else:
            form.onnx(emit, x, self.outputs[0], self.parameters_of_kind)

    def describe(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.parameters_of_kind.items())


def _register_plain(kind: str, form: _Form) -> None:
    def build(call: AtenCall) -> Built:
        return Built(Unary(kind), (call["self"],))

    for name in form.aten:
        ATEN.add(name, build)


for _kind, _form in _FORMS.items():
    _register_plain(_kind, _form)


@ATEN.register("leaky_relu")
def _leaky_relu_from_aten(call: AtenCall) -> Built:
    return Built(Unary("LeakyRelu", alpha=float(call["negative_slope"])), (call["self"],))


@ATEN.register("elu")
def _elu_from_aten(call: AtenCall) -> Built | None:
    if call["scale"] != 1 or call["input_scale"] != 1:
        return None
    return Built(Unary("Elu", alpha=float(call["alpha"])), (call["self"],))


@ATEN.register("celu")
def _celu_from_aten(call: AtenCall) -> Built:
    return Built(Unary("Celu", alpha=float(call["alpha"])), (call["self"],))


@ATEN.register("hardsigmoid")
def _hardsigmoid_from_aten(call: AtenCall) -> Built:
    return Built(Unary("HardSigmoid", alpha=1 / 6, beta=0.5), (call["self"],))


@ATEN.register("gelu")
def _gelu_from_aten(call: AtenCall) -> Built:
    return Built(Unary("Gelu", approximate=call["approximate"]), (call["self"],))


@ATEN.register("softplus")
def _softplus_from_aten(call: AtenCall) -> Built | None:
    # A lower threshold would show in float32; torch's own default is 20.
    return (
        None
        if call["threshold"] < 20
        else Built(Unary("Softplus", beta=float(call["beta"])), (call["self"],))
    )


@ATEN.register("threshold")
def _threshold_from_aten(call: AtenCall) -> Built | None:
    if call["value"] != 0:
        return None
    return Built(Unary("ThresholdedRelu", alpha=float(call["threshold"])), (call["self"],))


@ATEN.register("hardshrink", "softshrink")
def _shrink_from_aten(call: AtenCall) -> Built:
    lambd = float(call["lambd"])
    return Built(
        Unary("Shrink", lambd=lambd, bias=lambd if call.target == "softshrink" else 0.0), (call["self"],)
    )


@ATEN.register("round")
def _round_from_aten(call: AtenCall) -> Built | None:
    return None if call.args.get("decimals", 0) else Built(Unary("Round"), (call["self"],))


@ATEN.register("bitwise_not")
def _bitwise_not_from_aten(call: AtenCall) -> Built | None:
    return Built(Unary("Not"), (call["self"],)) if seen(call["self"]).dtype == torch.bool else None


# What ONNX has as one op type: all kinds whose `onnx` is a name, with attributes read by name.
def _register_onnx(kind: str, form: _Form) -> None:
    def build(call: OnnxCall) -> Built:
        found = {key: call.attribute(key, default) for key, default in form.defaults.items()}
        return Built(Unary(kind, **found), (call.inputs[0],))

    ONNX.add(str(form.onnx), build)


for _kind, _form in _FORMS.items():
    if isinstance(_form.onnx, str) and _kind not in ("Selu", "IsInf"):
        _register_onnx(_kind, _form)


@ONNX.register("Selu")
def _selu_from_onnx(call: OnnxCall) -> Built:
    alpha, gamma = call.attribute("alpha", 1.6732632), call.attribute("gamma", 1.0507010)
    if abs(alpha - 1.6732632) > 1e-6 or abs(gamma - 1.0507010) > 1e-6:
        raise Unsupported("only the standard alpha and gamma are executed")
    return Built(Unary("Selu"), (call.inputs[0],))


@ONNX.register("IsInf")
def _isinf_from_onnx(call: OnnxCall) -> Built:
    if not (call.attribute("detect_negative", 1) and call.attribute("detect_positive", 1)):
        raise Unsupported("infinities of one sign only are not detected")
    return Built(Unary("IsInf"), (call.inputs[0],))


@ONNX.register("Softplus")
def _softplus_from_onnx(call: OnnxCall) -> Built:
    return Built(Unary("Softplus", beta=1.0), (call.inputs[0],))
