"""The committed results as Markdown tables.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from benchmarks.shared import RESULTS

TITLES = {"float": "FLOAT", "int8": "INT8", "tuned": "INT8 (new thresholds)", "mixed": "MIX"}


def read(name: str) -> dict[str, Any]:
    """One result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def accuracy_table(name: str) -> str:
    """Type, cosine, top-1, top-5 and the number of float operators, for each target."""
    result = read(name)
    lines = [
        f"{result['model']}, {result['measured_on']}, thresholds of INT8 by `{result['method']}`, target cosine {result['expected_cos']}:",
        "",
        "| target | type | cosine | top-1 (%) | top-5 (%) | float groups |",
        "|---|---|--:|--:|--:|--:|",
    ]
    first = True
    for target, stages in result["targets"].items():
        for key, title in TITLES.items():
            if key == "float" and not first:
                continue
            stage = stages[key]
            floats = {"float": "all", "mixed": f"{len(stages['float_ops'])} of {stages['groups']}"}.get(
                key, "0"
            )
            shown = "" if key == "float" else f"`{target}`"
            lines.append(
                f"| {shown} | {title} | {stage['cosine']:.4f} | {stage['top1']:.2f} | {stage['top5']:.2f} | {floats} |"
            )
            first = False
    return "\n".join(lines)


def speed_table() -> str:
    """The search and the calibration pass, as ratios."""
    search, calibration = read("sensitivity_speed"), read("calibration_speed")
    rows = [
        ("naive loop / sensitivity search, time", f"{search['ratio_naive_to_search']:.2f}×"),
        ("what the share of re-executed MACs allows", f"{search['gain_allowed_by_macs']:.2f}×"),
        ("share of that gain reached", f"{search['share_of_allowed_gain']:.0%}"),
        ("largest difference of a loss between the two", f"{search['largest_loss_difference']:.0e}"),
        (
            "peak memory above the process's level, 30 / 300 pictures",
            f"{search['peak_memory_mib_30_images']} / {search['peak_memory_mib_300_images']} MiB",
        ),
        (
            "calibration pass / bare float passes, MobileNetV2",
            f"{calibration['mobilenetv2']['ratio_to_float_passes']:.2f}×",
        ),
        (
            "calibration pass / bare float passes, ResNet-20",
            f"{calibration['resnet20']['ratio_to_float_passes']:.2f}×",
        ),
    ]
    lines = [
        f"| {search['model']}, {search['operators']} groups × {len(search['methods'])} methods × {search['images']} pictures | |",
        "|---|--:|",
    ]
    return "\n".join([*lines, *(f"| {what} | {figure} |" for what, figure in rows)])


#: Networks of the sketch's tables, as far as results are there.
NETWORKS = ("mobilenetv2", "kwt1", "resnet20", "resnet32", "cct")


def sketch_speed_table() -> str:
    """The sketch against the naive loop and the exact search, with what its ranks are worth."""
    lines = [
        "| network | operators | probes | naive / sketch | exact / sketch | rank correlation (ceiling) | top 5 found + tied | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in NETWORKS:
        result = read(f"sketch_speed_{name}")
        for probes, row in result["probes"].items():
            top = row["top5"]
            tied = top["tied_by_probes"] + top["tied_by_samples"]
            lines.append(
                f"| {name} | {result['operators']} | {probes} | {row['naive_to_sketch']:.1f}× | {row['exact_to_sketch']:.1f}× | "
                f"{row['spearman_candidates']:.3f} ({result['noise_ceiling_candidates']:.3f}) | {top['found']} + {tied} | "
                f"{result['peak_memory_mib']} MiB |"
            )
    return "\n".join(lines)


def tune_table() -> str:
    """What `tune` needs with the exact search and with the sketch."""
    lines = [
        "| network | target cosine | search | true forward passes | seconds | cosine | float groups |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for name in NETWORKS:
        found = read(f"sketch_speed_{name}")["tune"]
        lines += [
            f"| {name} | {found['expected_cos']} | {search} | {row['forward_passes']} | {row['seconds']} | {row['cosine']:.5f} | {row['float_ops']} |"
            for search, row in found.items()
            if isinstance(row, dict)
        ]
    return "\n".join(lines)


def prediction_table() -> str:
    """Rank correlation of predicted and measured losses of random plans."""
    lines = [
        "| network | bits | rank correlation | of the plain square | measured / predicted: 5 %, median, 95 % |",
        "|---|--:|--:|--:|---|",
    ]
    for name in NETWORKS:
        for bits, row in read(f"sketch_prediction_{name}")["bits"].items():
            ratios = ", ".join(f"{x:.2f}" for x in row["measured_to_predicted"])
            plain = row["spearman_of_the_plain_square"]
            lines.append(f"| {name} | {bits} | {row['spearman']:.3f} | {plain:.3f} | {ratios} |")
    return "\n".join(lines)


def quality_table() -> str:
    """Top-1 after leaving some operators float, by four ways to choose them."""
    lines = [
        "| network | float groups | exact singles | sketch singles | joint | walk |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in NETWORKS:
        if not (RESULTS / f"sketch_quality_{name}.json").exists():
            continue
        plans = read(f"sketch_quality_{name}")["plans"]
        ends = " / ".join(f"{plans[k]['top1']:.2f}" for k in ("float", "int8"))
        for count in (1, 2, 5, 10):
            cells = [plans[f"{way} {count}"] for way in ("exact", "sketch", "joint", "walk")]
            shown = " | ".join(f"{c['top1']:.2f} ({c['search_cosine']:.4f})" for c in cells)
            lines.append(f"| {name} ({ends}) | {count} | {shown} |")
    return "\n".join(lines)


def training_table() -> str:
    """Top-1 and cross-entropy of the float control, calibrated and trained (means over seeds), with the share that training recovers."""
    lines = [
        "| weights | | top-1 (%), mean | each seed | recovered | cross-entropy | recovered | converted, top-1 (%) | statistics taken anew: top-1 (%), recovered | cross-entropy, recovered |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for width in ("int8", "int4"):
        runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"qat_{width}_[0-9].json"))]
        lines += [_row_of_training(runs, width, kind) for kind in _TRAININGS]
    return "\n".join(lines)


_TRAININGS = {
    "ptq": "calibrated",
    "control": "float control",
    "fake_quant": "plain",
    "lsq": "LSQ",
    "pact": "PACT",
}


def _row_of_training(runs: list[dict[str, Any]], width: str, kind: str) -> str:
    def average(what: str, form: str, of: str = kind) -> float:
        return mean(r["ptq"][what] if of == "ptq" else r[of][form][what] for r in runs)

    def recovered(what: str, form: str) -> str:
        # Where calibration loses less than half a point there is nothing to recover.
        if kind == "control" or average("top1", form, "control") - average("top1", form, "ptq") < 0.5:
            return "–"
        calibrated = average(what, form, "ptq")
        return f"{(average(what, form) - calibrated) / (average(what, form, 'control') - calibrated):.0%}"

    title = f"| {width} | {_TRAININGS[kind]} |"
    if kind == "ptq":
        return f"{title} {average('top1', ''):.2f} | | | {average('loss', ''):.4f} | | | | |"
    each = ", ".join(f"{r[kind]['as_it_is']['top1']:.2f}" for r in runs)
    converted = "" if kind == "control" else f"{average('top1', 'converted'):.2f}"
    as_it_is, anew = "as_it_is", "statistics_anew"
    return (
        f"{title} {average('top1', as_it_is):.2f} | {each} | {recovered('top1', as_it_is)} | {average('loss', as_it_is):.4f} | "
        f"{recovered('loss', as_it_is)} | {converted} | {average('top1', anew):.2f}, {recovered('top1', anew)} | "
        f"{average('loss', anew):.4f}, {recovered('loss', anew)} |"
    )


def training_speed_table() -> str:
    """Time and memory of a training step relative to float."""
    result = read("qat_speed")
    lines = ["| | step, time | memory kept for the backward pass |", "|---|--:|--:|"]
    titles = {
        "float": "float",
        "fake_quant": "plain",
        "lsq": "LSQ",
        "pact": "PACT",
        "torchao": "torchao PT2E",
    }
    for kind, title in titles.items():
        if kind in result["step"]:
            lines.append(f"| {title} | {result['step'][kind]:.2f}× | {result['memory'][kind]:.2f}× |")
    return "\n".join(lines)


def lut_table() -> str:
    """Errors of look-up tables: `evenly` against `optimal`, and how many functions each way of dividing brings within two steps."""
    result = read("lut_error")
    lines = [
        "| inputs | segments | evenly / optimal, RMS: median, largest | the same, largest error: median | within 2 steps: evenly, curvature, mix, optimal | worst with optimal |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for key, row in result.items():
        if not isinstance(row, dict) or "worst" not in row or "functions_within_2_steps" not in row:
            continue
        inputs, count = key.split()
        within = ", ".join(str(n) for n in row["functions_within_2_steps"].values())
        largest, function = row["worst"]["optimal"]
        lines.append(
            f"| {inputs} | {count} | {row['evenly_to_optimal_rms_median']}×, {row['evenly_to_optimal_rms_largest']}× | "
            f"{row['evenly_to_optimal_max_median']}× | {within} of {result['functions']} | {largest:.1f} ({function}) |"
        )
    return "\n".join(lines)


INTEGER = {
    "resnet20_generic-int8": "ResNet-20, `generic-int8`, 400 pictures",
    "mobilenetv2_generic-int8": "MobileNetV2, `generic-int8`, 400 pictures",
    "cct_journey6": "CCT, `journey6`, 400 pictures",
    "kwt1_journey6": "KWT-1, `journey6`, 300 clips",
}


def integer_table() -> str:
    """The integer model of the classifiers: agreement, accuracy, size, time."""
    lines = [
        "| network, target | operators, tables | largest step | top-1 float, fake-quant, tables, integer | only fake-quant, only integer right | p | size: Q/DQ, integer | time: Q/DQ, integer (rescale) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, title in INTEGER.items():
        r = read(f"integer_{name}")
        top1 = ", ".join(f"{v:.2f}" for v in r["top1"].values())
        pair, size, time = r["paired_with_fake_quant"], r["bytes"], r["latency"]
        lines.append(
            f"| {title} | {r['operators']}, {r['tables']} | {r['largest_difference_steps']} | {top1} | "
            f"{pair['only_fake_quant']}, {pair['only_integer']} | {pair['p']:.2g} | {size['qdq'] / size['float']:.3f}, "
            f"{size['integer_ratio']:.3f} | {time['qdq_ratio']:.1f}×, {time['integer_ratio']:.1f}× ({time['rescale_share']:.0%}) |"
        )
    return "\n".join(lines)


def recalibrated_table() -> str:
    """Fake quantization and integers under other calibrations."""
    lines = [
        "| network, target | calibrations × samples | only fake-quant, only integer right: each | all | net loss, points | p |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, title in INTEGER.items():
        r = read(f"integer_{name}").get("recalibrated")
        if r is None:
            continue
        each = "; ".join(f"{c['only_fake_quant']}, {c['only_integer']}" for c in r["calibrations"])
        count = len(r["calibrations"])
        lines.append(
            f"| {title.rpartition(',')[0]} | {count} × {r['samples'] // count} | {each} | "
            f"{r['only_fake_quant']}, {r['only_integer']} | {r['net_loss_points']:.2f} | {r['p']:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    for table in (lut_table, integer_table, recalibrated_table):
        print(table(), end="\n\n")
    for table in (sketch_speed_table, tune_table, prediction_table, quality_table):
        print(table(), end="\n\n")
    for name in ("accuracy_mobilenetv2", "accuracy_kwt1", "accuracy_kwt1_clean"):
        print(accuracy_table(name), end="\n\n")
    print(speed_table(), end="\n\n")
    print(training_table(), end="\n\n")
    print(training_speed_table())


if __name__ == "__main__":
    main()
