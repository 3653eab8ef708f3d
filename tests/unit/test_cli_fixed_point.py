"""`quantize`, `verify` and `luts` on a small network, from the command line to their files; and their kinds of bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import helper
from tests.unit.cli_cases import Command, make_model

from bitwright.cli.options import DataFlags, QuantizeFlags
from bitwright.cli.record import record_of
from bitwright.plan.plan import Plan

#: Operators of an integer model that compute, move or shape integers; Q/DQ stand at its ends.
INTEGER_OPS = {
    "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "Add", "Sub", "Mul", "Div", "BitShift",
    "BitwiseAnd", "BitwiseXor", "Gather", "Clip", "Cast", "MaxPool", "ReduceMax", "ReduceSum", "Max", "Min", "Where", "Reshape",
    "Flatten", "Abs", "Neg", "Equal", "Less", "Greater", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Not", "Mod", "Identity", "Concat", "Slice", "Unsqueeze", "Squeeze",
    "Constant", "Range",
}  # fmt: skip


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network with a softmax behind it: its parts are looked up in 16-bit tables."""
    node = helper.make_node("Softmax", ["last"], ["y"], "softmax", axis=-1)
    return make_model(tmp_path_factory.mktemp("attentive") / "soft.onnx", node)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


def spread(path: Path, data: Path) -> float:
    """The standard deviation of what ONNX Runtime makes of all samples."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return float(np.std(session.run(None, {"x": np.load(data)["x"]})[0], ddof=1))


def operators(path: Path) -> set[str]:
    flat = onnx.inliner.inline_local_functions(onnx.load(path))
    return {node.op_type for node in flat.graph.node}


#: The parts of a softmax that is taken apart.
SOFTMAX = [f"softmax.{part}" for part in ("max", "sub", "exp", "sum", "reciprocal", "mul")]


@pytest.mark.parametrize(
    ("target", "islands"),
    [
        ("journey6", {}),
        ("onnxruntime", {}),
        ("bm1684", dict.fromkeys(SOFTMAX, "bm1684 does not allow int8 Softmax (allowed: float)")),
    ],
)
def test_both_files_are_written_proven_and_proven_again(
    bitwright: Command, attentive: Path, data: Path, tmp_path: Path, target: str, islands: dict[str, str]
) -> None:
    out = tmp_path / "out"
    done = bitwright(
        "quantize", attentive, "--data", data, "--target", target, "--export", "both", "-o", out, "-q"
    )

    assert done.status == 0
    assert {
        "soft_qdq.onnx",
        "soft_integer.onnx",
        "accumulators.csv",
        "plan.json",
        "job.json",
        "report.html",
        "summary.json",
    } <= {f.name for f in out.iterdir()}
    assert "Proof of qdq.onnx" in done.out
    assert "Proof of integer.onnx" in done.out
    onnxruntime.InferenceSession(out / "soft_integer.onnx", providers=["CPUExecutionProvider"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["integer"]["islands"] == islands
    assert (operators(out / "soft_integer.onnx") <= INTEGER_OPS) == (not islands)
    assert summary["integer"]["runtime_check"]["per_op_max_steps"] <= 1

    again = bitwright("verify", out, "-q")
    assert again.status == 0
    assert "integer.onnx: ONNX Runtime against the simulation" in again.out
    found = json.loads(bitwright("verify", out, "-q", "--json").out)
    assert found["integer.onnx"] == summary["integer"]["runtime_check"]
    assert found["qdq.onnx"] == summary["runtime_check"]
    assert found["holds"]
    assert found["tables"]
    assert found["broken"] == []


def test_verify_finds_a_file_that_computes_something_else(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    assert (
        bitwright("quantize", model, "--data", data, "--export", "integer", "-o", tmp_path, "-q").status == 0
    )
    path = tmp_path / "net_integer.onnx"
    changed = onnx.load(path)
    weight = max(
        (
            i
            for i in changed.graph.initializer
            if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        ),
        key=lambda i: len(i.raw_data),
    )
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes[0] += 9
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    onnx.save(changed, path)

    done = bitwright("verify", tmp_path, "-q")
    assert done.status == 1
    assert not (tmp_path / "net_qdq.onnx").exists()


def test_tune_exports_integers_too(bitwright: Command, attentive: Path, data: Path, tmp_path: Path) -> None:
    """`verify` once took how operators were measured for a threshold method."""
    flags = ("--export", "both", "--expected-cos", 0.9, "--method", "kl,sketch")
    done = bitwright("tune", attentive, "--data", data, *flags, "-o", tmp_path, "-q")

    assert done.status == 0
    assert {"soft_qdq.onnx", "soft_integer.onnx"} <= {f.name for f in tmp_path.iterdir()}
    assert bitwright("verify", tmp_path, "-q").status == 0


def test_luts_names_the_guilty_table_and_repairs_it(
    bitwright: Command, attentive: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "luts", attentive, "--data", data, "--target", "journey6", "--strategy", "evenly", "--num-tables", 1,
        "--tolerance", 1e-4, "-o", tmp_path, "-q",
    )  # fmt: skip

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["to_blame"]
    assert "Tables are to blame" in done.out
    assert set(summary["guilty"]) <= {"softmax.exp", "softmax.reciprocal"}
    assert summary["guilty"]
    assert summary["repaired"]
    assert done.status == 0
    cosine = {name: stage["cosine"] for name, stage in summary["stages"].items()}
    assert (
        cosine["float tables"] - cosine["fixed tables"] > 1e-4 >= cosine["float tables"] - cosine["repaired"]
    )
    kept = [r for r in summary["remedies"] if r["kept"]]
    assert kept
    assert all(r["score"][1] > r["score"][0] for r in kept)
    rows = list(csv.DictReader((tmp_path / "luts.csv").open()))
    assert {r["name"] for r in rows} == {"sigmoid", "softmax.exp", "softmax.reciprocal"}
    assert [r["name"] for r in rows if r["guilty"] == "yes"] == [
        r["name"] for r in rows if r["name"] in summary["guilty"]
    ]
    plan = Plan.load(tmp_path / "plan.json")
    for name in summary["guilty"]:
        table = plan.ops[name].table
        assert table is not None
        assert table.strategy == "manual"  # settled: no statistics are needed to make it again
    assert f"Error of the table of {summary['guilty'][0]}" in (tmp_path / "report.html").read_text()


def test_luts_acquits_tables_that_cost_nothing(
    bitwright: Command, attentive: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "luts", attentive, "--data", data, "--target", "journey6", "-o", tmp_path, "-q", "--json"
    )

    found = json.loads(done.out)
    assert done.status == 0
    assert not found["to_blame"]
    assert found["guilty"] == found["remedies"] == []
    assert list(found["stages"]) == ["float", "float tables", "fixed tables", "integer model"]


def test_luts_asks_the_user_s_metric(bitwright: Command, attentive: Path, data: Path, tmp_path: Path) -> None:
    """Of the float network, and of the integer file that is written for its plan."""
    metric = tmp_path / "metric.py"
    metric.write_text(
        "import numpy as np, torch\n"
        f"x = torch.from_numpy(np.load({str(data)!r})['x'])\n"
        "def spread(model):\n    return float(model(x).std())\n"
    )
    done = bitwright(
        "luts", attentive, "--data", data, "--target", "journey6", "--evaluate", f"{metric}:spread", "-o", tmp_path / "o", "-q",
        "--json",
    )  # fmt: skip
    plan = ("--plan", tmp_path / "o" / "plan.json", "--export", "integer", "--target", "journey6")
    bitwright("quantize", attentive, "--data", data, *plan, "-o", tmp_path / "i", "-q")

    found = {name: stage["metric"] for name, stage in json.loads(done.out)["stages"].items()}
    assert found["float"] == pytest.approx(spread(attentive, data), rel=1e-5)
    assert found["integer model"] == pytest.approx(
        spread(tmp_path / "i" / "soft_integer.onnx", data), rel=1e-6
    )
    assert found["integer model"] != pytest.approx(found["float"], rel=1e-5)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_a_network_without_tables_has_none_to_blame(bitwright: Command, data: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    weight = onnx.numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")
    io = [helper.make_tensor_value_info(n, 1, ["n", c, 8, 8]) for n, c in (("x", 3), ("y", 2))]
    graph = helper.make_graph(nodes, "plain", io[:1], io[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "plain.onnx")

    error = bitwright("luts", tmp_path / "plain.onnx", "--data", data, "-o", tmp_path / "o").error
    assert "operators that a chip looks up in tables" in error


def test_unknown_names_are_refused(bitwright: Command, model: Path, data: Path, tmp_path: Path) -> None:
    assert "evenly" in bitwright("luts", model, "--data", data, "--strategy", "evenley", "-o", tmp_path).error
    # Points cannot be given here: the error asked for them.
    manual = bitwright("luts", model, "--data", data, "--strategy", "manual", "-o", tmp_path).error
    assert "(curvature, evenly, mix, optimal)" in manual
    assert "252" in bitwright("luts", model, "--data", data, "--num-tables", 253, "-o", tmp_path).error
    assert "'both'" in bitwright("quantize", model, "--data", data, "--export", "int", "-o", tmp_path).error


def test_a_folder_without_a_record_cannot_be_verified(bitwright: Command, tmp_path: Path) -> None:
    assert "job.json" in bitwright("verify", tmp_path).error


def test_a_plan_of_another_network_is_refused(
    bitwright: Command, model: Path, attentive: Path, data: Path, tmp_path: Path
) -> None:
    assert bitwright("quantize", model, "--data", data, "-o", tmp_path, "-q").status == 0

    error = bitwright("verify", tmp_path, "--model", attentive).error
    assert "a plan of soft" in error
    assert "softmax" in error


def test_a_plan_for_another_target_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "x" / "plan.json"
    common = ("quantize", model, "--data", data, "-o", tmp_path / "x", "-q")
    assert bitwright(*common, "--target", "generic-int8").status == 0

    assert bitwright(*common, "--target", "bm1684", "--plan", plan).error == (
        f"bitwright: error: {plan}: expected a plan for the target bm1684; found one for generic-int8. "
        "Give --target generic-int8, or a plan made for bm1684."
    )


def test_the_record_takes_no_name_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called like the target, or like a module, once became an absolute path that named nothing."""
    monkeypatch.chdir(tmp_path)
    for folder in ("journey6", "loader", "network"):
        Path(folder).mkdir()
    Path("samples.npz").write_bytes(b"")
    names = record_of("network:make", QuantizeFlags("journey6"), DataFlags("loader:samples"), "qdq")
    assert (names.model, names.quantize.target, names.data.data) == (
        "network:make",
        "journey6",
        "loader:samples",
    )

    data = DataFlags("samples.npz", labels=Path("labels.txt"), calibration_data="loader")
    Path("labels.txt").write_text("")
    paths = record_of("net.py:make", QuantizeFlags("chips/mine.yaml"), data, "both")
    assert paths.model == f"{tmp_path / 'net.py'}:make"
    assert paths.quantize.target == str(tmp_path / "chips" / "mine.yaml")
    assert paths.data.data == str(tmp_path / "samples.npz")
    assert paths.data.labels == tmp_path / "labels.txt"
    assert paths.data.calibration_data == str(tmp_path / "loader")


def test_a_folder_whose_files_are_gone_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    assert bitwright("quantize", model, "--data", data, "-o", tmp_path, "-q").status == 0
    (tmp_path / "net_qdq.onnx").unlink()

    assert "found none" in bitwright("verify", tmp_path).error


def test_a_plan_goes_from_search_to_tables_to_files(
    bitwright: Command, attentive: Path, data: Path, tmp_path: Path
) -> None:
    common = ("--data", data, "--target", "journey6", "-q")
    tuned, tables, files = tmp_path / "tuned", tmp_path / "tables", tmp_path / "files"
    bitwright("tune", attentive, *common, "--max-float-ops", 1, "--expected-cos", 1, "-o", tuned)
    before = Plan.load(tuned / "plan.json")
    assert bitwright("luts", attentive, *common, "--plan", tuned / "plan.json", "-o", tables).status == 0
    done = bitwright(
        "quantize", attentive, *common, "--plan", tables / "plan.json", "--export", "integer", "-o", files
    )

    assert done.status == 0
    plan = Plan.load(files / "plan.json")
    assert plan.float_groups == before.float_groups
    assert plan.values == before.values
    assert plan.ops["softmax.exp"].table == Plan.load(tables / "plan.json").ops["softmax.exp"].table
