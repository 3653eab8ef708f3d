"""Precisions of parts: int16 inside on every target, the operator's own at its end, by the names that the author knows."""

from __future__ import annotations

import pytest
import torch
from tests.networks import Block, calibrated, randomised, tokens

import bitwright as bw
from bitwright.calibrate.solve import Solver
from bitwright.flow.bench import prepared
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture
from bitwright.numerics.lut import TableSettings
from bitwright.plan.assign import allowed_precisions, assign
from bitwright.plan.plan import Plan
from bitwright.plan.qconfig import SensitiveOpsQconfigSetter
from bitwright.plan.target import Precision, load_target, target_names

SOFTMAX = "_generated_scaled_dot_product_attention_1.softmax"


@pytest.fixture(scope="module")
def graph() -> Graph:
    return prepared(capture(randomised(Block()), tokens()[:2]), tables=True)


@pytest.mark.parametrize("target", target_names())
def test_inner_parts_are_int16_on_every_target_that_quantizes_the_whole(graph: Graph, target: str) -> None:
    chip = load_target(target)
    plan = assign(graph, chip)

    for op in graph.ops:
        if op.composite is None:
            continue
        allowed = chip.allowed(op.composite.kind)
        expected = "float" if allowed == ("float",) else "int16" if op.is_inner else "int8"
        assert plan.ops[op.name].precision == expected, op.name
        if expected == "int16":
            assert op.composite.name in plan.ops[op.name].why
            group = plan.ops[op.name].group
            assert allowed_precisions(graph, plan, chip, group) == ("int16", "float")


@pytest.mark.parametrize(("wish", "inner"), [("int8", "int16"), ("int16", "int16"), ("float", "float")])
def test_a_wish_for_the_whole_is_one_for_its_parts(graph: Graph, wish: Precision, inner: str) -> None:
    plan = assign(graph, load_target("generic"), asked={SOFTMAX: wish})

    assert plan.ops[f"{SOFTMAX}.exp"].precision == inner
    assert plan.ops[f"{SOFTMAX}.mul"].precision == wish
    assert plan.ops["norm.rsqrt"].precision == "int16"


def test_inner_values_and_constants_of_norms_have_16_bits(graph: Graph) -> None:
    x = tokens()
    target = load_target("generic")
    plan = Solver(graph, target, calibrated(graph, x)).solve(assign(graph, target))
    widths = {name: e.qparams.spec.dtype.name for name, e in plan.values.items() if e.qparams}

    assert widths["norm.weight"] == widths["norm.bias"] == widths["norm.rsqrt"] == "int16"
    assert widths[graph.op("norm.bias_add").outputs[0]] == "int8"
    assert widths[f"{SOFTMAX}.max"] == widths[graph.op_inputs(f"{SOFTMAX}.max")[0] or ""] == "int8"


def test_a_plan_keeps_table_settings(graph: Graph) -> None:
    plan = assign(graph, load_target("generic"))
    changed = plan.with_tables({"norm.rsqrt": TableSettings(num_tables=12)})

    assert Plan.from_json(changed.to_json()) == changed
    assert changed.ops["norm.rsqrt"].table == TableSettings(num_tables=12)
    with pytest.raises(bw.BitwrightError, match=r"norm\.rsqr'"):
        plan.with_tables({"norm.rsqr": TableSettings()})


INT16 = bw.get_default_qconfig(activation_qkwargs={"dtype": "int16"})
INT8 = bw.get_default_qconfig()


def precisions(model: bw.PreparedModel) -> dict[str, str]:
    return {name: e.precision for name, e in model.facts.plan.ops.items()}


def test_setters_and_attributes_reach_the_parts() -> None:
    module = randomised(Block())
    setter = bw.ModuleNameQconfigSetter({"": INT8, "norm": None, SOFTMAX: INT16})
    by_name = precisions(bw.prepare(module, tokens()[:2], setter))
    module.norm.qconfig = INT16
    by_attribute = precisions(bw.prepare(module, tokens()[:2], setter))
    sensitive = SensitiveOpsQconfigSetter(frozenset({"norm"}), INT16, INT8)
    by_table = precisions(bw.prepare(randomised(Block()), tokens()[:2], sensitive))

    assert by_name["norm.rsqrt"] == by_name["norm.bias_add"] == "float"
    assert by_name[f"{SOFTMAX}.mul"] == "int16"
    assert by_attribute["norm.rsqrt"] == by_attribute["norm.bias_add"] == "int16"
    assert by_table["norm.bias_add"] == "int16"
    assert by_table[f"{SOFTMAX}.exp"] == "int16"
    assert by_table[f"{SOFTMAX}.mul"] == "int8"


def test_only_targets_with_tables_take_operators_apart() -> None:
    module = randomised(Block())
    apart = bw.prepare(module, tokens()[:2], target="journey6")
    whole = bw.prepare(module, tokens()[:2], target="onnxruntime")

    assert "norm.rsqrt" in precisions(apart)
    assert "norm" in precisions(whole)
    assert apart.state_dict().keys() >= module.state_dict().keys()


@pytest.mark.parametrize(("wish", "width"), [("int8", "int8"), ("int16", "int16")])
def test_what_a_norm_reads_from_outside_has_the_width_of_the_norm(
    graph: Graph, wish: Precision, width: str
) -> None:
    x = tokens()
    target = load_target("generic")
    asked = dict.fromkeys(["norm", "_generated_add_2"], wish)
    plan = Solver(graph, target, calibrated(graph, x)).solve(assign(graph, target, asked=asked))
    q = plan.qparams(graph.info.inputs[0].name)

    assert q is not None
    assert q.spec.dtype.name == width


def test_the_output_of_a_softmax_in_parts_is_a_probability() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 5), torch.nn.Softmax(-1)).eval()
    apart = prepared(capture(module, tokens()[:2]), tables=True)

    evaluator = bw.Evaluator(apart, lambda size: iter(()))

    assert apart.op(apart.op_names[-1]).kind == "Mul"
    assert evaluator.similarity.probabilities == frozenset(apart.info.outputs)


@pytest.mark.parametrize("method", ["max", "percentile(90)"])
def test_scores_further_apart_than_calibration_saw_do_not_saturate_inside_a_softmax(
    graph: Graph, method: str
) -> None:
    target, seen = load_target("generic"), calibrated(graph, tokens())
    plan = Solver(graph, target, seen).solve(assign(graph, target, method=method))

    def limits(part: str) -> tuple[float, float]:
        q = plan.qparams(f"{SOFTMAX}.{part}")
        assert q is not None
        return q.limits

    assert limits("sub")[0] <= 3.9 * seen[f"{SOFTMAX}.sub"].lo < 0
    assert limits("sum")[1] >= 3.9 * seen[f"{SOFTMAX}.sum"].hi
    assert limits("exp")[1] == pytest.approx(1.0)
    assert limits("reciprocal")[1] <= 1.0001
