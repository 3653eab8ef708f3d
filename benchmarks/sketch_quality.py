"""What is left of the accuracy when 1, 2, 5 or 10 operators stay float, by four ways to choose them.

    python -m benchmarks.sketch_quality [mobilenetv2 | kwt1 | resnet20 | resnet32 | cct]

exact: the largest exact losses of single operators. sketch: the largest sketched ones. joint: the sketch's joint optimisation with one new
linearisation, and its single ones beside it, true runs deciding: what `search --budget ops=N` does. walk: the mixed-precision walk with that many operators at most. All begin with the same int8 network
(largest magnitudes as thresholds, target generic-int8). Similarity and top-1 are those of the labelled test data, which no way has seen; MobileNetV2
searches on 50 pictures and is measured on 450 others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.networks import NETWORKS, Network, with_labels
from benchmarks.shared import loader, save
from bitwright.flow.accuracy import measure_accuracy
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.plan.cost import measure_costs
from bitwright.plan.plan import Plan
from bitwright.search.choose import float_top, widest_top
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.joint_precision import Goal, JointPrecision
from bitwright.search.mixed_precision import search_mixed_precision
from bitwright.search.sensitivity import Sensitivity, candidate_reads, measure_sensitivity
from bitwright.search.sketched import sketch_sensitivity
from bitwright.search.state import SearchState

COUNTS = (1, 2, 5, 10)
METHOD = "max"


def joint(bench: Bench, sketch: ErrorSketch, singles: Sequence[Sensitivity], count: int) -> Plan:
    options = {g: ["int8", "float"] for g in bench.plan.groups}
    costs = measure_costs(bench.graph, bench.plan, bench.target, "ops")
    search = JointPrecision(bench.evaluator, bench.plan, bench.solver.solve, options, costs)  # type: ignore[arg-type]
    found = search.search(
        sketch,
        Goal(None, count),
        around=lambda reads: ErrorSketch(bench.evaluator, base=reads),
        alternatives=[widest_top(singles, options, costs, count)],  # type: ignore[arg-type]
    )
    return found.choice.plan


def walk(bench: Bench, count: int) -> Plan:
    return search_mixed_precision(
        bench.evaluator,
        bench.plan,
        bench.solver.solve,
        target=1.0,
        min_layer_similarity=0.99,
        limit=count,
        state=SearchState(None, ""),
    ).plan


def measure(network: Network) -> dict[str, Any]:
    settings = Settings(target="generic-int8", method=METHOD, input_num=100, inference_num=30)
    bench = open_bench(network.model, network.calibration, settings, Silence())
    solve, plan = bench.solver.solve, bench.plan
    sketch = ErrorSketch(bench.evaluator)
    singles, _ = sketch_sensitivity(sketch, plan, candidate_reads(bench.graph, plan, solve, [METHOD]))
    exact = measure_sensitivity(bench.evaluator, plan, solve, methods=[METHOD])
    plans: dict[str, Plan | None] = {"float": None, "int8": plan}
    for count in COUNTS:
        plans |= {
            f"exact {count}": float_top(bench.evaluator, plan, exact, count, solve).plan,
            f"sketch {count}": float_top(bench.evaluator, plan, singles, count, solve).plan,
            f"joint {count}": joint(bench, sketch, singles, count),
            f"walk {count}": walk(bench, count),
        }
    labelled = with_labels(bench, network, settings)
    accuracy = measure_accuracy(labelled, plans, Silence())
    result: dict[str, Any] = {"groups": len(plan.groups), "measured_on": network.measured_on, "plans": {}}
    for name, p in plans.items():
        floats = [] if p is None else [g for g in p.groups if p.precision(g) == "float"]
        result["plans"][name] = {
            "top1": round(100 * accuracy[name].top1, 2),
            "search_cosine": 1.0 if p is None else round(bench.evaluator.evaluate(p), 6),
            "float_ops": floats,
        }
        print(
            network.name,
            name,
            result["plans"][name]["top1"],
            result["plans"][name]["search_cosine"],
            flush=True,
        )
    return result


def main() -> None:
    load = loader()
    for name in sys.argv[1:] or ("mobilenetv2", "kwt1", "resnet20", "resnet32", "cct"):
        save(f"sketch_quality_{name}", {"model": name, **measure(NETWORKS[name](load))})


if __name__ == "__main__":
    main()
