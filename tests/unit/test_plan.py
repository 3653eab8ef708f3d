"""Plans: who reads what, groups, precisions that are not granted, the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.networks import Block, Residual, pictures, randomised, ready, solved, tokens
from torch import Tensor, nn

from bitwright.errors import OutputError, PlanError, TargetError, UnknownName
from bitwright.graph.graph import OUTPUT, Graph
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import FuseRule, load_target, target_names


class _TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return ready(randomised(Residual()), pictures())


@pytest.fixture(scope="module")
def plan(graph: Graph) -> Plan:
    return solved(graph, pictures())[1]


def test_a_group_is_named_after_its_first_operator_with_weights(graph: Graph, plan: Plan) -> None:
    groups = plan.groups

    assert groups["conv1"] == ["conv1", "_generated_relu_0"]
    assert groups["depthwise"][0] == "depthwise"
    assert len(groups["depthwise"]) == 2
    assert groups["project"] == ["project"]
    assert groups["fc"] == ["fc"]


def test_an_addition_and_its_relu_are_one_group_named_after_the_addition(plan: Plan) -> None:
    added = [ops for name, ops in plan.groups.items() if "add" in name]

    assert len(added) == 1
    assert len(added[0]) == 2


def test_operators_that_join_in_one_accumulator_are_one_group(graph: Graph) -> None:
    target = load_target("generic-int8").model_copy(
        update={"fuse": (FuseRule(producers=("Conv",), consumers={"Add": "always"}),)}
    )
    two = ready(randomised(_TwoBranches()), pictures())
    groups = assign(two, target).groups

    assert list(groups) == ["a"]
    assert groups["a"][:2] == ["a", "b"]


def test_a_value_between_fused_operators_has_no_entry(graph: Graph, plan: Plan) -> None:
    assert graph.op("conv1").outputs == ("bn1",)
    assert "bn1" not in plan.values


def test_passthrough_operators_share_the_parameters_of_what_they_read(graph: Graph, plan: Plan) -> None:
    entry = plan.values["pool"]

    assert entry.same_as is not None
    assert entry.qparams is plan.values[entry.same_as].qparams


def test_a_quantized_producer_is_read_quantized_by_every_reader(graph: Graph, plan: Plan) -> None:
    mixed = plan.with_precision(["depthwise"], "float", "test")
    reads = quantized_reads(graph, mixed)
    value = graph.op_inputs("depthwise")[0]

    assert (value, "depthwise") in reads


def test_a_float_producer_is_read_quantized_only_by_quantized_readers(graph: Graph, plan: Plan) -> None:
    mixed = plan.with_precision(["conv1", "depthwise"], "float", "test")
    reads = quantized_reads(graph, mixed)
    value = graph.op_inputs("depthwise")[0]
    readers = {r.op for r in graph.value(value).readers}

    assert (value, "depthwise") not in reads
    assert {op for v, op in reads if v == value} == readers - {"depthwise"}
    assert ("depthwise.weight", "depthwise") not in reads


def test_a_quantized_output_of_the_graph_is_read_quantized(graph: Graph, plan: Plan) -> None:
    assert ("fc", OUTPUT) in quantized_reads(graph, plan)
    assert ("fc", OUTPUT) not in quantized_reads(graph, plan.with_precision(["fc"], "float", "test"))


def test_norm_gains_and_statistics_stay_float() -> None:
    block = ready(randomised(Block()), tokens())
    plan = assign(block, load_target("generic-int8"))

    assert "norm.weight" not in plan.values
    assert "norm.bias" not in plan.values
    assert plan.values["qkv.weight"].role == "weight"
    assert plan.values["qkv.bias"].role == "bias"


def test_what_the_target_does_not_grant_is_float_with_the_reason() -> None:
    block = ready(randomised(Block()), tokens())
    plan = assign(block, load_target("bm1684x"))

    assert plan.ops["norm"].precision == "float"
    assert plan.refusals["norm"] == "bm1684x does not allow int8 LayerNorm (allowed: float)"


def test_int16_is_granted_where_the_target_allows_it(graph: Graph) -> None:
    asked = dict.fromkeys(graph.op_names, "int16")
    granted = assign(graph, load_target("journey6"), asked=asked)
    refused = assign(graph, load_target("generic-int8"), asked=asked)

    assert granted.precision("fc") == "int16"
    assert refused.precision("fc") == "float"
    assert "does not allow int16 Linear" in refused.ops["fc"].why


def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "other"}', '{"format": "bitwright-plan/1", "ops": 3}']
)
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)

    with pytest.raises(PlanError, match="plan"):
        Plan.load(tmp_path / "plan.json")


def test_an_unknown_group_is_named(plan: Plan) -> None:
    with pytest.raises(UnknownName, match=r"conv_1.*Did you mean 'conv1'"):
        plan.precision("conv_1")


@pytest.mark.parametrize("name", target_names())
def test_every_target_quantizes_the_network_and_says_where_its_facts_come_from(
    name: str, graph: Graph
) -> None:
    target = load_target(name)
    _, plan = solved(graph, pictures(), name)

    assert target.name == name
    assert target.description
    assert target.sources or not target.approximate
    assert any(plan.precision(g) == "int8" for g in plan.groups)


def test_the_chip_targets_say_that_they_approximate() -> None:
    assert [n for n in target_names() if load_target(n).approximate] == ["bm1684", "bm1684x", "journey6"]


def test_a_users_target_file_works_the_same_way(tmp_path: Path, graph: Graph) -> None:
    path = tmp_path / "npu.yaml"
    path.write_text("name: npu\noperators: {Linear: [float]}\nfuse: []\n")
    plan = assign(graph, load_target(path))

    assert plan.precision("fc") == "float"
    assert plan.groups["conv1"] == ["conv1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nroundin: half_up\n", "roundin"),
        ("name: x\nrounding: sideways\n", "rounding"),
        ("name: [\n", "valid YAML"),
        ("- 1\n", "valid dictionary"),
    ],
)
def test_a_wrong_target_file_names_the_field(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)

    with pytest.raises(TargetError, match=message):
        load_target(path)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="bm1684, bm1684x, generic, generic-int8, journey6, onnxruntime"):
        load_target("tpu")


def test_plan_json_is_plain_data(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_that_cannot_be_written_is_a_clear_error(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="a place that can be written to"):
        plan.save(tmp_path / "file" / "plan.json")
