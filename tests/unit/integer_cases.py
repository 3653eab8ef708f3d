"""What the tests of the integer model share: one operator or family lowered, run, and compared with its simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.calibrate.statistics import Statistics
from bitwright.exporters.integer import IntegerModel, lower
from bitwright.exporters.integer.lowering import Lowering
from bitwright.flow.tables import build_tables
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op
from bitwright.importers.from_torch import capture
from bitwright.numerics.dtype import DType
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.ops.table import with_tables
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision, RescaleRule, load_target
from bitwright.rewrite.decompose_composites import decompose_composites
from bitwright.runtime.proof import Proof
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure


@cache
def calibrated(
    module: nn.Module, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Graph, Statistics, dict[str, Tensor]]:
    """The graph of *module*, statistics and one batch of seeded inputs of *shapes*."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    graph = decompose_composites(capture(module.eval(), inputs)).eval()
    batch = dict(zip((i.name for i in graph.info.inputs), inputs, strict=True))
    return graph, collect(graph, [batch]), batch


def lowered(
    module: nn.Module, shapes: tuple[tuple[int, ...], ...], target: str, precision: Precision
) -> tuple[Graph, Plan, IntegerModel, Proof]:
    """*module* as an integer model, and how it compares with its simulation."""
    graph, statistics, batch = calibrated(module, shapes)
    rules = load_target(target)
    plan = assign(graph, rules, asked=dict.fromkeys(graph.op_names, precision))
    plan = Solver(graph, rules, statistics).solve(plan)
    tables = build_tables(graph, plan, statistics)
    model = lower(graph, plan, rules, tables)
    onnx.checker.check_model(model.model)
    proof = measure(with_tables(graph, tables), plan, model.model, [batch])
    return graph, plan, model, proof


def run_alone(model: onnx.ModelProto, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
    """What *model* computes as *name*."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.add(name=name)
    return Session(made, optimisation="disabled").run(inputs)[name]


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() + x


TWICE = _Twice()


def bare(form: str = "float", bits: int = 31) -> tuple[Lowering, Op]:
    """A lowering to write single nodes with."""
    graph, statistics, _ = calibrated(TWICE, ((2, 3),))
    target = load_target("generic-int8").model_copy(
        update={"rescale": RescaleRule(form=form, multiplier_bits=bits)}
    )
    plan = Solver(graph, target, statistics).solve(assign(graph, target))
    low = Lowering(graph, plan, target, {})
    low.writer.begin_edge("test")
    return low, next(iter(graph.ops))


def codes(dtype: DType, scale: float, zero: int = 0, rounding: Rounding = Rounding.HALF_EVEN) -> QParams:
    """Parameters of one scale, a float32 number as files carry it."""
    return QParams(QuantSpec(dtype, zero == 0, None, rounding), (float(np.float32(scale)),), (zero,))


def computed(low: Lowering, name: str) -> np.ndarray:  # type: ignore[type-arg]
    """What the nodes written with *low* compute as *name*."""
    return run_alone(low.writer.model(), name, {"x": np.zeros((2, 3), np.float32)})
