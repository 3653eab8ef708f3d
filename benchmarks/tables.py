"""The committed results as Markdown tables.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
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


def main() -> None:
    for name in ("accuracy_mobilenetv2", "accuracy_kwt1", "accuracy_kwt1_clean"):
        print(accuracy_table(name), end="\n\n")
    print(speed_table())


if __name__ == "__main__":
    main()
