"""`verify`: what it says of folders whose files, plan or data are not what they were, and how proofs read on the screen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.cli_cases import Command

from bitwright.cli.results import proof_line
from bitwright.numerics.dtype import INT8, INT16
from bitwright.runtime.proof import Agreement, OpDifference, Proof


@pytest.fixture
def written(bitwright: Command, model: Path, data: Path, tmp_path: Path) -> Path:
    """A folder with both files, made from data and labels that can be moved."""
    shutil.copy(data, tmp_path / "samples.npz")
    out = tmp_path / "out"
    done = bitwright(
        "quantize", model, "--data", tmp_path / "samples.npz", "--export", "both", "-o", out, "-q"
    )
    assert done.status == 0
    return out


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
