"""`Lowering`: one integer model while it is written, and what the lowering of an operator may ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.exporters.integer.number import Carrier, Integer, codes_of, same_parameters
from bitwright.exporters.integer.writer import IntegerWriter
from bitwright.exporters.writer import to_numpy
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op, Shape
from bitwright.numerics.affine import quantize
from bitwright.numerics.fixed_point import Reals
from bitwright.numerics.lut import LookupTable
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import Target
from bitwright.registry import Registry


@dataclass(frozen=True)
class Accumulator:
    """The proof that the sums of an operator fit: no magnitude exceeds *peak*, below 2^*bits*; *products*: how many matrix products
    (byte by byte) make one."""

    op: str
    kind: str
    peak: int
    bits: int
    products: int


#: Writes one operator as integer nodes. *raises* `BitwrightError` if it cannot; what it has written is taken back then.
Lower = Callable[["Lowering", Op], None]
LOWERINGS: Registry[Lower] = Registry("integer lowering")
#: The name in place of a kind under which all look-up tables are lowered.
TABLE = "<table>"


class Lowering:
    """State of one export: which values exist as codes, in an accumulator, as real numbers, and under which names."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, tables: Mapping[str, LookupTable]) -> None:
        self.graph, self.plan, self.target, self.tables = graph, plan, target, tables
        self.reads = quantized_reads(graph, plan)
        self.writer = IntegerWriter(graph)
        self.codes: dict[str, Integer] = {}
        self.inner: dict[str, Integer] = {}
        self.real: set[str] = {v.name for v in graph.values.values() if v.producer is None}
        #: Quantized copies, as real numbers, of values that are also there unquantized.
        self.copies: dict[str, str] = {}
        self.islands: dict[str, str] = {}
        self.accumulators: list[Accumulator] = []
        self.numbers: dict[tuple[str, str, Shape, bytes], str] = {}

    # --- what a lowering may ask -----------------------------------------------------------------------------

    def integer(self, op: Op, index: int) -> Integer:
        """Input *index* as integers: codes, or an accumulator of the same group. *raises* `ModelError` if it is neither."""
        name = self._name(op, index)
        if name in self.inner:
            return self.inner[name]
        q = self.reads.get((name, op.name))
        if q is None or q.spec.axis is not None:
            raise self.refusal(op, f"an input that is quantized, one scale for all ({name})")
        if self.graph.value(name).is_constant:
            return self.constant_codes(quantize(self.graph.constant(name).detach(), q), q)
        return self.codes[name]

    def operand(self, op: Op, index: int, most: int) -> Integer | Reals:
        """As `integer`; a constant of at most *most* elements, or one that *op* reads unquantized, as real numbers."""
        name = self._name(op, index)
        quantized = (name, op.name) in self.reads
        if not self.graph.value(name).is_constant or (quantized and self.graph.constant(name).numel() > most):
            return self.integer(op, index)
        return self.real_constant(op, index)

    def real_constant(self, op: Op, index: int) -> Reals:
        """The numbers of constant input *index* as *op* reads them, float64."""
        name = self._name(op, index)
        if not self.graph.value(name).is_constant:
            raise self.refusal(op, f"a constant as input {index}")
        q = self.reads.get((name, op.name))
        x = self.graph.constant(name).detach()
        if q is None:
            return to_numpy(x).astype(np.float64)
        scale, zero = (to_numpy(t).astype(np.float64) for t in (q.scale_tensor(x), q.zero_point_tensor(x)))
        # NumPy makes arithmetic of arrays without axes a number, which is no array.
        return np.asarray((to_numpy(quantize(x, q)).astype(np.float64) - zero) * scale)

    def constant_codes(self, codes: Tensor, q: QParams) -> Integer:
        """Stored *codes* under *q*."""
        found = codes_of("", q)
        return replace(found, name=self.constant(to_numpy(codes).astype(found.carrier)))

    def weight(self, op: Op, index: int) -> tuple[npt.NDArray[Any], Reals]:
        """Codes of constant weight *index* and their scales, shaped to broadcast against them. *raises* `ModelError` for others."""
        name = self._name(op, index)
        q = self.reads.get((name, op.name))
        if not self.graph.value(name).is_constant or q is None or q.spec.group or any(q.zero_point):
            raise self.refusal(op, "a constant weight, symmetric, with scales per tensor or channel")
        w = self.graph.constant(name).detach()
        return to_numpy(quantize(w, q)), to_numpy(q.scale_tensor(w)).astype(np.float64)

    def side(self, op: Op, index: int) -> str:
        """Input *index* as it is: indices, conditions."""
        return self.as_real(self._name(op, index))

    def is_constant(self, op: Op, index: int) -> bool:
        """Whether input *index* is a constant."""
        name = self.graph.op_inputs(op.name)[index]
        return name is not None and self.graph.value(name).is_constant

    def is_real(self, name: str) -> bool:
        """Whether the value *name* holds real numbers."""
        return self.graph.value(name).info.is_float

    def has_input(self, op: Op, index: int) -> bool:
        """Whether *op* has an input at *index*."""
        names = self.graph.op_inputs(op.name)
        return index < len(names) and names[index] is not None

    def shape_of(self, op: Op, index: int = 0) -> Shape:
        """The shape of input *index* at capture."""
        shape = self.graph.value(self._name(op, index)).info.shape
        if shape is None:
            raise self.refusal(op, "an input of known shape")
        return shape

    def fixed_lengths(self, op: Op, axes: Sequence[int]) -> list[int]:
        """Lengths of the first input along *axes*. *raises* `ModelError` if the batch is among them."""
        info, shape = self.graph.value(self._name(op, 0)).info, self.shape_of(op)
        if self.graph.info.dynamic_batch and info.batch_axis in axes:
            raise self.refusal(op, "axes of fixed length")
        return [shape[a] for a in axes]

    def output_q(self, op: Op) -> QParams:
        """Parameters of the codes that the group of *op* ends in."""
        name = op.outputs[0]
        while (q := self.plan.qparams(name)) is None:
            readers = self.graph.value(name).readers
            if name in self.plan.values or len(readers) != 1:
                raise self.refusal(op, "an output that is quantized")
            name = self.graph.op(readers[0].op).outputs[0]
        return q

    def refusal(self, op: Op, expected: str) -> ModelError:
        """The error that makes *op* a float island."""
        return ModelError(
            f"operator {op.name} ({op.kind})",
            expected=expected,
            found="none",
            remedy="It stays float in the integer model.",
        )

    def node(self, op_type: str, *inputs: str | None, **attributes: Any) -> str:
        """Append a node with one result; returns its name."""
        result = self.writer.temporary(op_type.lower())
        self.writer.node(op_type, inputs, [result], **attributes)
        return result

    def write_itself(self, op: Op, integers: Mapping[int, str]) -> list[str]:
        """Let *op* write itself with *integers* as those inputs. *returns*: names of its outputs ("" for absent ones).

        Outputs that are no real numbers (places of maxima) have their own names then.
        """
        inputs = self.writer.call_inputs(op)
        for i, name in integers.items():
            self.writer.aliases.setdefault(name, str(inputs[i]))
        sources = [integers.get(i) or self._side(name) for i, name in enumerate(inputs)]
        clone = copy.copy(op)
        clone.outputs = tuple(self._moved(o) if o else "" for o in op.outputs)
        clone.to_onnx(self.writer, sources)
        self.real |= set(clone.outputs) & set(self.graph.values)
        return list(clone.outputs)

    def _side(self, name: str | None) -> str | None:
        return self.as_real(name) if name in self.graph.values else name

    def _moved(self, output: str) -> str:
        held = self.graph.values.get(output)
        return output if held is not None and not held.info.is_float else self.writer.temporary("moved")

    def constant(self, array: npt.NDArray[Any], role: str = "x") -> str:
        """A stored constant's name; *role*: what functions that read it call it. Single numbers are stored once for the whole model."""
        if array.size != 1:
            return self._named(self.writer.constant(array, "constant"), role)
        key = (role, array.dtype.name, array.shape, array.tobytes())
        if key not in self.numbers:
            self.numbers[key] = self._named(self.writer.constant(array, "constant"), role)
        return self.numbers[key]

    def literal(self, value: int | list[int], to: str = "int32") -> str:
        """A number, or a list of one, that belongs to the arithmetic itself: functions hold it."""
        name = self.constant(np.array(value, to), "")
        self.writer.literals[name] = np.array(value, to)
        return name

    def _named(self, name: str, role: str) -> str:
        self.writer.roles[name] = role
        return name

    def function(self, name: str) -> AbstractContextManager[None]:
        """What is written meanwhile becomes one call of the function *name* (`functions.MEANING`)."""
        return self.writer.function(name)

    def cast(self, name: str, carrier: Carrier | str) -> str:
        """*name* as integers of another type."""
        return self.node("Cast", name, to=TensorProto.DataType.Value(carrier.upper()))

    def prove(self, op: Op, peak: int, bits: int, products: int) -> None:
        """Record that sums of *op* fit into *bits* (the sign included). *raises* `ModelError` if they do not."""
        if peak >= 1 << (bits - 1):
            raise ModelError(
                f"operator {op.name} ({op.kind})",
                expected=f"sums that provably fit into {bits} bits",
                found=f"magnitudes up to {peak}",
                remedy="It stays float in the integer model.",
            )
        self.accumulators.append(Accumulator(op.name, op.kind, peak, bits, products))

    def finish(self, op: Op, result: Integer, index: int = 0) -> None:
        """*result* is output *index* of *op*: codes as they should be, or what stays in the accumulator."""
        value = op.outputs[index]
        q = self.plan.qparams(value)
        if q is None:
            if value in self.plan.values:
                raise self.refusal(op, f"parameters of its output {value}")
            self.inner[value] = result
            return
        assert result.q is not None
        assert same_parameters(result.q, q)
        name = self.writer.mark(result.name, value)
        self.codes[value] = replace(result, q=q, name=name)

    def _name(self, op: Op, index: int) -> str:
        names = self.graph.op_inputs(op.name)
        name = names[index] if index < len(names) else None
        if name is None:
            raise self.refusal(op, f"an input {index}")
        return name

    # --- real numbers ------------------------------------------------------------------------------------------

    def as_real(self, name: str) -> str:
        """*name* as real numbers, under its own name."""
        if name in self.real:
            return name
        self.real.add(name)
        if name in self.inner:
            x = self.inner[name]
            steps = self.node("Cast", x.name, to=TensorProto.FLOAT)
            steps = self.node("Sub", steps, self.constant(x.zero.astype(np.float32)))
            self.writer.node("Mul", [steps, self.constant(x.scale.astype(np.float32))], [name])
            return name
        codes = self.codes[name]
        assert codes.q is not None
        return self.dequantized(self.stored(codes), codes.q, result=name)

    def stored(self, codes: Integer) -> str:
        """Codes in the type that DequantizeLinear knows."""
        assert codes.q is not None
        return self.cast(codes.name, codes.q.spec.dtype.name) if codes.carrier == "int32" else codes.name

    def dequantized(
        self, codes: str, q: QParams, shape: Sequence[int] = (), *, result: str | None = None
    ) -> str:
        """*codes* (of *shape*, where scales are by channel or group) as real numbers."""
        made = result or self.writer.temporary("dequantized")
        axis: dict[str, Any] = {} if q.spec.axis is None else {"axis": q.spec.axis}
        scale, zero = np.array(q.scale, np.float32), np.array(q.zero_point).astype(onnx_type(q))
        if q.spec.axis is None:
            scale, zero = scale.reshape(()), zero.reshape(())
        elif q.spec.group:
            scale, zero = (a.reshape(shape[q.spec.axis], -1) for a in (scale, zero))
            scale, zero = (scale, zero) if q.spec.axis == 0 else (scale.T, zero.T)
            axis = {"axis": 1 - q.spec.axis, "block_size": q.spec.group}
        self.writer.node(
            "DequantizeLinear", [codes, self.constant(scale), self.constant(zero)], [made], **axis
        )
        return made


def onnx_type(q: QParams) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(q.spec.dtype.name.upper()))
