"""The qtable and the calibration table, as that toolchain reads them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from export_cases import Builder, residual, solved

from bitwright.errors import PlanError
from bitwright.exporters.tpu_mlir import (
    Threshold,
    read_calibration_table,
    read_qtable,
    write_calibration_table,
    write_qtable,
)
from bitwright.numerics.dtype import INT8, UINT8
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.ops.unary import Unary
from bitwright.plan.plan import ValueEntry

NOON = datetime(2026, 1, 2, 12, 0, 0, 250_000, tzinfo=UTC)

GOLDEN_QTABLE = """\
# genetated time: 2026-01-02 12:00:00.250000
# sample number: 30
# chip: generic-int8  mix_mode: F32
# number of F32 layer: 3
# rows bear the name of the operator's output tensor
###
# op_name   quantize_mode
conv1 F32
relu1 F32
fc F32
"""

GOLDEN_TABLE = """\
# cali version 1.0
# genetated time: 2026-01-02 12:00:00.250000
# quantization threshold calculation method: kl
# histogram number: 2048
# sample number: 100
###
# tune number: 0
###
# op_name    threshold    min    max
x 12.7000000 -2.5000000 3.0000000
y 22.7000000 -1.0000000 30.0000000
z 0.0000100 0.0000000 0.0000000
"""


def test_the_qtable_lists_every_member_of_the_float_groups(tmp_path: Path) -> None:
    graph = residual()
    plan = solved(graph, "generic-int8", asked={"conv1": "float", "fc": "float"})
    write_qtable(tmp_path / "q", graph, plan, samples=30, created=NOON)
    assert (tmp_path / "q").read_text() == GOLDEN_QTABLE
    assert read_qtable(tmp_path / "q") == {"conv1": "F32", "relu1": "F32", "fc": "F32"}


def test_the_qtable_gives_int4_weights_their_mode_and_names_int16_in_comments(tmp_path: Path) -> None:
    graph = residual()
    plan = solved(
        graph, "onnxruntime", asked={"conv1": "w4a8", "relu1": "int8", "fc": "int16", "conv2": "float"}
    )
    write_qtable(tmp_path / "q", graph, plan, samples=1)
    assert read_qtable(tmp_path / "q") == {"conv1": "W4INT8", "relu1": "W4INT8", "conv2": "F32"}
    text = (tmp_path / "q").read_text()
    assert "# number of F32 layer: 1\n" in text
    assert "# int16, which has no mode here: fc\n" in text


def test_the_qtable_of_an_all_quantized_plan_has_no_rows(tmp_path: Path) -> None:
    graph = residual()
    write_qtable(tmp_path / "q", graph, solved(graph, "generic-int8"), samples=1)
    assert read_qtable(tmp_path / "q") == {}


def test_rows_bear_value_names_and_comments_operator_names(tmp_path: Path) -> None:
    b = Builder()
    b.op(Unary("Relu"), "node name", b.input("x", None, 4), outputs=["/out 0"])
    graph = b.done("/out 0")
    plan = solved(graph, "generic-int8", asked={"node name": "float"})
    write_qtable(tmp_path / "q", graph, plan, samples=1, float_mode="BF16")
    assert (tmp_path / "q").read_text().endswith("# operator node name\n/out_0 BF16\n")
    assert read_qtable(tmp_path / "q") == {"/out_0": "BF16"}


@pytest.mark.parametrize("line", ["conv1", "conv1 FLOAT", "conv1 F32 8 9"])
def test_a_broken_qtable_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "q").write_text(f"# header\n\nfc F32\n{line}\n")
    with pytest.raises(PlanError, match=rf"q, line 4: .*found '{line}'"):
        read_qtable(tmp_path / "q")


def test_a_group_size_may_follow_the_mode(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("fc W4INT8 64\n")
    assert read_qtable(tmp_path / "q") == {"fc": "W4INT8"}


def three_values() -> tuple:
    b = Builder()
    y = b.op(Unary("Relu"), "y", b.input("x", None, 4))
    graph = b.done(b.op(Unary("Tanh"), "z", y))
    symmetric = QParams(QuantSpec(INT8, True), (0.1,), (0,))
    asymmetric = QParams(QuantSpec(UINT8, False), (0.1,), (28,))
    plan = solved(graph, "generic-int8")
    entries = {"x": symmetric, "y": asymmetric, "z": None}
    values = {n: ValueEntry("activation", "kl", qparams=q) for n, q in entries.items()}
    return graph, replace(plan, values=values)


def test_the_calibration_table_is_as_golden(tmp_path: Path) -> None:
    graph, plan = three_values()
    extremes = {"x": (-2.5, 3.0), "y": (-1.0, 30.0), "z": (0.0, 0.0)}
    write_calibration_table(tmp_path / "t", graph, plan, extremes, samples=100, method="kl", created=NOON)
    assert (tmp_path / "t").read_text() == GOLDEN_TABLE
    assert read_calibration_table(tmp_path / "t")["y"] == Threshold(22.7, -1.0, 30.0)


def test_inner_values_have_a_row_with_their_own_maximum(tmp_path: Path) -> None:
    graph = residual()
    plan = solved(graph, "generic-int8")
    extremes = {name: (-1.0 - i, 2.0) for i, name in enumerate(graph.values)}
    write_calibration_table(tmp_path / "t", graph, plan, extremes, samples=16)
    rows = read_calibration_table(tmp_path / "t")
    assert list(rows) == ["x", "conv1", "relu1", "conv2", "add", "relu2", "flatten", "fc"]
    assert rows["conv1"].threshold == 1.0 + list(graph.values).index("conv1")
    q = plan.qparams("relu1")
    assert q is not None
    assert rows["relu1"].threshold == pytest.approx(q.scale[0] * 127, abs=1e-7)


def test_every_row_has_four_fields_and_seven_decimals(tmp_path: Path) -> None:
    graph = residual()
    extremes = dict.fromkeys(graph.values, (-np.pi, 1000000.0 / 3))
    write_calibration_table(tmp_path / "t", graph, solved(graph, "onnxruntime"), extremes, samples=16)
    rows = [line.split(" ") for line in (tmp_path / "t").read_text().splitlines() if not line.startswith("#")]
    assert all(len(row) == 4 for row in rows)
    assert all(len(number.partition(".")[2]) == 7 for row in rows for number in row[1:])


def test_values_that_were_never_seen_have_no_row(tmp_path: Path) -> None:
    graph = residual()
    write_calibration_table(
        tmp_path / "t", graph, solved(graph, "generic-int8"), {"fc": (-1.0, 1.0)}, samples=1
    )
    assert list(read_calibration_table(tmp_path / "t")) == ["fc"]


@pytest.mark.parametrize("line", ["conv1 1.0 2.0", "conv1 1.0 low 3.0", "a b 1.0 2.0 3.0"])
def test_a_broken_calibration_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "t").write_text(f"# head\nx 1 -1 1\n{line}\n")
    with pytest.raises(PlanError, match=rf"t, line 3: .*found '{line}'"):
        read_calibration_table(tmp_path / "t")


def test_rows_after_another_block_are_not_thresholds(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x 1.0 -1.0 1.0\n#asym_op\nconv1\n")
    assert list(read_calibration_table(tmp_path / "t")) == ["x"]


@pytest.mark.parametrize("read", [read_qtable, read_calibration_table])
def test_a_missing_file_is_an_error(tmp_path: Path, read) -> None:
    with pytest.raises(PlanError, match="absent: expected a readable text file"):
        read(tmp_path / "absent")
