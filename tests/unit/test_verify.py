"""The proof: what it accepts, what it refuses, whom it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from export_cases import Builder, attention, residual, samples, solved
from onnx import numpy_helper

from bitwright.errors import DataError, ModelError, ProofError
from bitwright.exporters.onnx_float import export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.graph.graph import Graph
from bitwright.numerics.cosine import cosine
from bitwright.numerics.dtype import INT8, INT16, UINT8, DType
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.indexing import Gather
from bitwright.ops.linear import MatMul
from bitwright.ops.unary import Unary
from bitwright.plan.code_names import codes_in
from bitwright.plan.plan import Plan
from bitwright.plan.target import target_names
from bitwright.runtime.proof import Agreement, OpDifference, Proof, tie_width
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure, verify

TARGETS = target_names()


def exported(graph: Graph, target: str = "generic-int8", **options: object) -> tuple[Plan, onnx.ModelProto]:
    plan = solved(graph, target, **options)  # type: ignore[arg-type]
    return plan, export_qdq(graph, plan)


def batches(graph: Graph, count: int = 3, n: int = 4) -> list[dict[str, torch.Tensor]]:
    return [samples(graph, n, seed=100 + i) for i in range(count)]


def edited(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """A copy of *model* in which the initializer *name* is changed."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensor = next(t for t in made.graph.initializer if t.name == name)
    held = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(held.copy()).astype(held.dtype), name))
    return made


# --- what agrees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [residual, attention])
@pytest.mark.parametrize("target", TARGETS)
def test_an_exported_model_is_proved_for_every_target(target: str, make: Callable[[], Graph]) -> None:
    graph = make()
    plan, model = exported(graph, target)
    proof = verify(graph, plan, model, batches(graph))
    groups = [g for g in plan.groups if plan.precision(g) != "float"]
    assert [d.name for d in proof.per_op] == groups
    assert proof.literal.samples == proof.default.samples == 12
    assert proof.literal.cosine > 0.9999


def test_int16_operators_are_proved_by_their_own_rule() -> None:
    graph = residual()
    plan, model = exported(graph, "journey6", asked=dict.fromkeys(graph.op_names, "int16"))
    proof = verify(graph, plan, model, batches(graph))
    assert {d.dtype for d in proof.per_op} == {INT16}
    assert "per_op_max_steps_int16" in proof.to_json()


def test_asymmetric_uint8_is_proved() -> None:
    graph = residual()
    plan, model = exported(graph, "onnxruntime")
    assert {d.dtype for d in verify(graph, plan, model, batches(graph)).per_op} == {UINT8}


def test_mixed_precision_compares_only_the_quantized_operators() -> None:
    graph = residual()
    plan, model = exported(graph, asked={"conv2": "float"})
    proof = verify(graph, plan, model, batches(graph))
    assert [d.name for d in proof.per_op] == ["conv1", "add", "flatten", "fc"]


def test_an_all_float_plan_has_nothing_to_compare_but_the_network() -> None:
    graph = residual()
    plan, model = exported(graph, asked=dict.fromkeys(graph.op_names, "float"))
    proof = verify(graph, plan, model, batches(graph))
    assert (proof.per_op, proof.worst, proof.literal.max_steps) == ((), None, None)
    assert proof.to_json()["worst_op"] is None


def test_unquantized_side_inputs_are_taken_from_the_engine() -> None:
    b = Builder()
    x, table = b.input("x", None, 6, 4), b.constant("table", 4, 4)
    index = b.input("index", 3, dtype=torch.int64)
    later = b.op(
        Elementwise("Add", scalar=1, dtypes=(torch.int64,), computes_in=torch.int64), "index1", index
    )
    picked = b.op(Gather(1), "picked", x, later)
    graph = b.done(b.op(MatMul(), "y", picked, table))
    plan, model = exported(graph)
    proof = verify(graph, plan, model, batches(graph))
    assert [d.name for d in proof.per_op] == ["picked", "y"]


def test_elements_and_samples_are_counted_over_all_batches() -> None:
    graph = residual()
    plan, model = exported(graph)
    seen: list[int] = []
    proof = measure(graph, plan, model, batches(graph, 3, 4), progress=seen.append)
    assert seen == [4, 4, 4]
    assert {d.name: d.elements for d in proof.per_op}["fc"] == 12 * 5
    assert {d.name: d.elements for d in proof.per_op}["conv1"] == 12 * 4 * 36


def test_the_summary_has_the_promised_keys() -> None:
    graph = residual()
    plan, model = exported(graph, "bm1684x")
    proof = verify(graph, plan, model, batches(graph))
    found = proof.to_json()
    assert set(found) >= {
        "cosine",
        "max_steps",
        "top1_agreement",
        "per_op_max_steps",
        "per_op_fraction",
        "worst_op",
        "optimisation",
    }
    assert (found["optimisation"], found["rounding"], found["target_rounding"]) == (
        "disabled",
        "half_even",
        "half_up",
    )
    default = proof.default.to_json()
    assert set(default) == {"cosine", "cosine_spread", "max_steps", "top1_agreement", "optimisation"}
    assert default["optimisation"] == "default"
    assert len(proof.table().rows) == len(proof.per_op)


# --- what does not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initializer", "operator"),
    [
        ("conv1.weight_quantized", "conv1"),
        ("conv2.bias_quantized", "conv2"),
        ("fc.weight_scale", "fc"),
        ("relu2_scale", "add"),
        ("x_scale", "conv1"),
    ],
)
def test_a_wrong_number_in_the_file_is_found_and_the_operator_named(initializer: str, operator: str) -> None:
    graph = residual()
    plan, model = exported(graph)
    wrong = edited(model, initializer, lambda a: a * 1.5)
    with pytest.raises(ProofError, match=rf"operator {operator} \("):
        verify(graph, plan, wrong, batches(graph))


def test_one_wrong_weight_is_enough() -> None:
    graph = residual()
    plan, model = exported(graph)

    def flip(codes: np.ndarray) -> np.ndarray:
        codes[np.unravel_index(np.abs(codes).argmax(), codes.shape)] *= -1
        return codes

    with pytest.raises(ProofError, match=r"operator conv2 \(Conv\)"):
        verify(graph, plan, edited(model, "conv2.weight_quantized", flip), batches(graph))


def test_a_wrong_float_part_is_found_by_the_whole_network() -> None:
    graph = residual()
    plan, model = exported(graph, asked={"conv2": "float"})
    wrong = edited(model, "conv2.weight", lambda a: -3 * a)
    with pytest.raises(ProofError, match="the exported network: expected a cosine"):
        verify(graph, plan, wrong, batches(graph))


def test_measure_reports_what_verify_refuses() -> None:
    graph = residual()
    plan, model = exported(graph)
    proof = measure(graph, plan, edited(model, "fc.weight_scale", lambda a: a * 2), batches(graph))
    assert proof.worst is not None
    assert proof.worst.name == "fc"
    assert proof.to_json()["worst_op"] == "fc"
    assert proof.to_json()["per_op_max_steps"] > 1


def test_no_data_is_an_error() -> None:
    graph = residual()
    plan, model = exported(graph)
    with pytest.raises(DataError, match="at least one sample"):
        verify(graph, plan, model, [])


# --- the rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "steps", "differing", "elements", "holds"),
    [
        (INT8, 0, 0, 10, True),
        (INT8, 1, 1, 10, True),
        (INT8, 1, 2, 10, False),
        (INT8, 1, 10, 10_000, True),
        (INT8, 1, 11, 10_000, False),
        (INT8, 2, 1, 10_000, False),
        (UINT8, 2, 1, 10_000, False),
        (INT16, 1, 10_000, 10_000, True),
        (INT16, 2, 10_000, 10_000, True),
        (INT16, 3, 1, 10_000, False),
    ],
)
def test_the_rule_of_one_operator(dtype, steps: int, differing: int, elements: int, holds: bool) -> None:
    assert OpDifference("op", "Conv", dtype, steps, differing, elements).holds is holds


@pytest.mark.parametrize(
    ("dtype", "table", "steps", "holds"),
    [
        (INT8, False, 1, True),
        (INT8, True, 0, True),
        (INT8, True, 1, False),
        (INT16, False, 1, True),
        (INT16, False, 2, False),
        (INT16, True, 1, False),
    ],
)
def test_the_rule_of_integers_is_stricter(dtype: DType, table: bool, steps: int, holds: bool) -> None:
    """Tables agree to the last code; sums are off by one step at most, also at 16 bits, and whatever the function's slack."""
    found = OpDifference("op", "Exp", dtype, steps, int(steps > 0), 5000, slack=3, integers=True, table=table)
    assert found.holds is holds
    assert Proof((found,), agreement(1, 1), agreement(1, 1)).worst is found


def test_results_without_a_bound_have_no_slack() -> None:
    """The range of a norm, [0, inf), once gave ties as wide as everything, and an OverflowError."""
    assert tie_width(0.1, (0.0, float("inf"))) == tie_width(0.1, None)
    assert tie_width(0.1, (0.0, 1.0)) > tie_width(0.1, None)


def test_a_plan_with_other_types_than_the_file_is_found() -> None:
    """Codes that do not saturate are equal at any width."""
    graph = residual()
    plan, model = exported(graph)
    values = {
        name: replace(e, qparams=replace(e.qparams, spec=replace(e.qparams.spec, dtype=INT16)))
        if e.qparams is not None and e.role == "activation"
        else e
        for name, e in plan.values.items()
    }
    with pytest.raises(ProofError, match="expected codes of type int16, for the plan's int16; found int8"):
        verify(graph, replace(plan, values=values), model, batches(graph))


def agreement(cosine: float, float_cosine: float) -> Agreement:
    return Agreement("disabled", 4, cosine, float_cosine, 1.0, 0)


@pytest.mark.parametrize(
    ("cosine", "float_cosine", "passes"),
    [
        (0.999, 0.99, True),
        (0.99, 0.99, True),
        (0.98, 0.99, False),
        (1 - 1e-9, 1.0, True),
        (float("nan"), 0.9, False),
    ],
)
def test_the_rule_of_the_network(cosine: float, float_cosine: float, passes: bool) -> None:
    proof = Proof((), agreement(cosine, float_cosine), agreement(0.0, 0.0))
    if passes:
        proof.check()
    else:
        with pytest.raises(ProofError):
            proof.check()


def test_the_worst_operator_is_the_one_that_breaks_the_rule_most() -> None:
    rows = (
        OpDifference("wide", "Conv", INT16, 2, 900, 1000),
        OpDifference("bad", "Conv", INT8, 1, 3, 1000),
        OpDifference("fine", "Conv", INT8, 1, 1, 10_000),
    )
    proof = Proof(rows, agreement(1, 1), agreement(1, 1))
    assert proof.worst == rows[1]
    with pytest.raises(ProofError, match=r"operator bad \(Conv\): expected int8 codes within 1 step"):
        proof.check()


def test_cosine_of_zero_rows() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-6.0, -8.0]], dtype=torch.float64)
    assert cosine(a, b) == pytest.approx([1.0, 0.0, -1.0])


# --- the engine ----------------------------------------------------------------------------------------------


def test_a_model_that_onnx_runtime_refuses_is_an_error() -> None:
    with pytest.raises(ModelError, match="expected a model that ONNX Runtime"):
        Session(b"not a model")


def test_a_model_file_is_named_in_the_error(tmp_path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x00\x01")
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        Session(path)


def test_missing_and_misshapen_inputs_are_errors() -> None:
    session = Session(export_float(residual()))
    with pytest.raises(ModelError, match="expected the inputs x; found no x"):
        session.run({"y": torch.zeros(1)})
    with pytest.raises(ModelError, match="inputs that the model runs on"):
        session.run({"x": torch.zeros(1, 2, 6, 6)})


def test_only_the_wanted_outputs_are_returned() -> None:
    b = Builder()
    y = b.op(Unary("Relu"), "y", b.input("x", None, 4))
    graph = b.done(y, b.op(Unary("Tanh"), "z", y))
    session = Session(export_float(graph))
    assert session.outputs == ("y", "z")
    assert list(session.run(samples(graph, 2), ["z"])) == ["z"]


def test_a_default_level_that_fails_is_recorded_not_fatal() -> None:
    failed = replace(agreement(0.0, 0.0), failure="no kernel")
    proof = Proof((), agreement(1, 1), failed)
    proof.check()
    assert proof.default.to_json()["failure"] == "no kernel"


@pytest.mark.parametrize(("value", "reader"), [("x", "conv1"), ("fc", "fc")])
def test_a_file_without_the_codes_of_a_value_is_refused(value: str, reader: str) -> None:
    """Nothing reads the codes of the last operator: without them it once was not compared at all."""
    graph = residual()
    plan, model = exported(graph)
    codes, lost = codes_in(model)[value][0], "called something else"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [lost if name == codes else name for name in names]
    with pytest.raises(ProofError, match=f"operator {reader}, value {value}: expected its codes in the file"):
        verify(graph, plan, model, batches(graph))
