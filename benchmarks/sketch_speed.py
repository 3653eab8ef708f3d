"""The error sketch against the exact search and the naive loop: time, ranks, peak memory.

    python -m benchmarks.sketch_speed [mobilenetv2 | kwt1 | resnet20 | resnet32 | cct]

All operators × 3 methods × 30 samples, in one run for each network. Ranks are compared over all candidates (operator × method) and over
operators (each by its best method); the noise ceiling beside them is the correlation of the exact losses on one half of the samples with
those on the other half. A member of the exact top 5 counts as found if it is in the sketch's top 5; as tied if its sketched loss is
within one standard error (of the probes) of the sketch's fifth, or if its exact loss is within one standard error (over the samples) of
that of an operator which the sketch has in its top 5 instead.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.networks import NETWORKS, Network
from benchmarks.shared import PeakMemory, loader, save, timed
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.flow.tune import tune
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.sensitivity import METHODS, Sensitivity, candidate_reads, measure_sensitivity
from bitwright.search.sketched import sketch_sensitivity, verify_top
from bitwright.search.state import SearchState

PROBES = (1, 2, 4, 8, 32)
#: Target cosines of `tune`: what int8 misses.
EXPECTED = {"mobilenetv2": 0.995, "kwt1": 0.999, "resnet20": 0.999, "resnet32": 0.999, "cct": 0.9995}


def naive(bench: Bench) -> None:
    """Every candidate by running the whole network on all samples."""
    for by_method in candidate_reads(bench.graph, bench.plan, bench.solver.solve, METHODS).values():
        for reads in by_method.values():
            bench.evaluator.losses(reads)


def sketch(bench: Bench, probes: int) -> list[Sensitivity]:
    """End to end: nothing is left from an earlier call."""
    candidates = candidate_reads(bench.graph, bench.plan, bench.solver.solve, METHODS)
    return sketch_sensitivity(ErrorSketch(bench.evaluator, probes=probes), bench.plan, candidates)[0]


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; ties keep their order."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return round(float(np.corrcoef(*ranks)[0, 1]), 4)


def split_half(rows: list[Sensitivity], state: SearchState) -> tuple[float, float]:
    """Correlation of exact losses on even and on odd samples: over candidates, and over operators."""
    halves: list[list[float]] = [[], []]
    best: list[list[float]] = [[], []]
    for row in rows:
        parts = [torch.tensor(v) for k, v in state.measured.items() if k.partition(":")[2] == row.name]
        losses = torch.cat(parts, 1)
        for half in (0, 1):
            means = losses[:, half::2].mean(1).tolist()
            halves[half] += means
            best[half].append(min(means))
    return spearman(*halves), spearman(*best)


def top5(exact: list[Sensitivity], sketched: list[Sensitivity]) -> dict[str, int]:
    """How many of the exact top 5 the sketch has, and how many of the others are tied with what it has instead."""
    wanted, ranked = {r.name: r for r in exact[:5]}, {r.name: r for r in sketched}
    true = {r.name: r for r in exact}
    fifth = sketched[min(4, len(sketched) - 1)]
    first = {r.name for r in sketched[:5]}
    instead = [true[n] for n in first if n not in wanted]
    missed = [n for n in wanted if n not in first]
    by_probes = {
        n
        for n in missed
        if ranked[n].loss + ranked[n].errors[ranked[n].method] + fifth.errors[fifth.method] >= fifth.loss
    }
    by_samples = {
        n for n in missed if any(o.loss >= true[n].loss - true[n].errors[true[n].method] for o in instead)
    }
    return {
        "found": len(wanted) - len(missed),
        "tied_by_probes": len(by_probes),
        "tied_by_samples": len(by_samples - by_probes),
    }


def verified(bench: Bench) -> list[Sensitivity]:
    """The default of the command line: sketch everything, measure the top 5."""
    rows = sketch(bench, Settings().probes)
    solve = bench.solver.solve
    return verify_top(
        rows,
        lambda names: measure_sensitivity(bench.evaluator, bench.plan, solve, groups=names),
        count=Settings().verify,
        early=list(bench.plan.groups),
    )


def measure(network: Network) -> dict[str, Any]:
    settings = Settings(target="generic-int8", input_num=100, inference_num=30)
    bench = open_bench(network.model, network.calibration, settings, Silence())
    bench.evaluator.reference()
    with PeakMemory() as memory:  # the first call, which also warms up allocators and kernels for all alike
        sketch(bench, max(PROBES))
    state = SearchState(None, "")
    exact, fast = timed(
        lambda: measure_sensitivity(bench.evaluator, bench.plan, bench.solver.solve, state=state)
    )
    _, slow = timed(lambda: naive(bench))
    by_name = {r.name: r for r in exact}
    result: dict[str, Any] = {
        "operators": len(exact),
        "methods": list(METHODS),
        "images": bench.inference_samples,
        "seconds_naive": round(slow, 1),
        "seconds_exact": round(fast, 1),
        "peak_memory_mib": round(memory.bytes / 2**20),
        "probes": {},
    }
    result["noise_ceiling_candidates"], result["noise_ceiling_operators"] = split_half(exact, state)
    for probes in PROBES:
        rows, seconds = timed(lambda k=probes: sketch(bench, k))  # type: ignore[misc]
        pairs = [(by_name[r.name].losses[m], r.losses[m]) for r in rows for m in r.losses]
        result["probes"][probes] = {
            "seconds": round(seconds, 2),
            "naive_to_sketch": round(slow / seconds, 2),
            "exact_to_sketch": round(fast / seconds, 2),
            "spearman_candidates": spearman(*map(list, zip(*pairs, strict=True))),
            "spearman_operators": spearman([by_name[r.name].loss for r in rows], [r.loss for r in rows]),
            "top5": top5(exact, rows),
        }
        print(network.name, probes, result["probes"][probes], flush=True)
    rows, seconds = timed(lambda: verified(bench))
    result["sketch+verify"] = {
        "seconds": round(seconds, 2),
        "naive_to_sketch": round(slow / seconds, 2),
        "exact_to_sketch": round(fast / seconds, 2),
        "top5": top5(exact, rows),
    }
    enough = [
        k
        for k, v in result["probes"].items()
        if v["spearman_candidates"] >= 0.98 and sum(v["top5"].values()) == 5
    ]
    result["smallest_sufficient_probes"] = min(enough, default=None)
    result["tune"] = tune_effort(network)
    return result


def tune_effort(network: Network) -> dict[str, Any]:
    """True forward passes (partial ones by their MACs) and seconds of `tune`, with the exact search and with the sketch."""
    found: dict[str, Any] = {"expected_cos": EXPECTED[network.name]}
    for method in ("exact", "sketch+verify"):
        settings = Settings(
            target="generic-int8",
            input_num=100,
            inference_num=30,
            expected_cos=EXPECTED[network.name],
            search_method=method,  # type: ignore[arg-type]
        )
        with tempfile.TemporaryDirectory() as folder:
            tuned, seconds = timed(
                lambda s=settings, f=folder: tune(
                    network.model, network.calibration, output=Path(f), settings=s
                )  # type: ignore[misc]
            )
        found[method] = {
            "forward_passes": round(tuned.bench.evaluator.effort.forward_passes),
            "seconds": round(seconds, 1),
            "cosine": round(tuned.choice.similarity, 6),
            "float_ops": len(tuned.choice.float_groups),
        }
    return found


def main() -> None:
    load = loader()
    for name in sys.argv[1:] or ("mobilenetv2", "kwt1", "resnet20", "resnet32", "cct"):
        save(f"sketch_speed_{name}", {"model": name, **measure(NETWORKS[name](load))})


if __name__ == "__main__":
    main()
