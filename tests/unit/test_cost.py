"""What precisions cost, and budgets as a user writes them."""

from __future__ import annotations

import pytest
from tests.networks import Block, Residual, bench, pictures, randomised, tokens

from bitwright.errors import DataError, TargetError
from bitwright.plan.cost import measure_costs, parse_budget
from bitwright.plan.plan import OpEntry, Plan
from bitwright.plan.target import Estimate, load_target

GENERIC = load_target("generic-int8")


def setting(metric: str, target=GENERIC, module=Residual, data=pictures):
    evaluator, _, plan = bench(randomised(module()), data())
    return evaluator.graph, plan, measure_costs(evaluator.graph, plan, target, metric)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["ops", "macs", "bytes"])
@pytest.mark.parametrize(("module", "data"), [(Residual, pictures), (Block, tokens)])
def test_int8_costs_nothing_and_wider_costs_more(metric: str, module, data) -> None:
    _, plan, costs = setting(metric, module=module, data=data)
    assert costs.total(dict.fromkeys(plan.groups, "int8")) == 0
    for of in costs.of.values():
        assert of["w4a8"] < of["int8"] == 0 < of["int16"] < of["float"]


@pytest.mark.parametrize("metric", ["ops", "macs", "bytes"])
def test_what_the_plan_has_costs_nothing_even_where_it_is_int16(metric: str) -> None:
    evaluator, solver, plan = bench(randomised(Block()), tokens())
    wide = next(iter(plan.groups))
    plan = solver.solve(plan.with_precision([wide], "int16", "inner value"))
    costs = measure_costs(evaluator.graph, plan, GENERIC, metric)  # type: ignore[arg-type]
    assert costs.total({g: plan.precision(g) for g in plan.groups}) == 0
    assert costs.of[wide]["int8"] < 0
    assert costs.of[wide]["float"] >= (1 if metric == "ops" else 0.01 / len(plan.groups))


def test_all_float_costs_one_of_shares_and_a_hundredth_for_its_operators() -> None:
    for metric in ("macs", "bytes"):
        _, plan, costs = setting(metric)
        assert costs.total(dict.fromkeys(plan.groups, "float")) == pytest.approx(1.01)
    _, plan, costs = setting("ops")
    assert costs.total(dict.fromkeys(plan.groups, "float")) == len(plan.groups)


@pytest.mark.parametrize("base", ["int8", "int16"])
def test_no_number_of_narrower_operators_buys_a_wider_one(base: str) -> None:
    """A hundred int4 operators, a hundredth each, bought one more float one."""
    names = [f"layer{i}" for i in range(300)]
    plan = Plan("generic-int8", {}, {n: OpEntry("Gemm", n, base) for n in names})  # type: ignore[arg-type]
    costs = measure_costs(setting("ops")[0], plan, GENERIC, "ops")

    first, *others = names
    for narrow in ("w4a8", "int8"):
        assert costs.total({first: "float", **dict.fromkeys(others, narrow)}) > 0
    wider = costs.total(dict.fromkeys(names, "int16"))
    assert wider == 0 if base == "int16" else 299 < wider < 300


def test_shares_are_those_of_the_network() -> None:
    graph, plan, costs = setting("macs")
    each = 0.01 / len(plan.groups)
    macs = {"conv1": 8 * 3 * 9 * 64, "depthwise": 8 * 9 * 64, "project": 8 * 8 * 64, "fc": 128 * 10}
    assert sum(graph.macs().values()) == sum(macs.values())
    for group, count in macs.items():
        assert costs.of[group]["float"] == pytest.approx(count / sum(macs.values()) + each)

    _, plan, costs = setting("bytes")
    weights = {"conv1": 224, "depthwise": 80, "project": 72, "fc": 1290}
    for group, count in weights.items():
        assert costs.of[group]["float"] == pytest.approx(count / sum(weights.values()) + each)
        assert costs.of[group]["w4a8"] == pytest.approx(
            -count / sum(weights.values()) / 6 - each * 0.5 / len(plan.groups)
        )


def test_latency_is_the_longer_of_computing_and_moving() -> None:
    """Two targets: one that only computes, one whose memory is so slow that only bytes count."""
    computing = GENERIC.model_copy(update={"estimate": Estimate(tops={"int8": 2, "float": 0.5})})
    graph, plan, costs = setting("latency", computing)
    macs = graph.macs()
    each = 0.01 / len(plan.groups)
    share = macs["conv1"] / sum(macs.values())
    assert costs.of["conv1"]["float"] == pytest.approx(3 * share + each)
    assert costs.of["conv1"]["int16"] == pytest.approx(share + (1 - 0.5 / len(plan.groups)) * each)

    slow = GENERIC.model_copy(
        update={"estimate": Estimate(tops={"int8": 2, "float": 2}, bandwidth_gb_s=1e-6)}
    )
    _, plan, costs = setting("latency", slow)
    assert costs.total(dict.fromkeys(plan.groups, "float")) == pytest.approx(3.01)


def test_latency_without_figures_says_where_to_put_them() -> None:
    with pytest.raises(TargetError, match=r"docs/targets\.md"):
        setting("latency")


def test_an_estimate_needs_rates_of_int8_and_float() -> None:
    with pytest.raises(ValueError, match="rates for int8 and float"):
        Estimate(tops={"int8": 2})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ops=5", ("ops", 5.0)), ("macs=0.1", ("macs", 0.1)), ("latency=0", ("latency", 0.0))],
)
def test_budgets_are_read(text: str, expected) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "text", ["", "ops", "ops=", "ops=x", "ops=-1", "ops=nan", "ops=inf", "watts=1", "=1"]
)
def test_budgets_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="--budget"):
        parse_budget(text)
