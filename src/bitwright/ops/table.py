"""Operators that are looked up in a table of integers, as the chip does it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

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
    weights: npt.NDArray[np.float64] | None = None,
) -> LookupTable:
    """The table of *op* between these codes. *settings*: None for those of the user's function, else the default.

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
    written = op.function if isinstance(op, TableOp) else op
    if settings is None and isinstance(written, SegmentLUT):
        settings = written.definition.settings_for(q_in, q_out, where)
    return build_table(function, q_in, q_out, settings, weights=weights, where=where)


class _Straight(torch.autograd.Function):
    """What was looked up, with the gradient of the exact function."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, looked_up: Tensor) -> Tensor:
        return looked_up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class TableLookup(nn.Module):
    """The table of an operator: real numbers in, quantized, looked up, and out as real numbers.

    *quantized_forward*: False puts the operator back to its float function.
    """

    def __init__(self, table: LookupTable) -> None:
        super().__init__()
        self.table = table
        self.quantized_forward = True

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize(x.detach().float(), self.table.q_in).to(torch.int32)
        return dequantize(self.table.lookup(codes), self.table.q_out).to(x.dtype)

    def extra_repr(self) -> str:
        names = [q.spec.dtype.name for q in (self.table.q_in, self.table.q_out)]
        state = "" if self.quantized_forward else ", put back to float"
        return f"{type(self.table).__name__}, {names[0]} to {names[1]}{state}"


class TableOp(Op):
    """*op* computed by a table, with a straight-through gradient. The table is the submodule called as `table_name` says.

    It stands where *op* stood, and holds what was stored there. In files it is the float function.
    """

    def __init__(self, op: Op, table: LookupTable) -> None:
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
        self.add_module(leaf, TableLookup(table))

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

    def forward(self, *xs: Tensor) -> Tensor:
        if not self.quantized_forward:
            exact: Tensor = self.function(*xs)
            return exact
        found: Tensor = self.lookup(xs[0])
        if torch.is_grad_enabled() and xs[0].requires_grad:
            found = _Straight.apply(self.function(*xs), found)  # type: ignore[no-untyped-call]
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
            replace_operator(looked_up, str(looked_up.op_node(name).target), TableOp(op, table))
    looked_up.refresh()
    return looked_up


def replace_operator(root: nn.Module, path: str, op: Op) -> None:
    """Put *op* at *path* of *root*."""
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = op
