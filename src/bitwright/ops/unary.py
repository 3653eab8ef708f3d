"""Functions of one tensor, element by element: activations and elementary functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.elementwise import ELEMENT_TYPES, seen
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
    "Rsqrt": _Form(torch.rsqrt, _chain("Sqrt", "Reciprocal"), ("rsqrt",)),
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


@ONNX.register("Swish")
def _swish_from_onnx(call: OnnxCall) -> Built:
    if call.attribute("alpha", 1.0) != 1.0:
        raise Unsupported("alpha other than 1 is not executed")
    return Built(Unary("Silu"), (call.inputs[0],))


class PRelu(Op):
    """x where x >= 0, else slope * x. *channelwise*: the slope is `[c]` or `[1]` along axis 1 (torch), else broadcast (ONNX)."""

    kind = "PRelu"
    roles = (Role.ACTIVATION, Role.PARAMETER)

    def __init__(self, *, channelwise: bool) -> None:
        super().__init__()
        self.channelwise = channelwise

    def forward(self, x: Tensor, slope: Tensor) -> Tensor:
        return F.prelu(x, slope) if self.channelwise else torch.where(x >= 0, x, slope * x)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, slope = inputs
        assert x is not None
        assert slope is not None
        shape, count = emit.shape(x), emit.shape(slope)
        if self.channelwise and shape is not None and len(shape) > 2 and count != (1,):
            spread = emit.temporary("slope")
            axes = emit.constant(np.arange(1, len(shape) - 1, dtype=np.int64), "axes")
            emit.node("Unsqueeze", [slope, axes], [spread])
            slope = spread
        emit.node("PRelu", [x, slope], self.outputs)


@ATEN.register("prelu")
def _prelu_from_aten(call: AtenCall) -> Built:
    return Built(PRelu(channelwise=True), (call["self"], call["weight"]))


@ONNX.register("PRelu")
def _prelu_from_onnx(call: OnnxCall) -> Built:
    return Built(PRelu(channelwise=False), call.inputs[:2])


class Clip(Op):
    """x held between *lo* and *hi* (None: unbounded). Bounds that are not constant are further inputs, in that order."""

    kind = "Clip"
    roles = (Role.ACTIVATION, Role.PARAMETER)

    def __init__(
        self,
        lo: float | None = None,
        hi: float | None = None,
        *,
        lo_is_input: bool = False,
        hi_is_input: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.lo, self.hi, self.dtype = lo, hi, dtype
        self.lo_is_input, self.hi_is_input = lo_is_input, hi_is_input

    def forward(self, x: Tensor, *bounds: Tensor) -> Tensor:
        rest = iter(bounds)
        lo = next(rest) if self.lo_is_input else self.lo
        hi = next(rest) if self.hi_is_input else self.hi
        if lo is not None:
            x = torch.clamp(x, min=lo)
        return x if hi is None else torch.clamp(x, max=hi)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        rest = iter(inputs[1:])
        x, numpy_type = inputs[0], ELEMENT_TYPES[self.dtype][1]

        def bound(value: float | None, is_input: bool, hint: str) -> str | None:
            if is_input:
                return next(rest)
            return None if value is None else emit.constant(np.asarray(value, dtype=numpy_type), hint)

        lo, hi = bound(self.lo, self.lo_is_input, "lo"), bound(self.hi, self.hi_is_input, "hi")
        if not (self.lo_is_input or self.hi_is_input):
            emit.node("Clip", [x, lo, hi], self.outputs)
            return
        # Clip wants scalar bounds; Max and Min broadcast.
        if lo is not None:
            inner = self.outputs[0] if hi is None else emit.temporary("floor")
            emit.node("Max", [x, lo], [inner])
            x = inner
        if hi is not None:
            emit.node("Min", [x, hi], self.outputs)

    def output_range(self) -> tuple[float, float] | None:
        if self.lo is None or self.hi is None:
            return None
        return float(self.lo), float(self.hi)

    def describe(self) -> str:
        return f"lo={'·' if self.lo_is_input else self.lo}, hi={'·' if self.hi_is_input else self.hi}"


def _clip(x: Any, lo: Any, hi: Any) -> Built | None:
    bounds = [b for b in (lo, hi) if isinstance(b, fx.Node)]
    dtype = seen(x).dtype
    if dtype not in ELEMENT_TYPES or any(
        torch.result_type(seen(x), seen(b)) != dtype for b in (lo, hi) if b is not None
    ):
        return None
    op = Clip(
        None if isinstance(lo, fx.Node) else lo,
        None if isinstance(hi, fx.Node) else hi,
        lo_is_input=isinstance(lo, fx.Node),
        hi_is_input=isinstance(hi, fx.Node),
        dtype=dtype,
    )
    return Built(op, (x, *bounds))


@ATEN.register("relu6")
def _relu6_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], 0.0, 6.0)


@ATEN.register("hardtanh")
def _hardtanh_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], call["min_val"], call["max_val"])


@ATEN.register("clamp", "clip", "clamp_min", "clamp_max")
def _clamp_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], call.args.get("min"), call.args.get("max"))


@ONNX.register("Clip")
def _clip_from_onnx(call: OnnxCall) -> Built:
    values: list[Any] = [call.attributes.get("min"), call.attributes.get("max")]  # attributes until opset 10
    inputs: list[str] = [call.inputs[0]]
    is_input, dtype = [False, False], torch.float32
    for i in (0, 1):
        name, array = call.input(i + 1), call.constant(i + 1)
        if name is not None and (array is None or array.size != 1):
            is_input[i] = True
            inputs.append(name)
        elif array is not None:
            values[i] = array.reshape(()).item()
            dtype = torch.from_numpy(np.array(array)).dtype
    op = Clip(values[0], values[1], lo_is_input=is_input[0], hi_is_input=is_input[1], dtype=dtype)
    return Built(op, tuple(inputs))
