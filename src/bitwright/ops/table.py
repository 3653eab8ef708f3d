"""Operators that are looked up in a table of integers, as the chip does it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitwright.errors import PlanError
from bitwright.graph.graph import Graph
from bitwright.graph.op import Emitter, Op, TensorFunction
from bitwright.numerics.affine import dequantize, quantize
from bitwright.numerics.lut import LookupTable, TableSettings, build_table
from bitwright.numerics.spec import QParams
from bitwright.ops.segment_lut import SegmentLUT

#: How often each input code is read, `[256]` or `[65536]`.
Weights = npt.NDArray[np.float64]

#: Names of tables whose kind does not say the function.
_NAMES = {"Div": "reciprocal", "SegmentLUT": "lut"}


def table_name(op: Op) -> str:
    """What the table of *op* is called: `exp`, `rsqrt`, `lut` for a function of the user's."""
    return _NAMES.get(op.kind, op.kind.lower())


def table_of(
    op: Op,
    q_in: QParams,
    q_out: QParams,
    settings: TableSettings | None = None,
    *,
    weights: Weights | None = None,
) -> LookupTable:
    """The table of *op* between these codes. *settings*: None for the operator's own, else for those of the user's function.

    *weights*: as for `build_table`. *raises* `PlanError` for an operator that is no function of one number, `NumericsError`.
    """
    function, where = op.table_function(), f"operator {op.name}"
    if function is None:
        raise PlanError(
            where,
            expected="an operator that is looked up in a table",
            found=f"a {op.kind}",
            remedy="Give tables to functions of one number only: exp, log, sigmoid, …",
        )
    settings = settings or own_settings(op, q_in, q_out)
    return build_table(function, q_in, q_out, settings, weights=weights, where=where)


def own_settings(op: Op, q_in: QParams, q_out: QParams) -> TableSettings:
    """How the table of *op* is made where no plan says so: as set on the operator, as its author says, or the default."""
    if op.table_settings is not None:
        return op.table_settings
    written = op.function if isinstance(op, TableOp) else op
    if isinstance(written, SegmentLUT):
        return written.definition.settings_for(q_in, q_out, f"operator {op.name}")
    return TableSettings()


class _Straight(torch.autograd.Function):
    """What was looked up, with the gradient of the exact function where that is within the *limits* of the output."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, looked_up: Tensor, limits: tuple[float, float]) -> Tensor:
        ctx.save_for_backward((exact >= limits[0]) & (exact <= limits[1]))
        return looked_up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class TableSource(Protocol):
    """What keeps a table up to date where ranges may change."""

    def current(self, table: LookupTable) -> LookupTable | None:
        """*table*, or another that serves now; None where the operator is float for the time being."""


class TableLookup(nn.Module):
    """The table of an operator: real numbers in, quantized, looked up, and out as real numbers.

    *quantized_forward*: False puts the operator back to its float function. *weights*: what the table was made for.
    """

    def __init__(
        self, table: LookupTable, weights: Weights | None = None, source: TableSource | None = None
    ) -> None:
        super().__init__()
        self.table, self.weights, self.source = table, weights, source
        self.quantized_forward = True

    def is_used(self) -> bool:
        """Whether to look up, in a table that fits."""
        current = self.table if self.source is None else self.source.current(self.table)
        self.table = current or self.table
        return self.quantized_forward and current is not None

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize(x.detach().float(), self.table.q_in).to(torch.int32)
        return dequantize(self.table.lookup(codes), self.table.q_out).to(x.dtype)

    def extra_repr(self) -> str:
        names = [q.spec.dtype.name for q in (self.table.q_in, self.table.q_out)]
        state = "" if self.quantized_forward else ", put back to float"
        return f"{type(self.table).__name__}, {names[0]} to {names[1]}{state}"


class TableOp(Op):
    """An operator computed by a table, with a straight-through gradient. The table is the submodule called as `table_name` says.

    It stands where the operator stood, and holds what was stored there. In files it is the float function.
    """

    def __init__(self, op: Op, lookup: TableLookup) -> None:
        super().__init__()
        self.__dict__.update(kind=op.kind, roles=op.roles, passthrough=op.passthrough, function=op)
        self.name, self.outputs, self.composite = op.name, op.outputs, op.composite
        self.training = op.training
        for held in ("_parameters", "_buffers", "_modules"):
            vars(self)[held].update(vars(op)[held])
        self._non_persistent_buffers_set.update(op._non_persistent_buffers_set)
        leaf = table_name(op)
        while hasattr(self, leaf):
            leaf += "_"
        self.table_path = leaf
        self.add_module(leaf, lookup)

    #: The operator that the table stands for.
    function: Op

    @property
    def lookup(self) -> TableLookup:
        """The module that holds the table."""
        found = self.get_submodule(self.table_path)
        assert isinstance(found, TableLookup)
        return found

    @property
    def table(self) -> LookupTable:
        """The table."""
        return self.lookup.table

    @property
    def quantized_forward(self) -> bool:
        """Whether the table is used, or the float function; one switch with the table's own."""
        return self.lookup.quantized_forward

    @quantized_forward.setter
    def quantized_forward(self, value: bool) -> None:
        self.lookup.quantized_forward = value

    @property
    def table_settings(self) -> TableSettings | None:  # type: ignore[override]
        """How the table is made; setting it makes the table anew, for the same codes and inputs."""
        return self.function.table_settings

    @table_settings.setter
    def table_settings(self, settings: TableSettings | None) -> None:
        made = table_of(
            self.function, self.table.q_in, self.table.q_out, settings, weights=self.lookup.weights
        )
        self.function.table_settings = settings
        self.lookup.table = made

    def forward(self, *xs: Tensor) -> Tensor:
        if not self.lookup.is_used():
            exact: Tensor = self.function(*xs)
            return exact
        found: Tensor = self.lookup(xs[0])
        if torch.is_grad_enabled() and xs[0].requires_grad:
            q = self.table.q_out
            margin = q.scale[0] / 2  # what rounds to an end is not beyond it
            limits = (q.limits[0] - margin, q.limits[1] + margin)
            found = _Straight.apply(self.function(*xs), found, limits)  # type: ignore[no-untyped-call]
        return found

    def table_function(self) -> TensorFunction | None:
        return self.function.table_function()

    def output_range(self) -> tuple[float, float] | None:
        return self.function.output_range()

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        self.function.to_onnx(emit, inputs)

    def describe(self) -> str:
        return self.function.describe()


def with_tables(graph: Graph, tables: Mapping[str, LookupTable]) -> Graph:
    """A copy of *graph* in which the operators named in *tables* look their results up.

    *raises* `UnknownName` for a name that is no operator.
    """
    looked_up = copy.deepcopy(graph)
    for name, table in tables.items():
        op = looked_up.op(name)
        if isinstance(op, TableOp):
            op.lookup.table = table
        else:
            replace_operator(looked_up, str(looked_up.op_node(name).target), TableOp(op, TableLookup(table)))
    looked_up.refresh()
    return looked_up


def replace_operator(root: nn.Module, path: str, op: Op) -> None:
    """Put *op* at *path* of *root*."""
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = op


def without_tables(graph: Graph) -> Graph:
    """A copy of *graph* in which every operator computes its float function."""
    exact = copy.deepcopy(graph)
    for op in list(exact.ops):
        if isinstance(op, TableOp):
            replace_operator(exact, str(exact.op_node(op.name).target), op.function)
    exact.refresh()
    return exact
