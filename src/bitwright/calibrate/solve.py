"""From a plan without parameters and the statistics to a plan with them. Never touches the calibration data.

Everything is cached by what it depends on, so that solving a plan which differs from an earlier one in a few methods or
precisions costs a few look-ups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.calibrate.biases import bias_entry
from bitwright.calibrate.observers import parse_method
from bitwright.calibrate.statistics import Statistics, ValueStatistics
from bitwright.errors import DataError
from bitwright.graph.graph import Graph, Reader, Value
from bitwright.graph.op import Role
from bitwright.numerics.affine import THRESHOLD_FLOOR, qparams_from_range
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.plan import OpEntry, Plan, ValueEntry
from bitwright.plan.reads import masked_groups, width
from bitwright.plan.target import Precision, Target

#: A shift-only target lowers its shift while more than this share of the biases overflow (docs/numerics.md §5.3).
BIAS_OVERFLOW_SHARE = 0.03
#: Inner values of a softmax reach so many times as far as calibration saw.
HEADROOM = 4.0
_SOFTMAXES = ("Softmax", "LogSoftmax")


class Solver:
    """Solves plans for one graph, target and set of statistics."""

    def __init__(self, graph: Graph, target: Target, statistics: Statistics) -> None:
        self.graph, self.target, self.statistics = graph, target, statistics
        self._infinite = statistics.infinite | {
            v.name for v in graph.values.values() if v.is_constant and _holds_infinity(graph.constant(v.name))
        }
        self._activations: dict[tuple[str, str, Precision], QParams] = {}
        self._constants: dict[tuple[str, QuantSpec], QParams] = {}

    def solve(self, plan: Plan) -> Plan:
        """*plan* with parameters for every value that something quantizes.

        Operators that the target's rules force to float are float in the result, with the reason; then the rest is
        solved again, until nothing changes. *raises* `DataError` if a value was never calibrated.
        """
        while True:
            values = self._activation_entries(plan)
            refused = masked_groups(self.graph, plan, self._infinite)
            values, unfit = self._weight_entries(plan, values)
            refused.update(unfit)
            if not refused:
                return replace(plan, values=values)
            for group, why in refused.items():
                plan = plan.with_precision([group], "float", why)

    # --- activations -----------------------------------------------------------------------------------------

    def _activation_entries(self, plan: Plan) -> dict[str, ValueEntry]:
        values: dict[str, ValueEntry] = {}
        for name, entry in plan.values.items():
            q: QParams | None = None
            if name in self._infinite:
                values[name] = replace(
                    entry, qparams=None, why="holds infinity (a mask), which no code stands for"
                )
                continue
            if entry.role == "activation" and entry.same_as is not None:
                source = values.get(entry.same_as)
                q = None if source is None else source.qparams
            if q is None and entry.role == "activation":
                q = self.activation(name, entry.method, width(self.graph, plan, name))
            elif entry.role == "constant":
                q = self._constant(name, width(self.graph, plan, name))
            values[name] = replace(entry, qparams=q)
        return values

    def activation(self, name: str, method: str, precision: Precision) -> QParams:
        """Parameters of activation *name* by threshold *method*."""
        key = (name, method, precision)
        if key not in self._activations:
            if name not in self.statistics:
                raise DataError(
                    f"value {name}",
                    expected="calibration statistics",
                    found="none",
                    remedy="Calibrate again with this model.",
                )
            seen = self.statistics[name]
            spec = self.target.activation_spec(precision, nonnegative=seen.lo >= 0)
            low, high = self._inside_softmax(name, seen) or parse_method(method).range(seen, spec)
            self._activations[key] = qparams_from_range(spec, [low], [high])
        return self._activations[key]

    def _inside_softmax(self, name: str, seen: ValueStatistics) -> tuple[float, float] | None:
        """The range of an inner value of a softmax (docs/tables.md): sixteen bits have room to spare, and scores that are further apart
        than calibration saw must not saturate. None for other values."""
        producer = self.graph.value(name).producer
        op = None if producer is None else self.graph.op(producer)
        if op is None or op.composite is None or not op.is_inner or op.composite.kind not in _SOFTMAXES:
            return None
        low, high = HEADROOM * seen.lo, HEADROOM * seen.hi
        return (low, min(high, 1.0)) if op.kind in ("Exp", "Reciprocal") else (low, high)

    def _constant(self, name: str, precision: Precision) -> QParams:
        x = self.graph.constant(name)
        low, high = _extremes(name, x)
        return self._cached(name, self.target.activation_spec(precision, nonnegative=low >= 0), [low], [high])

    def _cached(self, name: str, spec: QuantSpec, low: Sequence[float], high: Sequence[float]) -> QParams:
        key = (name, spec)
        if key not in self._constants:
            self._constants[key] = qparams_from_range(spec, low, high)
        return self._constants[key]

    # --- weights and biases ----------------------------------------------------------------------------------

    def _weight_entries(
        self, plan: Plan, values: Mapping[str, ValueEntry]
    ) -> tuple[dict[str, ValueEntry], dict[str, str]]:
        """Entries with weights and biases solved, and the groups that must become float: group -> reason."""
        solved, refused = dict(values), dict[str, str]()
        for name, entry in values.items():
            if entry.role != "weight":
                continue
            value = self.graph.value(name)
            readers = [r for r in value.readers if r.role is Role.WEIGHT and _quantized(plan.ops[r.op])]
            if not readers:
                solved[name] = replace(entry, qparams=None, why="only float operators read it")
            elif self.target.rescale.form == "shift":
                q, why = self._shifted_weight(values, value, readers[0], alone=len(readers) == 1)
                solved[name] = replace(entry, qparams=q, why=why)
                if q is None:
                    refused.update({plan.ops[r.op].group: why for r in readers})
            else:
                precisions = {plan.ops[r.op].precision for r in readers}
                narrow: Precision = "w4a8" if precisions == {"w4a8"} else "int8"
                why = "int8, as one of the operators that read it" if precisions > {"w4a8"} else ""
                solved[name] = replace(entry, qparams=self._weight(value, readers, narrow), why=why)
        for name, entry in values.items():
            if entry.role == "bias":
                solved[name] = bias_entry(self.graph, self.target, plan, solved, name)
        return solved, refused

    def _weight(self, value: Value, readers: Sequence[Reader], precision: Precision) -> QParams:
        x = self.graph.constant(value.name)
        axes = {self.graph.op(r.op).weight_axis(r.index, x.dim()) for r in readers}
        # Scales along an axis that an operator sums over could not be taken out of its accumulator.
        spec = self.target.weight_spec(axes.pop() if len(axes) == 1 else None, precision)
        if (value.name, spec) in self._constants:
            return self._constants[(value.name, spec)]
        top = _channel_peaks(value.name, x, spec.axis)
        return self._cached(value.name, spec, [-t for t in top], top)

    def _shifted_weight(
        self, values: Mapping[str, ValueEntry], value: Value, reader: Reader, *, alone: bool
    ) -> tuple[QParams | None, str]:
        """Weight scale s_out * 2^-r / s_in with the largest r that fits (docs/numerics.md §5.3), or None and why not."""
        if not alone:
            return (
                None,
                f"{self.target.name}: weight {value.name} is shared, but its scale depends on the operator",
            )
        inputs = self.graph.op_inputs(reader.op)
        source = values.get(inputs[0] or "")
        result = values.get(self._group_output(values, reader.op) or "")
        if source is None or source.qparams is None or result is None or result.qparams is None:
            return None, f"{self.target.name}: no output scale that a shift could lead to"
        ratio = result.qparams.scale[0] / source.qparams.scale[0]
        peak = max(_channel_peaks(value.name, self.graph.constant(value.name), None)[0], THRESHOLD_FLOOR)
        r = math.floor(math.log2(127 * ratio / peak))
        bias = self._bias_of(reader.op, inputs)
        while (
            r >= 0
            and bias is not None
            and _overflow_share(bias, result.qparams.scale[0] * 2.0**-r) > BIAS_OVERFLOW_SHARE
        ):
            r -= 1
        if r < 0:
            return None, f"{self.target.name}: the weight would need a left shift by {-r}"
        spec = self.target.weight_spec(None)
        return QParams(spec, (ratio * 2.0**-r,), (0,)), f"shift {r}"

    def _bias_of(self, op: str, inputs: Sequence[str | None]) -> Tensor | None:
        for i, name in enumerate(inputs):
            if (
                name is not None
                and self.graph.op(op).role(i) is Role.BIAS
                and self.graph.value(name).is_constant
            ):
                return self.graph.constant(name)
        return None

    def _group_output(self, values: Mapping[str, ValueEntry], op: str) -> str | None:
        """The first value at or after *op*'s output that has an entry: where its accumulator is rescaled."""
        name = self.graph.op(op).outputs[0]
        while name not in values:
            readers = self.graph.value(name).readers
            if len(readers) != 1:
                return None
            name = self.graph.op(readers[0].op).outputs[0]
        return name


def _quantized(entry: OpEntry) -> bool:
    return entry.precision != "float"


def _holds_infinity(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.isinf().any())


def _overflow_share(bias: Tensor, scale: float) -> float:
    """The share of *bias* that exceeds int16 at *scale*."""
    return float((bias.detach().abs() / scale > 32767).float().mean())


def _extremes(name: str, x: Tensor) -> tuple[float, float]:
    x = x.detach()
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise DataError(
            f"constant {name}",
            expected="finite numbers",
            found="NaN, infinity or nothing",
            remedy="Check the model's weights.",
        )
    return float(x.min()), float(x.max())


def _channel_peaks(name: str, x: Tensor, axis: int | None) -> list[float]:
    """Largest magnitude of each channel of *axis* (or of everything)."""
    _extremes(name, x)
    magnitude = x.detach().abs()
    if axis is None:
        return [float(magnitude.max())]
    peaks: list[float] = magnitude.movedim(axis, 0).flatten(1).amax(1).tolist()
    return peaks
