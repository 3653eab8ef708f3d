"""The sensitivity search against the naive loop (same code, whole network per candidate), in one run.

    python -m benchmarks.sensitivity_speed

Prints the gain that the share of re-executed MACs allows and the gain reached, the largest difference of any loss, and
peak memory above the process's level before the search at 30 and at 300 pictures.
"""

from __future__ import annotations

import torch

from benchmarks.shared import PeakMemory, data_folder, loader, save, timed
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.search.sensitivity import METHODS, Sensitivity, measure_sensitivity


def naive(bench: Bench) -> dict[str, dict[str, float]]:
    """Every candidate by running the whole network on all samples."""
    plan, solve = bench.plan, bench.solver.solve
    activations = [n for n, e in plan.values.items() if e.role == "activation"]
    full = {m: solve(plan.with_methods(dict.fromkeys(activations, m))) for m in METHODS}
    losses: dict[str, dict[str, float]] = {}
    for group in plan.groups:
        others = [g for g in plan.groups if g != group]
        losses[group] = {
            m: 1 - bench.evaluator.evaluate(p.with_precision(others, "float", "")) for m, p in full.items()
        }
    return losses


def allowed_gain(bench: Bench, rows: list[Sensitivity]) -> float:
    """Whole networks / what has to be executed again: its own share of the MACs for each candidate."""
    shares = [bench.evaluator.replay.share(row.members) for row in rows]
    return len(shares) / sum(shares)


def search(bench: Bench) -> list[Sensitivity]:
    return measure_sensitivity(bench.evaluator, bench.plan, bench.solver.solve)


def main() -> None:
    load = loader()
    pictures, _ = load.imagenet("imagenet_sample_even500.npz")
    x = torch.from_numpy(load.prep_imagenet_torch(pictures))
    data = [x[i : i + 1] for i in range(300)]
    model = data_folder() / "models" / "mobilenetv2_torchvision.onnx"
    settings = Settings(target="generic-int8", input_num=100, inference_num=30)
    bench = open_bench(model, data, settings, Silence())
    bench.evaluator.reference()
    with PeakMemory() as at_30:
        rows, fast = timed(lambda: search(bench))
    losses, slow = timed(lambda: naive(bench))
    difference = max(abs(losses[r.name][m] - r.losses[m]) for r in rows for m in METHODS)
    gain = allowed_gain(bench, rows)
    many = open_bench(
        model, data, Settings(target="generic-int8", input_num=100, inference_num=300), Silence()
    )
    many.evaluator.reference()
    with PeakMemory() as at_300:
        search(many)
    save(
        "sensitivity_speed",
        {
            "model": "mobilenetv2_torchvision",
            "operators": len(rows),
            "methods": list(METHODS),
            "images": 30,
            "ratio_naive_to_search": round(slow / fast, 3),
            "gain_allowed_by_macs": round(gain, 3),
            "share_of_allowed_gain": round(slow / fast / gain, 3),
            "largest_loss_difference": difference,
            "peak_memory_mib_30_images": round(at_30.bytes / 2**20),
            "peak_memory_mib_300_images": round(at_300.bytes / 2**20),
            "seconds_search": round(fast, 1),
            "seconds_naive": round(slow, 1),
        },
    )


if __name__ == "__main__":
    main()
