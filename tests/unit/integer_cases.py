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
from bitwright.flow.tables import build_tables
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture
from bitwright.ops.table import with_tables
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision, load_target
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
