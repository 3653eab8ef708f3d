"""Arithmetic, comparisons and logic, element by element with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role, TensorFunction
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall

#: torch dtype -> (ONNX element type, numpy type) of what may appear in arithmetic.
ELEMENT_TYPES: dict[torch.dtype, tuple[int, npt.DTypeLike]] = {
    torch.float32: (onnx.TensorProto.FLOAT, np.float32),
    torch.float64: (onnx.TensorProto.DOUBLE, np.float64),
    torch.float16: (onnx.TensorProto.FLOAT16, np.float16),
    torch.int64: (onnx.TensorProto.INT64, np.int64),
    torch.int32: (onnx.TensorProto.INT32, np.int32),
    torch.int16: (onnx.TensorProto.INT16, np.int16),
    torch.int8: (onnx.TensorProto.INT8, np.int8),
    torch.uint8: (onnx.TensorProto.UINT8, np.uint8),
    torch.bool: (onnx.TensorProto.BOOL, np.bool_),
}

#: Writes one operation: emitter, two operand names, result name, "operands are integers".
_Writer = Callable[[Emitter, str, str, str, bool], None]


def _write_not_equal(emit: Emitter, a: str, b: str, out: str, integer: bool) -> None:
    equal = emit.temporary("equal")
    emit.node("Equal", [a, b], [equal])
    emit.node("Not", [equal], [out])


def _write_floor_divide(emit: Emitter, a: str, b: str, out: str, integer: bool) -> None:
    if (
        integer
    ):  # ONNX's integer division truncates; a - (a mod b) is divisible, so that truncation does nothing
        rest, whole = emit.temporary("rest"), emit.temporary("whole")
        emit.node("Mod", [a, b], [rest])
        emit.node("Sub", [a, rest], [whole])
        emit.node("Div", [whole, b], [out])
        return
    quotient = emit.temporary("quotient")
    emit.node("Div", [a, b], [quotient])
    emit.node("Floor", [quotient], [out])


def _write_remainder(emit: Emitter, a: str, b: str, out: str, integer: bool) -> None:
    if integer:
        emit.node("Mod", [a, b], [out])
        return
    floor, whole = emit.temporary("floor"), emit.temporary("whole")
    _write_floor_divide(emit, a, b, floor, False)
    emit.node("Mul", [floor, b], [whole])
    emit.node("Sub", [a, whole], [out])


def _write_fmod(emit: Emitter, a: str, b: str, out: str, integer: bool) -> None:
    emit.node("Mod", [a, b], [out], fmod=1)


def _divide(a: Any, b: Any) -> Tensor:
    return torch.true_divide(a, b)


def _divide_as_onnx(a: Any, b: Any) -> Tensor:
    whole = not any(isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) for x in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


@dataclass(frozen=True)
class _Form:
    """One kind of binary operator. *onnx*: an op type, or what writes it. *many*: the op type for three or more operands."""

    function: Callable[[Any, Any], Tensor]
    onnx: str | _Writer
    aten: tuple[str, ...] = ()
    many: str | None = None
    is_logic: bool = False


_FORMS: dict[str, _Form] = {
    "Add": _Form(torch.add, "Add", ("add",), many="Sum"),
    "Sub": _Form(torch.sub, "Sub", ("sub", "subtract")),
    "Mul": _Form(torch.mul, "Mul", ("mul", "multiply")),
    "Div": _Form(_divide, "Div", ("div", "true_divide", "divide")),
    "Pow": _Form(torch.pow, "Pow", ("pow",)),
    "Max": _Form(torch.maximum, "Max", ("maximum",), many="Max"),
    "Min": _Form(torch.minimum, "Min", ("minimum",), many="Min"),
    "FloorDiv": _Form(torch.floor_divide, _write_floor_divide, ("floor_divide",)),
    "Mod": _Form(torch.remainder, _write_remainder, ("remainder",)),
    "FMod": _Form(torch.fmod, _write_fmod, ("fmod",)),
    "Equal": _Form(torch.eq, "Equal", ("eq",)),
    "NotEqual": _Form(torch.ne, _write_not_equal, ("ne", "not_equal")),
    "Less": _Form(torch.lt, "Less", ("lt", "less")),
    "LessOrEqual": _Form(torch.le, "LessOrEqual", ("le", "less_equal")),
    "Greater": _Form(torch.gt, "Greater", ("gt", "greater")),
    "GreaterOrEqual": _Form(torch.ge, "GreaterOrEqual", ("ge", "greater_equal")),
    "And": _Form(torch.logical_and, "And", ("logical_and", "bitwise_and", "__and__"), is_logic=True),
    "Or": _Form(torch.logical_or, "Or", ("logical_or", "bitwise_or", "__or__"), is_logic=True),
    "Xor": _Form(torch.logical_xor, "Xor", ("logical_xor", "bitwise_xor", "__xor__"), is_logic=True),
}


class Elementwise(Op):
    """`a (kind) b`, broadcast. With *scalar*, one tensor input and a Python number: the first operand if *scalar_first*.

    *dtypes*: of the tensor inputs, and *computes_in*: what they are promoted to; None where ONNX has settled it already.
    """

    roles = (Role.ACTIVATION,)

    def __init__(
        self,
        kind: str,
        *,
        scalar: float | int | bool | None = None,
        scalar_first: bool = False,
        dtypes: tuple[torch.dtype, ...] = (),
        computes_in: torch.dtype | None = None,
        from_onnx: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.scalar, self.scalar_first = scalar, scalar_first
        self.dtypes, self.computes_in = dtypes, computes_in
        self._function = _divide_as_onnx if from_onnx and kind == "Div" else _FORMS[kind].function

    def forward(self, *xs: Tensor) -> Tensor:
        result: Tensor = reduce(self._function, self._operands(xs))
        return result

    def table_function(self) -> TensorFunction | None:
        is_power = self.kind == "Pow" and self.scalar is not None
        return self.forward if is_power or (self.kind == "Div" and self.scalar_first) else None

    def _operands(self, xs: Sequence[Any]) -> list[Any]:
        operands = list(xs)
        if self.scalar is not None:
            operands.insert(0 if self.scalar_first else 1, self.scalar)
        if self.kind in ("Max", "Min", "And", "Or", "Xor"):  # these take no Python numbers
            like = next(x for x in operands if isinstance(x, Tensor))
            dtype = None if self.kind in ("And", "Or", "Xor") else like.dtype
            operands = [torch.as_tensor(x, dtype=dtype) if not isinstance(x, Tensor) else x for x in operands]
        return operands

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        names = [self._cast(emit, i, str(name)) for i, name in enumerate(inputs)]
        if self.scalar is not None:
            numpy_type = ELEMENT_TYPES[self.computes_in or torch.float32][1]
            constant = emit.constant(np.asarray(self.scalar, dtype=numpy_type), "scalar")
            names.insert(0 if self.scalar_first else 1, constant)
        form = _FORMS[self.kind]
        if len(names) > 2:
            assert form.many is not None
            emit.node(form.many, names, self.outputs)
        elif isinstance(form.onnx, str):
            emit.node(form.onnx, names, self.outputs)
        else:
            integer = self.computes_in is not None and not self.computes_in.is_floating_point
            form.onnx(emit, names[0], names[1], self.outputs[0], integer)

    def _cast(self, emit: Emitter, index: int, name: str) -> str:
        if self.computes_in is None or self.dtypes[index] == self.computes_in:
            return name
        result = emit.temporary(f"input{index}")
        emit.node("Cast", [name], [result], to=ELEMENT_TYPES[self.computes_in][0])
        return result

    def describe(self) -> str:
        if self.scalar is None:
            return ""
        return f"scalar_first={self.scalar}" if self.scalar_first else f"scalar={self.scalar}"


def seen(node: Any) -> Any:
    """What export saw at *node*: a fake tensor, or a number standing for a symbolic one."""
    if not isinstance(node, fx.Node):
        return node
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return 1
    return 1.0 if isinstance(value, torch.SymFloat) else value


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of the tensor or number that export saw at *node*."""
    value = seen(node)
    if isinstance(value, Tensor):
        return value.dtype
    return torch.float32 if isinstance(value, float) else torch.int64


def _build(kind: str, a: Any, b: Any) -> Built | None:
    """The operator for operands *a*, *b*: fx nodes or Python numbers, at least one of them a node."""
    computes_in = torch.result_type(seen(a), seen(b))
    if _FORMS[kind].is_logic:
        if computes_in != torch.bool:
            return None
    elif kind == "Div" and not computes_in.is_floating_point:
        computes_in = torch.get_default_dtype()
    if computes_in not in ELEMENT_TYPES:
        return None
    nodes = [x for x in (a, b) if isinstance(x, fx.Node)]
    scalar = next((x for x in (a, b) if not isinstance(x, fx.Node)), None)
    op = Elementwise(
        kind,
        scalar=scalar,
        scalar_first=scalar is not None and not isinstance(a, fx.Node),
        dtypes=tuple(dtype_of(n) for n in nodes),
        computes_in=computes_in,
    )
    return Built(op, tuple(nodes))


def _operands(call: AtenCall) -> tuple[Any, Any]:
    names = [n for n in ("self", "input") if n in call.args]
    second = next(n for n in ("other", "exponent") if n in call.args)
    return call[names[0]], call[second]


def _register_aten(kind: str, form: _Form) -> None:
    def build(call: AtenCall) -> Built | None:
        if call.args.get("rounding_mode") not in (None, "floor") or call.args.get("alpha", 1) != 1:
            return None
        a, b = _operands(call)
        return _build("FloorDiv" if call.args.get("rounding_mode") == "floor" else kind, a, b)

    for name in form.aten:
        ATEN.add(name, build)


for _kind, _form in _FORMS.items():
    _register_aten(_kind, _form)


@ATEN.register("rsub")
def _rsub_from_aten(call: AtenCall) -> Built | None:
    return None if call["alpha"] != 1 else _build("Sub", call["other"], call["self"])


def _scalar(call: OnnxCall, index: int) -> npt.NDArray[Any] | None:
    """The one number in a constant operand that cannot change the result's rank, else None."""
    found = call.constant(index)
    if found is None or found.size != 1 or found.ndim > 1:
        return None
    other = call.shape(call.inputs[1 - index])
    return found if found.ndim == 0 or (other is not None and len(other) >= 1) else None


#: numpy dtype -> torch dtype.
TORCH_TYPES = {np.dtype(numpy_type): dtype for dtype, (_, numpy_type) in ELEMENT_TYPES.items()}


def _build_from_onnx(kind: str, call: OnnxCall) -> Built:
    if len(call.inputs) == 2:
        for index in (1, 0):
            scalar = _scalar(call, index)
            if scalar is not None and scalar.dtype in TORCH_TYPES and call.constant(1 - index) is None:
                dtype = TORCH_TYPES[scalar.dtype]
                op = Elementwise(
                    kind,
                    scalar=scalar.reshape(()).item(),
                    scalar_first=index == 0,
                    # Pow alone lets its operands differ in type.
                    dtypes=(dtype,),
                    computes_in=dtype,
                    from_onnx=True,
                )
                return Built(op, (call.inputs[1 - index],))
    return Built(Elementwise(kind, from_onnx=True), call.inputs)


def _register_onnx(kind: str, *op_types: str) -> None:
    def build(call: OnnxCall) -> Built:
        return _build_from_onnx(kind, call)

    for op_type in op_types:
        ONNX.add(op_type, build)


for _kind in ("Sub", "Mul", "Div", "Pow", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
    _register_onnx(_kind, _kind)
for _kind in ("Max", "Min", "And", "Or", "Xor"):
    _register_onnx(_kind, _kind)
_register_onnx("Add", "Add", "Sum")


@ONNX.register("Mod")
def _mod_from_onnx(call: OnnxCall) -> Built:
    return _build_from_onnx("FMod" if call.attribute("fmod", 0) else "Mod", call)


class Mean(Op):
    """The mean of any number of tensors, element by element."""

    kind = "Mean"

    def forward(self, *xs: Tensor) -> Tensor:
        return reduce(torch.add, xs) / len(xs)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Mean", inputs, self.outputs)


@ONNX.register("Mean")
def _mean_from_onnx(call: OnnxCall) -> Built:
    return Built(Mean(), call.inputs)
