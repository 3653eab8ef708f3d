"""The table operators of a prepared model in fixed point, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn

from bitwright.errors import ModelError, PlanError, UnknownName
from bitwright.graph.op import Op
from bitwright.numerics.lut import LookupTable, TableSettings
from bitwright.numerics.spec import QParams
from bitwright.ops.table import TableLookup, TableOp, Weights, table_name, table_of
from bitwright.plan.qconfig import is_inside
from bitwright.plan.reads import is_quantized
from bitwright.train.fake_quants import Quantizer
from bitwright.train.prepared import PreparedModel


def convert_segment_lut(model: nn.Module, settings: Mapping[str, TableSettings] | None = None) -> list[str]:
    """Compute every table operator of *model* in fixed point, as the chip does, in place. *returns*: their module paths.

    *model*: calibrated; prepared, or with prepared parts. *settings*: of single operators, by path; otherwise those of the operator
    (`table_settings`), of the plan, or the default. Gradients are those of the float functions. Tables follow ranges that change later,
    and are used where values are quantized (states QAT and VALIDATION). *raises* `PlanError` naming an operator whose input
    was never calibrated, `UnknownName`, `NumericsError` for a table that cannot be.
    """
    found = list(_operators(model))
    paths = [path for path, *_ in found]
    for name in settings or {}:
        if name not in paths:
            raise UnknownName("convert_segment_lut", kind="table operator", name=name, known=paths)
    for path, prepared, target, op, source in found:
        wish = (settings or {}).get(path) or op.table_settings or prepared.facts.plan.ops[op.name].table
        exact = op.function if isinstance(op, TableOp) else op
        exact.table_settings = wish
        follower = _Ranges(exact, *_quantizers(prepared, op, path, source))
        lookup = TableLookup(follower.table(), follower.weights(), follower)
        if isinstance(op, TableOp):
            op.add_module(op.table_path, lookup)
        else:
            prepared.put_operator(target, TableOp(op, lookup))
    return paths


def set_quantized_forward(
    model: nn.Module, quantized: bool, name: str | None = None, *, kind: str | None = None
) -> list[str]:
    """Put tables of a converted *model* back to float, or in use again. *returns*: the operators' paths.

    *name*: an operator, its table, or a module with some inside; *kind*: `exp`, `rsqrt`, …: all tables of that function; both: what
    fits both; neither: all. *raises* `UnknownName` if nothing fits, `ModelError` if no table was ever converted.
    """
    tables = {path: m for path, m in model.named_modules() if isinstance(m, TableOp)}
    if not tables:
        raise ModelError(
            "set_quantized_forward",
            expected="a model with tables",
            found="none",
            remedy="Call convert_segment_lut(model) first.",
        )
    kinds = {path: table_name(m.function) for path, m in tables.items()}
    if kind is not None and kind not in kinds.values():
        raise UnknownName("set_quantized_forward", kind="kind of table", name=kind, known={*kinds.values()})
    fitting = [p for p, m in tables.items() if name is None or _fits(p, m, name)]
    if not fitting:
        raise UnknownName("set_quantized_forward", kind="table operator", name=str(name), known=tables)
    chosen = [p for p in fitting if kind is None or kinds[p] == kind]
    if not chosen:
        inside = {kinds[p] for p in fitting}
        raise UnknownName(
            f"set_quantized_forward in {name}", kind="kind of table", name=str(kind), known=inside
        )
    for path in chosen:
        tables[path].quantized_forward = quantized
    return chosen


def _fits(path: str, op: TableOp, name: str) -> bool:
    return is_inside(path, name) or name == f"{path}.{op.table_path}"


def _operators(model: nn.Module) -> Iterator[tuple[str, PreparedModel, str, Op, str]]:
    """Path in *model*, prepared model, path in that, module, and the value it reads, of every quantized table operator."""
    parts = [(path, m) for path, m in model.named_modules() if isinstance(m, PreparedModel)]
    if not parts:
        raise ModelError(
            f"convert_segment_lut({type(model).__name__})",
            expected="a model that prepare() returned",
            found="a float model",
            remedy="Call bitwright.prepare(model, example_inputs) first, and calibrate.",
        )
    for path, prepared in parts:
        plan, graph = prepared.facts.plan, prepared.float_graph()
        for kind, _, target, *_ in prepared.facts.operators:
            if kind != "call_module":
                continue
            op = prepared.get_submodule(str(target))
            assert isinstance(op, Op)
            known = op.name in plan.ops and is_quantized(plan, op.name)
            if known and op.table_function() is not None:
                source = graph.op_inputs(op.name)[0]
                assert source is not None
                yield f"{path}.{target}" if path else str(target), prepared, str(target), op, source


def _quantizers(prepared: PreparedModel, op: Op, path: str, source: str) -> tuple[Quantizer, Quantizer]:
    """What quantizes the operator's input *source*, and its output. *raises* `PlanError` if one is not there or never saw anything."""
    found = []
    for what, value in (("input", source), ("output", op.outputs[0])):
        quantizer = prepared.quantizer_of(value)
        if quantizer is None or not quantizer.has_range:
            raise PlanError(
                f"operator {path}",
                expected=f"a calibrated {what}",
                found=f"that its {what} {value} was never calibrated",
                remedy="Run some batches in state CALIBRATION or QAT, or load_observer_params, before converting.",
            )
        found.append(quantizer)
    return found[0], found[1]


class _Ranges:
    """Keeps the table of *op* up to date with the quantizers of what it *reads* and *makes*."""

    def __init__(self, op: Op, reads: Quantizer, makes: Quantizer) -> None:
        self.op, self.reads, self.makes = op, reads, makes
        self._stamp: tuple[object, ...] = ()

    def current(self, table: LookupTable) -> LookupTable | None:
        """The table for the ranges as they are; None in states that leave values float."""
        if not self.makes.state.quantizes:
            return None
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._stamp = stamp
            if (table.q_in, table.q_out) != self._qparams():
                return self.table()
        return table

    def table(self) -> LookupTable:
        """The table for the ranges as they are."""
        return table_of(self.op, *self._qparams(), weights=self.weights())

    def weights(self) -> Weights:
        """1 for every input code in the calibrated range, `[n]`."""
        q, observer = self.reads.qparams(), self.reads.observer
        d = q.spec.dtype
        x = (np.arange(d.qmin, d.qmax + 1) - q.zero_point[0]) * q.scale[0]
        lo, hi = float(observer.lo.min()) - q.scale[0] / 2, float(observer.hi.max()) + q.scale[0] / 2
        return ((x >= lo) & (x <= hi)).astype(np.float64)

    def _qparams(self) -> tuple[QParams, QParams]:
        return self.reads.qparams(), self.makes.qparams()

    def _stamp_now(self) -> tuple[object, ...]:
        """Changes with every write to a range or scale. Looking at the numbers themselves would wait for the GPU."""
        tensors = [t for q in (self.reads, self.makes) for t in (*q.parameters(), *q.buffers())]
        return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)
