"""The integer model of the development networks: agreement with its simulation, accuracy, size and latency.

    python -m benchmarks.integer [NETWORK …] [--target NAME] [--samples N] [--calibrations N]

All on the same samples: the float network, the fake-quantized one, the one with look-up tables, and the integer model in ONNX
Runtime. Differences of accuracy are paired (McNemar's exact test). Latency: one sample, one thread, the fastest of 50 runs.
One flipped rounding spreads, so that which samples turn out right is partly chance: fake quantization and integers are compared
again under thresholds from N different halves of the calibration samples, and the pairs added up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.networks import NETWORKS, Network, with_labels
from benchmarks.shared import data_folder, loader, mcnemar, save
from bitwright.exporters.integer import IntegerModel, lower
from bitwright.exporters.onnx_float import export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.bench import Bench, batches_of, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_torch import capture
from bitwright.numerics.cosine import cosine
from bitwright.ops.table import with_tables
from bitwright.plan.reads import quantized_reads
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure

#: Samples on which codes are compared operator by operator: all codes of a batch are held at once.
COMPARED = 8
#: Runs of each file; the fastest counts, because others may use the machine.
RUNS = 50
#: Nodes of an integer model that belong to rescaling.
RESCALE = ("Mul", "Add", "Sub", "Cast", "BitShift", "BitwiseAnd", "Clip")


def resnet20(load: Any) -> Network:
    """ResNet-20 as fine-tuned on these pictures."""
    network = NETWORKS["resnet20"](load)
    model = load.cifar10_resnet(20)
    model.load_state_dict(load_file(data_folder() / "models" / "cifar10_resnet20_jpegft.safetensors"))
    return replace(network, model=capture(model.eval(), torch.cat(network.calibration[:2])))


def opened(network: Network, settings: Settings) -> Bench:
    """A bench on the test data of *network*."""
    return with_labels(open_bench(network.model, network.calibration, settings, Silence()), network, settings)


def measured(bench: Bench, samples: int) -> dict[str, Any]:
    graph, plan = bench.graph, bench.plan
    tables = build_tables(graph, plan, bench.statistics)
    lowered = lower(graph, plan, bench.target, tables)
    looked_up = with_tables(graph, tables) if tables else graph
    float_model, qdq = export_float(graph), export_qdq(graph, plan)
    few = batches_of(bench, bench.dataset.take(COMPARED, 0), COMPARED)
    proof = measure(looked_up, plan, lowered.model, few)
    worst = proof.worst
    parts = [d for d in proof.per_op if d.steps]
    outputs = _outputs(bench, looked_up, lowered.model, samples)
    top1 = _accuracies(outputs)
    return {
        "operators": len(proof.per_op),
        "largest_difference_steps": max(d.steps for d in proof.per_op),
        "share_that_differs": max(d.differing / d.elements for d in proof.per_op),
        "worst_operator": None if worst is None else worst.name,
        "operators_that_break_the_rule": [d.name for d in proof.per_op if not d.holds],
        "first_operator_that_parts": parts[0].name if parts else None,
        "network_cosine": distribution(outputs["tables"], outputs["integer"]),
        "islands": dict(lowered.islands),
        "tables": len(tables),
        "top1": top1,
        "paired_with_fake_quant": paired(outputs),
        "bytes": {
            "float": float_model.ByteSize(),
            "qdq": qdq.ByteSize(),
            "integer": lowered.model.ByteSize(),
            "integer_ratio": round(lowered.model.ByteSize() / float_model.ByteSize(), 3),
        },
        "latency": latencies(bench, {"float": float_model, "qdq": qdq, "integer": lowered.model}),
        "accumulators": accumulators(lowered),
    }


def _outputs(bench: Bench, looked_up: Graph, model: onnx.ModelProto, samples: int) -> dict[str, Any]:
    """Outputs of every stage on the same samples, and the labels."""
    chosen = bench.dataset.take(samples, 0)
    reads = quantized_reads(bench.graph, bench.plan)
    plain, tables = Replay(bench.graph), Replay(looked_up)
    session = Session(model, threads=1)
    name = bench.graph.info.outputs[0]
    stages: dict[str, Callable[[Mapping[str, Tensor]], Any]] = {
        "float": lambda x: plain.run(x)[name],
        "fake_quant": lambda x: plain.run(x, reads)[name],
        "tables": lambda x: tables.run(x, reads)[name],
        "integer": lambda x: session.run(x)[name],
    }
    found: dict[str, Any] = {stage: [] for stage in stages}
    for batch in batches_of(bench, chosen):
        for stage, run in stages.items():
            found[stage].append(np.asarray(run(batch)))
    arrays = {stage: np.concatenate(rows) for stage, rows in found.items()}
    assert chosen.labels is not None
    return {**arrays, "labels": np.asarray(chosen.labels)}


def _right(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Stage -> which samples it has right."""
    labels = outputs["labels"]
    return {k: v.reshape(len(v), -1).argmax(1) == labels for k, v in outputs.items() if k != "labels"}


def _accuracies(outputs: Mapping[str, Any]) -> dict[str, float]:
    return {k: round(100 * float(v.mean()), 2) for k, v in _right(outputs).items()}


def paired(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Fake quantization and integers on the same samples."""
    right = _right(outputs)
    a, b = right["fake_quant"], right["integer"]
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return {
        "samples": len(a),
        "both": int((a & b).sum()),
        "only_fake_quant": only_a,
        "only_integer": only_b,
        "p": mcnemar(only_a, only_b),
    }


def recalibrated(network: Network, settings: Settings, samples: int, times: int) -> dict[str, Any]:
    """`paired` under thresholds from *times* random halves of the calibration samples, and the sum of all."""
    half = len(network.calibration) // 2
    rows = []
    for seed in range(1, times + 1):
        bench = opened(network, replace(settings, input_num=half, seed=seed))
        tables = build_tables(bench.graph, bench.plan, bench.statistics)
        model = lower(bench.graph, bench.plan, bench.target, tables).model
        looked_up = with_tables(bench.graph, tables) if tables else bench.graph
        rows.append(paired(_outputs(bench, looked_up, model, samples)))
        print(network.name, "calibration", seed, rows[-1], flush=True)
    only_a, only_b, count = (sum(r[k] for r in rows) for k in ("only_fake_quant", "only_integer", "samples"))
    return {
        "calibrations": rows,
        "samples": count,
        "only_fake_quant": only_a,
        "only_integer": only_b,
        "net_loss_points": round(100 * (only_a - only_b) / count, 2),
        "p": mcnemar(only_a, only_b),
    }


def distribution(a: Any, b: Any) -> dict[str, float]:
    rows = [torch.from_numpy(x.reshape(len(x), -1)).double() for x in (a, b)]
    values = cosine(*rows).numpy()
    return {
        name: round(float(np.percentile(values, p)), 6)
        for name, p in (("min", 0), ("p10", 10), ("median", 50), ("max", 100))
    }


def latencies(bench: Bench, models: Mapping[str, onnx.ModelProto]) -> dict[str, Any]:
    """Milliseconds, the stages taken in turn so that a busy machine slows all of them."""
    batch = next(iter(batches_of(bench, bench.dataset.take(1, 0), 1)))
    sessions = {name: Session(model, threads=1) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(RUNS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(batch)
            times[name].append(1000 * (time.perf_counter() - start))
    fastest = {name: min(values) for name, values in times.items()}
    ratios = {f"{n}_ratio": round(fastest[n] / fastest["float"], 2) for n in ("qdq", "integer")}
    return {
        **{n: round(v, 3) for n, v in fastest.items()},
        **ratios,
        "rescale_share": _rescale_share(models["integer"], batch),
    }


def _rescale_share(model: onnx.ModelProto, batch: Mapping[str, Tensor]) -> float:
    """The share of an integer model's time that its element by element arithmetic takes, by ONNX Runtime's own profile."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(5):
            session.run(None, {name: x.numpy() for name, x in batch.items()})
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, int] = {}
    for event in events:
        kind = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and kind and event["name"].endswith("_kernel_time"):
            spent[kind] = spent.get(kind, 0) + event["dur"]
    return round(sum(spent.get(kind, 0) for kind in RESCALE) / sum(spent.values()), 3)


def accumulators(lowered: IntegerModel) -> dict[str, Any]:
    narrow = [a for a in lowered.accumulators if a.bits == 32]
    wide = [a for a in lowered.accumulators if a.bits > 32]
    return {
        "int32": len(narrow),
        "int64": len(wide),
        "fullest_int32_bits": max((a.peak.bit_length() for a in narrow), default=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=["resnet20", "mobilenetv2"])
    parser.add_argument("--target", default="generic-int8")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--calibrations", type=int, default=0)
    asked = parser.parse_args()
    load = loader()
    for name in asked.networks:
        network = resnet20(load) if name == "resnet20" else NETWORKS[name](load)
        settings = Settings(target=asked.target, input_num=0, inference_num=8, tables=True)
        found = measured(opened(network, settings), asked.samples)
        if asked.calibrations:
            found["recalibrated"] = recalibrated(network, settings, asked.samples, asked.calibrations)
        save(
            f"integer_{name}_{asked.target}",
            {"model": name, "target": asked.target, "samples": asked.samples, **found},
        )


if __name__ == "__main__":
    main()
