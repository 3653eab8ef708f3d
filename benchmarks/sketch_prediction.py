"""Predicted against measured loss of random plans at 8, 6 and 4 bits: rank correlation, and a scatter plot.

    python -m benchmarks.sketch_prediction [mobilenetv2 | kwt1 | resnet20 | resnet32 | cct]

For each network and number of bits 120 plans: a random share of the operators, at that many bits for weights and activations, by a random
threshold method; the rest float. Predicted by the sketch with the default probes, measured by true runs on the same 30 samples.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.networks import NETWORKS, Network
from benchmarks.shared import RESULTS, loader, save
from benchmarks.sketch_speed import spearman
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.graph.replay import Reads
from bitwright.numerics.affine import qparams_from_range
from bitwright.numerics.dtype import DType
from bitwright.numerics.spec import QParams
from bitwright.plan.reads import quantized_reads
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.search.error_sketch import PROBES, ErrorSketch, effective_reads
from bitwright.search.sensitivity import METHODS
from bitwright.table import Column, Table

BITS = (8, 6, 4)
PLANS = 120


def narrowed(q: QParams, bits: int) -> QParams:
    """The same range in fewer bits. Biases keep theirs."""
    dtype = q.spec.dtype
    if bits == 8 or dtype.bits > 8:
        return q
    spec = replace(q.spec, dtype=DType(bits, dtype.signed))
    pairs = zip(q.scale, q.zero_point, strict=True)
    ends = [((dtype.qmin - z) * s, (dtype.qmax - z) * s) for s, z in pairs]
    low, high = zip(*(((-e[1], e[1]) if q.spec.symmetric else e) for e in ends), strict=True)
    return qparams_from_range(spec, low, high)


def random_plans(bench: Bench, bits: int, rng: np.random.Generator) -> list[Reads]:
    """The reads of `PLANS` random plans."""
    activations = [n for n, e in bench.plan.values.items() if e.role == "activation"]
    solved = {m: bench.solver.solve(bench.plan.with_methods(dict.fromkeys(activations, m))) for m in METHODS}
    found: list[Reads] = []
    memo: dict[tuple[int, int], QParams] = {}
    while len(found) < PLANS:
        share, plan = rng.uniform(0.05, 1.0), solved[METHODS[rng.integers(len(METHODS))]]
        left = [g for g in plan.groups if rng.random() > share]
        reads = quantized_reads(bench.graph, plan.with_precision(left, "float", "random"))
        if not reads:
            continue
        found.append({e: memo.setdefault((id(q), bits), narrowed(q, bits)) for e, q in reads.items()})
    return found


def plain_square(sketch: ErrorSketch, reads: Reads) -> float:
    """The form that takes roundings for what they are on clean inputs: the square of the sum of all errors (docs/error-sketch.md §3.1)."""
    errors = [sketch.error(e, q) for e, q in effective_reads(sketch.evaluator.graph, reads).items()]
    return sketch.loss_of(sum(errors[1:], errors[0]) ** 2).loss


def measure(network: Network) -> tuple[dict[str, Any], Table]:
    settings = Settings(target="generic-int8", input_num=100, inference_num=30)
    bench = open_bench(network.model, network.calibration, settings, Silence())
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"probes": PROBES, "plans": PLANS, "bits": {}}
    rows = []
    for bits in BITS:
        plans = random_plans(bench, bits, rng)
        sketch = ErrorSketch(bench.evaluator)
        sketch.measure(sketch.missing(plans))
        told = [sketch.predict(reads).loss for reads in plans]
        true = [float(bench.evaluator.losses(reads).mean()) for reads in plans]
        plain = [plain_square(sketch, reads) for reads in plans]
        ratios = np.array(true) / np.array(told)
        result["bits"][bits] = {
            "spearman": spearman(true, told),
            "spearman_of_the_plain_square": spearman(true, plain),
            "measured_loss": [float(f"{x:.4g}") for x in np.quantile(true, (0, 0.5, 1))],
            "measured_to_predicted": [round(float(x), 3) for x in np.quantile(ratios, (0.05, 0.5, 0.95))],
        }
        rows += [
            {"predicted": t, f"measured{bits}": m, "bits": bits} for t, m in zip(told, true, strict=True)
        ]
        print(network.name, bits, result["bits"][bits], flush=True)
    columns = (
        Column("predicted", "predicted loss", "", 6),
        *(Column(f"measured{b}", f"measured at {b} bits", "", 6) for b in BITS),
    )
    return result, Table(f"{network.name}: loss (1 - cosine) of random plans", columns, tuple(rows))


def main() -> None:
    load = loader()
    for name in sys.argv[1:] or ("mobilenetv2", "kwt1", "resnet20", "resnet32", "cct"):
        result, table = measure(NETWORKS[name](load))
        save(f"sketch_prediction_{name}", {"model": name, **result})
        curve = Curve("predicted", tuple(f"measured{b}" for b in BITS), log=True, lines=False, diagonal=True)
        page = Page(f"Error sketch: {name}", f"{PROBES} probes, 30 samples", (Section(table, curve=curve),))
        write_page(RESULTS / f"sketch_prediction_{name}.html", page)


if __name__ == "__main__":
    main()
