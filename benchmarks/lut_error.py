"""Error of 16-bit look-up tables, in output steps, for every function, way of dividing and number of segments, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared import RESULTS, save, timed
from bitwright.numerics.affine import qparams_from_range
from bitwright.numerics.dtype import INT16
from bitwright.numerics.lut import TableSettings, build_table
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.table import Column, Table

STRATEGIES = ("evenly", "curvature", "mix", "optimal")
#: Numbers of segments for each kind of inputs.
COUNTS = {"even": (6, 12, 24, 48, 96), "bell": (6, 24)}

#: Name -> function, and the real inputs it is given.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exp": (torch.exp, -12, 0),
    "log": (torch.log, 0.01, 20),
    "sigmoid": (torch.sigmoid, -9, 9),
    "tanh": (torch.tanh, -5, 5),
    "erf": (torch.erf, -3, 3),
    "gelu": (F.gelu, -8, 8),
    "gelu (tanh)": (partial(F.gelu, approximate="tanh"), -8, 8),
    "silu": (F.silu, -8, 12),
    "mish": (F.mish, -8, 8),
    "softplus": (F.softplus, -10, 10),
    "elu": (F.elu, -6, 6),
    "selu": (F.selu, -6, 6),
    "celu": (partial(F.celu, alpha=0.7), -6, 6),
    "hardswish": (F.hardswish, -6, 6),
    "hardsigmoid": (F.hardsigmoid, -6, 6),
    "sqrt": (torch.sqrt, 0, 30),
    "rsqrt": (torch.rsqrt, 0.02, 10),
    "reciprocal": (torch.reciprocal, 0.1, 40),
    "sin": (torch.sin, -10, 10),
    "cos": (torch.cos, -10, 10),
    "tan": (torch.tan, -1.4, 1.4),
    "asin": (torch.asin, -1, 1),
    "acos": (torch.acos, -1, 1),
    "atan": (torch.atan, -20, 20),
    "sinh": (torch.sinh, -4, 4),
    "cosh": (torch.cosh, -4, 4),
    "asinh": (torch.asinh, -20, 20),
    "acosh": (torch.acosh, 1, 20),
    "atanh": (torch.atanh, -0.99, 0.99),
    "pow 1.5": (partial(torch.pow, exponent=1.5), 0, 8),
    "pow -2": (partial(torch.pow, exponent=-2.0), 0.2, 8),
}
PERIODIC = {"sin": 2 * math.pi, "cos": 2 * math.pi}

Weights = npt.NDArray[np.float64]


def codes_of(name: str) -> tuple[QParams, QParams]:
    """Symmetric int16 parameters of the inputs and of what the function makes of them."""
    function, lo, hi = FUNCTIONS[name]
    y = function(torch.linspace(lo, hi, 4001, dtype=torch.float64))
    spec = QuantSpec(INT16, symmetric=True)
    return qparams_from_range(spec, [lo], [hi]), qparams_from_range(spec, [float(y.min())], [float(y.max())])


def histograms(name: str, q_in: QParams) -> dict[str, Weights]:
    """Inputs evenly spread over the range; and a bell in its middle, 3 standard deviations to each end."""
    _, lo, hi = FUNCTIONS[name]
    x = np.arange(INT16.qmin, INT16.qmax + 1) * q_in.scale[0]
    inside = ((x >= lo) & (x <= hi)).astype(np.float64)
    deviation = (hi - lo) / 6
    return {"even": inside, "bell": inside * np.exp(-0.5 * ((x - (lo + hi) / 2) / deviation) ** 2)}


def measure(name: str) -> list[dict[str, Any]]:
    """A row for each kind of table."""
    function = FUNCTIONS[name][0]
    q_in, q_out = codes_of(name)
    rows = []
    for inputs, weights in histograms(name, q_in).items():
        counts = COUNTS[inputs]
        made = {(s, n): TableSettings(strategy=s, num_tables=n) for n in counts for s in STRATEGIES}
        made["regular", 0] = TableSettings(form="regular")
        if name in PERIODIC:
            made |= {("one period", n): TableSettings(period=PERIODIC[name], num_tables=n) for n in counts}
        for (strategy, count), settings in made.items():
            table = build_table(function, q_in, q_out, settings, weights=weights, where=name)
            largest, rms = table.error(function, weights=weights)
            rows.append(
                {"function": name, "inputs": inputs, "strategy": strategy, "num_tables": count}
                | {"max": round(largest, 4), "rms": round(rms, 4)}
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of `evenly` to `optimal` over the functions, and how many functions each strategy brings below two steps."""
    found: dict[str, Any] = {}
    for inputs, counts in COUNTS.items():
        for count in counts:
            some = [r for r in rows if r["inputs"] == inputs and r["num_tables"] == count]
            by = {s: {r["function"]: r for r in some if r["strategy"] == s} for s in STRATEGIES}
            ratio = {k: [by["evenly"][f][k] / by["optimal"][f][k] for f in FUNCTIONS] for k in ("rms", "max")}
            found[f"{inputs} {count}"] = {
                "evenly_to_optimal_rms_median": round(float(np.median(ratio["rms"])), 2),
                "evenly_to_optimal_rms_largest": round(max(ratio["rms"]), 1),
                "evenly_to_optimal_max_median": round(float(np.median(ratio["max"])), 2),
                "functions_within_2_steps": {
                    s: sum(r["max"] <= 2 for r in by[s].values()) for s in STRATEGIES
                },
                "worst": {s: max((r["max"], f) for f, r in by[s].items()) for s in STRATEGIES},
            }
    return found


def fixed_places(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest errors of tables whose entries lie at fixed places: 513 over the range; one period of sine and cosine."""
    even = [r for r in rows if r["inputs"] == "even"]
    regular = {r["function"]: r["max"] for r in even if r["strategy"] == "regular"}
    periods = [r for r in even if r["strategy"] == "one period"]
    return {
        "regular": {
            "within_2_steps": sum(x <= 2 for x in regular.values()),
            "worst": max((x, f) for f, x in regular.items()),
        },
        "one_period": {n: max(r["max"] for r in periods if r["num_tables"] == n) for n in COUNTS["even"]},
    }


def sections(rows: list[dict[str, Any]]) -> tuple[Section, ...]:
    """RMS against the number of segments, a plot for each function, inputs evenly spread."""
    columns = (Column("num_tables", "segments"), *(Column(s, s, "steps RMS", 3) for s in STRATEGIES))
    curve = Curve("num_tables", STRATEGIES, log=True)
    made = []
    for name in FUNCTIONS:
        mine = [r for r in rows if r["function"] == name and r["inputs"] == "even"]
        by_count = tuple(
            {"num_tables": n, **{r["strategy"]: r["rms"] for r in mine if r["num_tables"] == n}}
            for n in COUNTS["even"]
        )
        made.append(Section(Table(name, columns, by_count), curve=curve))
    return tuple(made)


def main() -> None:
    torch.set_num_threads(1)
    rows, seconds = timed(lambda: [row for name in FUNCTIONS for row in measure(name)])
    columns = (
        Column("function", "function"),
        Column("inputs", "inputs"),
        Column("strategy", "strategy"),
        Column("num_tables", "segments"),
        Column("max", "largest error", "steps", 4),
        Column("rms", "RMS error", "steps", 4),
    )
    RESULTS.mkdir(exist_ok=True)
    csv = Table("errors of look-up tables", columns, tuple(rows)).to_csv()
    (RESULTS / "lut_error.csv").write_text(csv)
    said = "int16 to int16, inputs evenly spread over the range of each function; half a step is the output's own rounding"
    write_page(RESULTS / "lut_error.html", Page("Errors of look-up tables", said, sections(rows)))
    save(
        "lut_error",
        {"functions": len(FUNCTIONS), "seconds": round(seconds, 1), **summary(rows), **fixed_places(rows)},
    )


if __name__ == "__main__":
    main()
