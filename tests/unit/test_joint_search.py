"""Thresholds and precisions of a whole network at once: models against the sketch, searches against brute force, true runs as judge."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from tests.networks import Block, Residual, bench, pictures, randomised, tokens
from torch import nn

from bitwright.calibrate.observers import parse_method
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.dtype import INT8
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.assign import allowed_precisions
from bitwright.plan.cost import measure_costs
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import load_target
from bitwright.search.choose import float_top, widest_top
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.interactions import explain
from bitwright.search.joint_precision import Goal, JointPrecision
from bitwright.search.optimize import Optimizer
from bitwright.search.plan_model import PlanModel
from bitwright.search.sensitivity import measure_sensitivity
from bitwright.search.thresholds import FACTORS, joint_thresholds, sketch_loss

NETWORKS = [(Residual, pictures), (Block, tokens)]
IDS = ["residual", "transformer"]
WIDE = ("w4a8", "int8", "int16", "float")


def setting(module: type[nn.Module], data, *, base: bool = False, target: str = "generic-int8"):
    evaluator, solver, plan = bench(randomised(module()), data(), target)
    sketch = ErrorSketch(evaluator, probes=8, base=quantized_reads(evaluator.graph, plan) if base else None)
    options = {
        g: list(allowed_precisions(evaluator.graph, plan, load_target(target), g)) for g in plan.groups
    }
    return evaluator, solver, plan, sketch, options


def with_precisions(solver, plan, precisions):
    for precision in WIDE:
        plan = plan.with_precision([g for g, p in precisions.items() if p == precision], precision, "")
    return solver.solve(plan)


# --- the model of plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "tolerance"), [(("int8", "float"), 1e-9), (WIDE, 0.04)])
@pytest.mark.parametrize("base", [False, True], ids=["around float", "around int8"])
@pytest.mark.parametrize(("module", "data"), NETWORKS, ids=IDS)
def test_the_model_of_any_plan_agrees_with_the_sketch_of_the_solved_plan(
    module, data, base: bool, allowed, tolerance: float
) -> None:
    """The step of a bias depends on the widths of two neighbours, of which the model knows uniform ones only: a few percent."""
    evaluator, solver, plan, sketch, options = setting(module, data, base=base, target="onnxruntime")
    assert {p for o in options.values() for p in o} == set(WIDE)
    options = {g: [p for p in o if p in allowed] for g, o in options.items()}
    model = PlanModel(sketch, plan, solver.solve, options)
    rng = np.random.default_rng(0)
    for _ in range(25):
        precisions = {g: o[rng.integers(len(o))] for g, o in options.items()}
        total = model.start(precisions)
        reads = quantized_reads(evaluator.graph, with_precisions(solver, plan, precisions))
        missing = sketch.missing([reads])
        assert all(u.qparams is not None and u.qparams.spec.dtype.bits == 32 for u in missing)
        sketch.measure(missing)
        expected = sketch.predict(reads).loss
        assert max(0.0, float(total @ total) + model.constant) == pytest.approx(expected, rel=tolerance)
        group = str(rng.choice(list(options)))
        move = {group: options[group][rng.integers(len(options[group]))]}
        moved = model.start({**precisions, **move})
        assert np.allclose(total + model.change(precisions, move), moved, atol=1e-12)


def test_losses_measured_apart_add_up_while_their_groups_are_quantized() -> None:
    _, solver, plan, sketch, options = setting(Residual, pictures)
    first, second, *_ = plan.groups
    plain = PlanModel(sketch, plan, solver.solve, options)
    model = PlanModel(sketch, plan, solver.solve, options, apart={first: 0.04, second: 0.01})
    precisions = {g: plan.precision(g) for g in plan.groups}

    def loss(m: PlanModel, p) -> float:
        v = m.start(p)
        return float(v @ v)

    assert loss(model, precisions) == pytest.approx(loss(plain, precisions) + 0.05)
    half = {**precisions, first: "float"}
    assert loss(model, half) == pytest.approx(loss(plain, half) + 0.01)
    moved = model.start(precisions) + model.change(precisions, {first: "float"})
    assert np.allclose(moved, model.start(half))


# --- the optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "data"), NETWORKS, ids=IDS)
def test_the_front_is_close_to_that_of_all_combinations(module, data) -> None:
    evaluator, solver, plan, sketch, _ = setting(module, data)
    options = {g: ["int8", "float"] for g in plan.groups}
    model = PlanModel(sketch, plan, solver.solve, options)
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "ops")
    front = Optimizer(model, costs).front(limit=len(options))

    best: dict[int, float] = {}
    for choice in product(("int8", "float"), repeat=len(options)):
        precisions = dict(zip(options, choice, strict=True))
        v = model.start(precisions)
        n = choice.count("float")
        best[n] = min(best.get(n, np.inf), float(v @ v))
    assert [p.cost for p in front] == sorted({p.cost for p in front})
    assert all(a.predicted > b.predicted for a, b in pairwise(front))
    for n, least in best.items():
        found = min(p.predicted for p in front if p.cost <= n + 1e-9)
        assert found <= 1.25 * least + 0.03 * best[0], (n, found, least)
    for point in front:
        v = model.start(dict(point.precisions))
        assert point.predicted == pytest.approx(float(v @ v), abs=1e-12)


def test_no_state_costs_more_than_the_limit_and_none_is_below_what_is_enough_but_the_last() -> None:
    evaluator, solver, plan, sketch, options = setting(Residual, pictures)
    model = PlanModel(sketch, plan, solver.solve, options)
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "macs")
    whole = Optimizer(model, costs).front(limit=np.inf)
    enough = whole[len(whole) // 2].predicted
    front = Optimizer(model, costs).front(limit=0.3, enough=enough)

    assert all(p.cost <= 0.3 + 1e-9 for p in front)
    assert all(p.predicted > enough for p in front[:-1])
    assert min(whole[0].precisions.values()) == "int8" or "w4a8" in whole[0].precisions.values()


# --- true runs decide --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "data"), NETWORKS, ids=IDS)
def test_the_chosen_plan_truly_meets_the_target_and_what_was_told_of_each_run_is_true(module, data) -> None:
    evaluator, solver, plan, sketch, _ = setting(module, data)
    options = {g: ["int8", "float"] for g in plan.groups}
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "ops")
    start = evaluator.evaluate(plan)
    target = 1 - (1 - start) / 3

    def around(reads):
        return ErrorSketch(evaluator, probes=8, base=reads)

    search = JointPrecision(evaluator, plan, solver.solve, options, costs, start=start)
    found = search.search(sketch, Goal(target, float(len(options))), around=around)

    assert found.reached
    assert found.choice.similarity >= target
    for tried in found.choice.tried:
        assert tried.similarity == pytest.approx(evaluator.evaluate(tried.plan), abs=1e-9)
        assert dict(tried.groups) == {
            g: tried.plan.precision(g) for g in plan.groups if tried.plan.precision(g) != "int8"
        }
    cheaper = [
        t
        for t in found.choice.tried
        if t.cost < costs.total({**dict.fromkeys(options, "int8"), **found.choice.groups})
    ]
    assert all(t.similarity < target for t in cheaper)
    group = next(iter(found.choice.groups))
    assert "joint search" in found.choice.plan.ops[group].why


def test_a_target_out_of_reach_gives_the_best_plan_and_says_so() -> None:
    evaluator, solver, plan, sketch, _ = setting(Residual, pictures)
    options = {g: ["int8", "float"] for g in plan.groups}
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "ops")
    search = JointPrecision(evaluator, plan, solver.solve, options, costs, start=evaluator.evaluate(plan))

    found = search.search(sketch, Goal(1.0, 2.0))

    assert not found.reached
    assert len(found.choice.groups) <= 2
    assert found.choice.similarity == max(t.similarity for t in found.choice.tried)


def test_within_a_budget_the_result_is_no_worse_than_the_most_sensitive_operators_alone() -> None:
    evaluator, solver, plan, sketch, _ = setting(Block, tokens)
    options = {g: ["int8", "float"] for g in plan.groups}
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "ops")
    rows = measure_sensitivity(evaluator, plan, solver.solve, methods=["max"])
    for limit in (1, 2, 4):
        singles = widest_top(rows, options, costs, limit)
        assert list(singles) == [r.name for r in rows[:limit]]
        search = JointPrecision(evaluator, plan, solver.solve, options, costs)
        found = search.search(sketch, Goal(None, limit), alternatives=[singles])
        assert (
            found.choice.similarity >= float_top(evaluator, plan, rows, limit, solver.solve).similarity - 1e-9
        )
        assert any(dict(t.groups) == singles for t in found.choice.tried)


def test_where_prediction_and_truth_part_the_network_is_linearised_anew() -> None:
    """Around a sketch that knows nothing, the first prediction is wrong by any factor."""
    evaluator, solver, plan, sketch, _ = setting(Residual, pictures)
    options = {g: ["int8", "float"] for g in plan.groups}
    costs = measure_costs(evaluator.graph, plan, load_target("generic-int8"), "ops")
    reads = quantized_reads(evaluator.graph, plan)
    sketch.measure(sketch.missing([reads]))
    sketch.c = {u: 5 * c for u, c in sketch.c.items()}
    asked = []

    def around(base):
        asked.append(base)
        return ErrorSketch(evaluator, probes=8, base=base)

    search = JointPrecision(evaluator, plan, solver.solve, options, costs, start=evaluator.evaluate(plan))
    found = search.search(sketch, Goal(None, 2.0), around=around)

    assert len(asked) == 1
    assert found.parted[0] > 1.5
    assert len(found.choice.tried) >= 2


@pytest.mark.parametrize(("module", "data"), NETWORKS, ids=IDS)
def test_joint_thresholds_lower_the_loss_of_the_whole_network(module, data) -> None:
    """Inputs with heavy tails: the largest of them is a bad threshold."""
    evaluator, solver, plan, sketch, _ = setting(module, lambda: data() ** 3)
    by_methods, by_factors = joint_thresholds(sketch, plan, solver.solve, ("max", "percentile(99)", "mse"))

    before, after = 1 - evaluator.evaluate(plan), 1 - evaluator.evaluate(by_factors)
    assert sketch_loss(sketch, by_methods) <= sketch_loss(sketch, plan) * (1 + 1e-9)
    assert after < before
    methods = {e.method for e in by_factors.values.values() if e.role == "activation" and e.same_as is None}
    assert len(methods) > 1
    factors = {float(m.rpartition("*")[2]) for m in methods if "*" in m}
    assert factors <= {*FACTORS}
    assert factors or sketch_loss(sketch, by_factors) == sketch_loss(sketch, by_methods)


# --- interactions ------------------------------------------------------------------------------------------------


def test_the_parts_and_interactions_add_up_to_the_whole() -> None:
    evaluator, _, plan, sketch, _ = setting(Residual, pictures)
    explained = explain(sketch, plan, most=1000)
    pairs = {(p.first, p.second): p for p in explained.pairs}

    whole = sketch.predict(quantized_reads(evaluator.graph, plan)).loss
    assert explained.total == pytest.approx(whole)
    assert sum(p.effect for p in pairs.values()) == pytest.approx(explained.interaction, abs=1e-12)
    sizes = [abs(p.effect) for p in explained.pairs]
    assert sizes == sorted(sizes, reverse=True)
    for p in explained.pairs:
        assert -1 - 1e-9 <= p.correlation <= 1 + 1e-9
        assert p.together == pytest.approx(sum(p.alone) + p.effect)
        assert p.error >= 0


class _Cancel(nn.Module):
    """The same weight twice, with opposite signs: errors of the two layers cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 8, False), nn.Linear(16, 8, False), nn.Linear(8, 5)

    def forward(self, x):
        x = x.mean(1)
        return self.head(self.a(x) - self.b(x))


def test_operators_whose_errors_cancel_are_told() -> None:
    module = randomised(_Cancel())
    with torch.no_grad():
        module.b.weight.copy_(module.a.weight)
        module.head.bias += 3
    evaluator, _, plan = bench(module, tokens())
    found = explain(ErrorSketch(evaluator, probes=5), plan)
    strongest = found.pairs[0]
    assert {strongest.first, strongest.second} <= set(plan.groups) | {"x"}
    assert strongest.correlation == pytest.approx(-1, abs=1e-3)
    assert strongest.effect < -2 * strongest.error


# --- factors of thresholds ---------------------------------------------------------------------------------------


def seen(x: np.ndarray) -> ValueStatistics:
    statistics = ValueStatistics("x")
    statistics.update(torch.from_numpy(x))
    return statistics


def test_a_factor_scales_the_range_of_its_method_within_the_extremes() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    spec = QuantSpec(INT8, symmetric=True)
    top = float(np.abs(x).max())
    plain = parse_method("percentile(99)").range(seen(x), spec)[1]

    assert parse_method("percentile(99)*0.9").range(seen(x), spec)[1] == pytest.approx(0.9 * plain)
    assert parse_method("max*0.5").range(seen(x), spec) == pytest.approx((-0.5 * top, 0.5 * top))
    assert parse_method("max*1.1").range(seen(x), spec)[1] == pytest.approx(top)


@pytest.mark.parametrize("text", ["kl*0", "kl*-1", "kl*", "*0.9", "kl*0.9*0.9*", "kl*1.2.3"])
def test_a_factor_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises((NumericsError, UnknownName)):
        parse_method(text)
