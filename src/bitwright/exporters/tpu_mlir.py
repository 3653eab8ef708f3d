"""The two text files of the tpu-mlir toolchain: which operators stay float, and the threshold of every value.

Formats as that toolchain reads them: one row each, fields separated by single blanks, `#` starts a comment. There an operator
is called after its output tensor, so rows of the qtable bear the name of the operator's first output value; where
the operator itself is called otherwise, a comment line before the row says so. A blank in a name, which no row could hold, is
written as `_`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bitwright.errors import PlanError
from bitwright.files import write_text
from bitwright.graph.graph import Graph
from bitwright.numerics.affine import THRESHOLD_FLOOR
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan

#: Modes that the toolchain knows for a row of the qtable.
MODES = (
    "F32",
    "F16",
    "BF16",
    "INT8",
    "INT4",
    "W4INT8",
    "F8E4M3",
    "F8E5M2",
    "W8F16",
    "W8BF16",
    "W4F16",
    "W4BF16",
)

_ROW = re.compile(r"(\S+)\s+(\S+)\s+(\S+)\s+(\S+)")
#: Comment lines that end the threshold rows and start a block of another kind.
_OTHER_BLOCKS = ("#asym_op", "#int4_th", "#int4_op", "#weight_scale", "#tpu-mlir-fp8", "#mqbench-fp8")


@dataclass(frozen=True)
class Threshold:
    """One row of a calibration table, real units. *lo*, *hi*: the true extremes."""

    threshold: float
    lo: float
    hi: float


# --- qtable ------------------------------------------------------------------------------------------------------


def write_qtable(
    path: Path,
    graph: Graph,
    plan: Plan,
    *,
    samples: int,
    float_mode: str = "F32",
    created: datetime | None = None,
) -> None:
    """Write the operators of *plan*'s groups that are not int8, every member. *float_mode*: what float ones shall be computed in; those with
    int4 weights are W4INT8, those at int16, for which there is no mode, are named in comments.

    *samples*: how many the search looked at (for the header). *created*: default now. *raises* `OutputError` if *path*
    cannot be written.
    """
    modes = {"float": float_mode, "w4a8": "W4INT8"}
    rows = [(op, plan.precision(g)) for g, members in plan.groups.items() for op in members]
    listed = [(op, modes[p]) for op, p in rows if p in modes]
    lines = [
        _created(created),
        f"# sample number: {samples}",
        f"# chip: {plan.target}  mix_mode: {float_mode}",
        f"# number of {float_mode} layer: {sum(mode == float_mode for _, mode in listed)}",
        "# rows bear the name of the operator's output tensor",
        *(f"# int16, which has no mode here: {op}" for op, p in rows if p == "int16"),
        "###",
        "# op_name   quantize_mode",
    ]
    for op, mode in listed:
        value = _name(next(o for o in graph.op(op).outputs if o))
        lines += [f"# operator {op}"] * (op != value) + [f"{value} {mode}"]
    write_text(path, "\n".join(lines) + "\n")


def read_qtable(path: Path) -> dict[str, str]:
    """Rows of a qtable: name -> mode. *raises* `PlanError` naming the line that is broken."""
    rows: dict[str, str] = {}
    for number, line in _lines(path):
        fields = line.split()
        if fields[0].startswith("#"):
            continue
        if len(fields) not in (2, 3) or fields[1] not in MODES:
            raise PlanError(
                f"{path}, line {number}",
                expected=f"`name MODE`, with a mode of {', '.join(MODES)}",
                found=repr(line),
                remedy="Mend the line; the toolchain refuses the whole file.",
            )
        rows[fields[0]] = fields[1]
    return rows


# --- calibration table -------------------------------------------------------------------------------------------


def write_calibration_table(
    path: Path,
    graph: Graph,
    plan: Plan,
    extremes: Mapping[str, tuple[float, float]],
    *,
    samples: int,
    method: str = "per row",
    histogram_bins: int = 2048,
    created: datetime | None = None,
) -> None:
    """Write the threshold and the true extremes of every real value that is not constant, in execution order.

    *extremes*: value -> smallest and largest number seen, real units. A value without parameters (in the accumulator, or
    between float operators) has the larger magnitude of its extremes as threshold; values not in *extremes* have no row.
    *samples*, *method*, *histogram_bins*: for the header. *raises* `OutputError`.
    """
    lines = [
        "# cali version 1.0",
        _created(created),
        f"# quantization threshold calculation method: {method}",
        f"# histogram number: {histogram_bins}",
        f"# sample number: {samples}",
        "###",
        "# tune number: 0",
        "###",
        "# op_name    threshold    min    max",
    ]
    for name, value in graph.values.items():
        if value.is_constant or not value.info.is_float or name not in extremes:
            continue
        lo, hi = extremes[name]
        threshold = _threshold(plan.qparams(name), lo, hi)
        lines.append(f"{_name(name)} {threshold:.7f} {lo:.7f} {hi:.7f}")
    write_text(path, "\n".join(lines) + "\n")


def _threshold(q: QParams | None, lo: float, hi: float) -> float:
    """What of a value is represented: scale * qmax, or the farther end of an asymmetric range."""
    if q is None:
        found = max(abs(lo), abs(hi))
    elif q.spec.symmetric:
        found = q.scale[0] * q.spec.dtype.qmax
    else:
        found = max(abs(end) for end in q.limits)
    return max(found, THRESHOLD_FLOOR)


def read_calibration_table(path: Path) -> dict[str, Threshold]:
    """Rows of a calibration table, up to the first block of another kind. *raises* `PlanError` naming a broken line."""
    rows: dict[str, Threshold] = {}
    for number, line in _lines(path):
        if line.replace(" ", "").startswith(_OTHER_BLOCKS):
            break
        if line.startswith("#"):
            continue
        found = _ROW.fullmatch(line)
        try:
            if found is None:
                raise ValueError
            threshold, lo, hi = (float(found[i]) for i in (2, 3, 4))
        except ValueError:
            raise PlanError(
                f"{path}, line {number}",
                expected="`name threshold min max`, the last three numbers",
                found=repr(line),
                remedy="Mend the line, or calibrate again.",
            ) from None
        rows[found[1]] = Threshold(threshold, lo, hi)
    return rows


# --- both --------------------------------------------------------------------------------------------------------


def _created(when: datetime | None) -> str:
    # The word is spelled as the toolchain's own files spell it.
    return f"# genetated time: {(when or datetime.now(UTC)).strftime('%Y-%m-%d %H:%M:%S.%f')}"


def _name(name: str) -> str:
    """*name* as a field: what would end the field or start a comment becomes `_`."""
    return re.sub(r"\s|^#", "_", name)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(
            str(path), expected="a readable text file", found=str(e), remedy="Check the path."
        ) from e
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
