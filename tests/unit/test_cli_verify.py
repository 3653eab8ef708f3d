"""`verify`: what it says of folders whose files, plan or data are not what they were, and how proofs read on the screen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.unit.cli_cases import SAMPLES, Command, random_weight

from bitwright.cli.results import proof_line
from bitwright.numerics.dtype import INT8, INT16
from bitwright.runtime.proof import Agreement, OpDifference, Proof


@pytest.fixture
def written(bitwright: Command, model: Path, data: Path, tmp_path: Path) -> Path:
    """A folder with both files, made from `samples.npz` beside it, which holds labels too."""
    shutil.copy(data, tmp_path / "samples.npz")
    out = tmp_path / "out"
    done = bitwright(
        "quantize", model, "--data", tmp_path / "samples.npz", "--export", "both", "-o", out, "-q"
    )
    assert done.status == 0
    return out


@pytest.mark.parametrize(
    ("name", "found"), [("nowhere", "No such file or directory"), ("samples.npz", "Not a directory")]
)
def test_what_is_no_folder_of_results_is_said(
    bitwright: Command, tmp_path: Path, name: str, found: str
) -> None:
    (tmp_path / "samples.npz").write_bytes(b"")

    error = bitwright("verify", tmp_path / name).error
    assert f"leave beside their files; found {found}. Name the folder that they wrote" in error


def test_a_missing_file_of_two_is_not_passed_over(bitwright: Command, written: Path) -> None:
    (written / "net_integer.onnx").unlink()

    error = bitwright("verify", written).error
    assert "expected the file net_integer.onnx, which was written there" in error


def test_a_damaged_file_is_named(bitwright: Command, written: Path) -> None:
    whole = (written / "net_integer.onnx").read_bytes()
    (written / "net_integer.onnx").write_bytes(whole[: len(whole) // 2])

    error = bitwright("verify", written).error
    assert "net_integer.onnx: expected an ONNX file; found bytes that do not decode" in error


def test_files_of_another_model_in_the_folder_are_left_alone(bitwright: Command, written: Path) -> None:
    (written / "another_integer.onnx").write_bytes(b"not a model")

    assert bitwright("verify", written, "-q").status == 0


def test_data_that_have_moved_are_named_by_a_flag(bitwright: Command, written: Path) -> None:
    old = written.parent / "samples.npz"
    moved = old.rename(written.parent / "moved.npz")

    assert "samples.npz" in bitwright("verify", written).error
    assert bitwright("verify", written, "--data", moved, "-q").status == 0


def test_nothing_is_calibrated_again(bitwright: Command, written: Path) -> None:
    done = bitwright("verify", written)

    assert done.status == 0
    assert "proving on ONNX Runtime" in done.err
    assert "calibrating" not in done.err


def test_calibration_data_may_be_gone(bitwright: Command, model: Path, data: Path, tmp_path: Path) -> None:
    """The plan holds all thresholds and dividing points."""
    calibration = tmp_path / "calibration.npz"
    shutil.copy(data, calibration)
    out = tmp_path / "out"
    flags = ("--data", data, "--calibration-data", calibration, "--export", "integer", "-o", out, "-q")
    assert bitwright("quantize", model, *flags).status == 0
    calibration.unlink()

    assert bitwright("verify", out, "-q").status == 0


def test_a_plan_whose_types_were_edited_is_found(bitwright: Command, written: Path) -> None:
    """Where nothing saturates, codes of 8 and of 16 bits are equal numbers."""
    plan = written / "plan.json"
    plan.write_text(plan.read_text().replace('"uint8"', '"uint16"'))

    assert "for the plan's uint16; found uint8 in the file" in bitwright("verify", written).error


# --- look-up tables ----------------------------------------------------------------------------------------------


@pytest.fixture
def logarithm(bitwright: Command, tmp_path: Path) -> Path:
    """The folder of a network that begins with a logarithm: code 0, which its data reach, has none."""
    net = helper.make_graph(
        [
            helper.make_node("Log", ["x"], ["logs"], "log"),
            helper.make_node("Gemm", ["logs", "w"], ["y"], "fc"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [random_weight("w", 64, 4, seed=0)],
    )
    model = helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "log.onnx")
    x = np.random.default_rng(0).uniform(1e-4, 1, (SAMPLES, 64)).astype(np.float32)
    np.savez(tmp_path / "positive.npz", x=x)
    out = tmp_path / "out"
    flags = ("--data", tmp_path / "positive.npz", "--target", "journey6", "--export", "integer", "-o", out)
    assert bitwright("quantize", tmp_path / "log.onnx", *flags, "-q").status == 0
    return out


def test_inputs_of_which_a_function_has_no_value_break_no_rule(bitwright: Command, logarithm: Path) -> None:
    done = bitwright("verify", logarithm, "-q")

    assert (done.status, done.err) == (0, "")
    assert f"Proven on {SAMPLES} samples against plan.json: integer.onnx." in done.out


def test_a_damaged_table_is_named_and_leads(bitwright: Command, logarithm: Path) -> None:
    path = logarithm / "log_integer.onnx"
    model = onnx.load(path)
    entries = next(i for i in model.graph.initializer if i.dims == [256])
    codes = numpy_helper.to_array(entries)
    entries.CopyFrom(numpy_helper.from_array(codes + 3 * (codes < 0).astype(codes.dtype), entries.name))
    onnx.save(model, path)

    done = bitwright("verify", logarithm, "-q")
    assert done.status == 1
    assert "Proven" not in done.out
    first, second = done.err.splitlines()
    assert f"not proven: {logarithm}: integer.onnx, operator log (Log): expected int8 codes within 0" in first
    assert (
        "table of log: expected codes within 0 step(s) of the function's; found 3. The model, the file or plan.json has"
        in second
    )
    row = done.out[done.out.index("Tables, same input codes") :].splitlines()[2].split()
    assert (row[:4], row[-1]) == (["log", "Log", "int8", "3"], "no")
    assert json.loads(bitwright("verify", logarithm, "-q", "--json").out)["broken"]


# --- what is printed ---------------------------------------------------------------------------------------------

PROOF = (
    "Proof, same input codes: steps by which output codes differ, share that does, share in ties",
    "operator kind codes steps share ties elements",
)
TABLES = (
    "Tables, same input codes: steps by which they differ from their functions, and whether their error explains it",
    "operator function codes steps error [steps] explained",
)
#: Columns of a narrow terminal, less those that an operator's name needs.
NARROW = 80 - 20


def test_what_is_printed_has_titles_and_a_verdict(bitwright: Command, written: Path) -> None:
    printed = bitwright("verify", written, "-q").out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    # Numbers are not wrapped, nor are their titles.
    assert max(len(titles) for _, titles in (PROOF, TABLES)) <= NARROW

    found = json.loads(bitwright("verify", written, "-q", "--json").out)
    for name in ("qdq.onnx", "integer.onnx"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: ONNX Runtime against"))
        assert tuple(lines[start + 1 : start + 3]) == PROOF
        shown = {line.split()[0] for line in lines[start + 3 : start + 3 + len(found["operators"][name])]}
        assert shown == {row["name"] for row in found["operators"][name]} >= {"conv1", "classifier"}
    tables = lines.index(TABLES[0])
    assert lines[tables + 1] == TABLES[1]
    assert lines[tables + 2].split()[0] == found["tables"][0]["name"] == "sigmoid"
    assert lines[-1] == f"Proven on {SAMPLES} samples against plan.json: qdq.onnx and integer.onnx."


def test_the_rows_of_a_proof_lead_with_what_breaks_the_rule() -> None:
    """A wide operator may be two steps off, a narrow one may not differ often."""
    wide, narrow = OpDifference("a", "Mean", INT16, 2, 9, 10), OpDifference("b", "Conv", INT8, 1, 99, 1000, 9)

    assert (wide.holds, narrow.holds) == (True, False)
    table = proof(wide, narrow).table(worst_first=True)
    assert [row["name"] for row in table.rows] == ["b", "a"]
    assert dict(zip(table.headers(), table.cells()[0], strict=True)) == {
        "operator": "b",
        "kind": "Conv",
        "codes": "int8",
        "steps": "1",
        "share": "0.090000",
        "ties": "0.009000",
        "elements": "1000",
    }
    assert [row["name"] for row in proof(wide, narrow).table().rows] == ["a", "b"]


def proof(*rows: OpDifference) -> Proof:
    whole = Agreement("disabled", 4, 1.0, 1.0, 1.0, 0)
    return Proof(rows, whole, whole)


def test_the_line_of_a_proof_tells_widths_and_ties_apart() -> None:
    """It once said that no code differs where 16-bit ones did, and 0.01% where nothing but ties did."""
    same, tied = OpDifference("a", "Conv", INT8, 0, 0, 10), OpDifference("a", "Conv", INT8, 1, 2, 10_000, 2)
    wide = OpDifference("b", "Mean", INT16, 1, 3, 1000)

    assert "operator: no 8-bit code differs; whole" in proof_line(proof(same))
    assert "no 8-bit code differs, 16-bit codes differ by 1 step(s), in 0.30% of an operator's at most;" in (
        proof_line(proof(same, wide))
    )
    assert "8-bit codes differ by 1 step(s), in ties alone, ties that" in proof_line(proof(tied))


def test_the_line_of_a_proof_says_where_onnx_runtime_fails() -> None:
    failed = replace(proof(), default=Agreement("default", 0, 0.0, 0.0, 0.0, None, "no kernel"))

    assert "At its default level ONNX Runtime cannot run the file: no kernel" in proof_line(failed)
