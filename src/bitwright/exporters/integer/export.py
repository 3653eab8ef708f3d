"""`export_integer`: from a graph and its solved plan to the integer model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from bitwright.exporters.integer.lowering import Accumulator, Lowering
from bitwright.exporters.integer.whole import write
from bitwright.exporters.writer import signed
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import LookupTable
from bitwright.plan.plan import Plan
from bitwright.plan.target import Target
from bitwright.table import Column, Table

#: Metadata of the model: its float islands, operator name -> reason, as JSON.
ISLANDS_KEY = "bitwright.islands"


@dataclass(frozen=True)
class IntegerModel:
    """*model* and what is known of it. *islands*: operators that stayed float -> why. *accumulators*: the proof for every sum."""

    model: onnx.ModelProto
    islands: Mapping[str, str]
    accumulators: tuple[Accumulator, ...]

    def proofs(self) -> Table:
        """One row for each sum: the largest magnitude it can reach, and what it has room for."""
        columns = (
            Column("name", "operator"),
            Column("kind", "kind"),
            Column("peak", "largest sum"),
            Column("bits", "bits"),
            Column("used", "share of the room", "%", 3),
            Column("products", "products"),
        )
        rows = tuple(
            {
                "name": a.op,
                "kind": a.kind,
                "peak": a.peak,
                "bits": a.bits,
                "used": 100 * a.peak / 2 ** (a.bits - 1),
                "products": a.products,
            }
            for a in self.accumulators
        )
        return Table("Accumulators: no sum can overflow", columns, rows)


def lower(
    graph: Graph, plan: Plan, target: Target, tables: Mapping[str, LookupTable] | None = None
) -> IntegerModel:
    """*graph* in integers. *graph*: composite operators taken apart; *plan*: solved; *tables*: operator -> its table (`build_tables`),
    without which an operator that needs one stays float.

    *raises* `ModelError` if an operator that stays float cannot be written as ONNX.
    """
    lowering = Lowering(graph, plan, target, tables or {})
    write(lowering)
    properties = {"bitwright.target": plan.target, ISLANDS_KEY: json.dumps(lowering.islands)}
    model = signed(lowering.writer.model(), properties)
    return IntegerModel(model, lowering.islands, tuple(lowering.accumulators))


def export_integer(
    graph: Graph, plan: Plan, target: Target, tables: Mapping[str, LookupTable] | None = None
) -> onnx.ModelProto:
    """As `lower`, the model alone; its metadata list the islands."""
    return lower(graph, plan, target, tables).model
