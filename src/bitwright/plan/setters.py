"""The ready-made setters, under the names that users of such toolchains know."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.errors import PlanError
from bitwright.plan.qconfig import (
    FakeQuantConfig,
    QConfig,
    SensitiveOpsQconfigSetter,
    UniformQconfigSetter,
    get_default_qconfig,
    with_dtype,
)

#: Ranges that best keep the float model's answers; see `benchmarks/`.
CALIBRATION = get_default_qconfig(activation_observer="mse")
#: Ranges that go on following the values.
QAT = get_default_qconfig()
#: Ranges that stay as they were loaded.
FIXED = get_default_qconfig(activation_qkwargs={"averaging_constant": 0.0})


def _uniform(
    title: str, qconfig: QConfig, activation: str = "int8", weight: str = "int8"
) -> UniformQconfigSetter:
    return UniformQconfigSetter(with_dtype(qconfig, activation=activation, weight=weight), title)


default_calibration_qconfig_setter = _uniform("default_calibration", CALIBRATION)
default_qat_qconfig_setter = _uniform("default_qat", QAT)
default_qat_fixed_act_qconfig_setter = _uniform("default_qat_fixed_act", FIXED)
calibration_8bit_weight_16bit_act_qconfig_setter = _uniform(
    "calibration_8bit_weight_16bit_act", CALIBRATION, "int16"
)
qat_8bit_weight_16bit_act_qconfig_setter = _uniform("qat_8bit_weight_16bit_act", QAT, "int16")
qat_8bit_weight_16bit_fixed_act_qconfig_setter = _uniform("qat_8bit_weight_16bit_fixed_act", FIXED, "int16")
#: Of 15 codes none is to spare for the largest weight, and a scale that followed it would move all codes at every step.
INT4_WEIGHT = FakeQuantConfig(observer="mse", dtype="int4", options={"averaging_constant": 0.0})
calibration_4bit_weight_8bit_act_qconfig_setter = UniformQconfigSetter(
    replace(CALIBRATION, weight=INT4_WEIGHT), "calibration_4bit_weight_8bit_act"
)
qat_4bit_weight_8bit_act_qconfig_setter = UniformQconfigSetter(
    replace(QAT, weight=INT4_WEIGHT), "qat_4bit_weight_8bit_act"
)
qat_4bit_weight_8bit_fixed_act_qconfig_setter = UniformQconfigSetter(
    replace(FIXED, weight=INT4_WEIGHT), "qat_4bit_weight_8bit_fixed_act"
)


def sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(
    table: Any, *, topk: int | None = None, ratio: float | None = None
) -> SensitiveOpsQconfigSetter:
    """For calibration: int16 activations for the most sensitive operators, int8 for the rest. See `sensitive_names`."""
    return _sensitive("sensitive_op_calibration", CALIBRATION, table, topk, ratio)


def sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(
    table: Any, *, topk: int | None = None, ratio: float | None = None
) -> SensitiveOpsQconfigSetter:
    """For training: int16 activations for the most sensitive operators, int8 for the rest. See `sensitive_names`."""
    return _sensitive("sensitive_op_qat", QAT, table, topk, ratio)


def sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter(
    table: Any, *, topk: int | None = None, ratio: float | None = None
) -> SensitiveOpsQconfigSetter:
    """As `sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter`, with activation ranges that stay as loaded."""
    return _sensitive("sensitive_op_qat_fixed_act", FIXED, table, topk, ratio)


def _sensitive(
    title: str, qconfig: QConfig, table: Any, topk: int | None, ratio: float | None
) -> SensitiveOpsQconfigSetter:
    names = sensitive_names(table, topk=topk, ratio=ratio)
    high, low = with_dtype(qconfig, activation="int16"), with_dtype(qconfig)
    return SensitiveOpsQconfigSetter(frozenset(names), high, low, title)


def sensitive_names(table: Any, *, topk: int | None = None, ratio: float | None = None) -> list[str]:
    """The most sensitive operators of *table*: the first *topk*, or the first *ratio* (0..1) of them, rounded up.

    *table*: a `sensitivity.csv`, the rows of a sensitivity run, a list of `[operator, …]` or of names, most sensitive
    first; or a list of such tables, one per output: then the union. *raises* `PlanError`.
    """
    tables = table if _are_tables(table) else [table]
    chosen: dict[str, None] = {}
    for one in tables:
        names = list(dict.fromkeys(_names(one)))
        if not names:
            raise _unreadable("an empty one")
        chosen.update(dict.fromkeys(names[: _count(len(names), topk, ratio)]))
    return list(chosen)


def _are_tables(table: Any) -> bool:
    if not isinstance(table, (list, tuple)) or not table:
        return False
    first = table[0]
    if isinstance(first, (str, Path)):
        return all(str(t).endswith(".csv") for t in table)
    return isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], (list, tuple))


def _count(length: int, topk: int | None, ratio: float | None) -> int:
    if (topk is None) == (ratio is None):
        raise PlanError(
            "sensitive operators",
            expected="topk= or ratio=",
            found="both" if topk is not None else "neither",
            remedy="Say how many operators get int16, e.g. topk=5 or ratio=0.1.",
        )
    if (topk is not None and topk < 0) or (ratio is not None and not 0.0 <= ratio <= 1.0):
        raise PlanError(
            "sensitive operators",
            expected="topk >= 0, or 0 <= ratio <= 1",
            found=f"topk={topk}, ratio={ratio}",
            remedy="Mend the number.",
        )
    return topk if topk is not None else math.ceil((ratio or 0.0) * length)


def _names(table: Any) -> Iterable[str]:
    if isinstance(table, (str, Path)):
        return _names_in_file(Path(table))
    if hasattr(table, "rows"):  # a `Table`, or the result of a sensitivity run
        table = table.rows
    if not isinstance(table, Sequence):
        raise _unreadable(type(table).__name__)
    return [_name(row) for row in table]


def _name(row: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping) and "name" in row:
        return str(row["name"])
    if isinstance(row, (list, tuple)) and row and isinstance(row[0], str):
        return row[0]
    if isinstance(getattr(row, "name", None), str):
        return str(row.name)
    raise _unreadable(repr(row)[:80])


def _names_in_file(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as e:
        raise _unreadable(str(e)) from e
    if not rows or "name" not in rows[0]:
        raise _unreadable(f"{path}, without a column 'name'")
    return [row["name"] for row in rows]


def _unreadable(found: str) -> PlanError:
    return PlanError(
        "sensitivity table",
        expected="sensitivity.csv, the rows of a sensitivity run, or a list whose rows begin with an operator's name",
        found=found,
        remedy="Make one with `bitwright sensitivity`.",
    )
