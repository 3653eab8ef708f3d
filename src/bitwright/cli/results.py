"""What jobs found, on standard output, and the exit status that it means."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.cli.printing import print_json, print_table
from bitwright.flow.exports import RECORD, Exports
from bitwright.flow.outputs import NOT_GRANTED, stage_table, summary
from bitwright.flow.result import Tuned
from bitwright.runtime.proof import Proof

#: What the files of results hold: by their name, or by what follows the model's.
_FILES = {
    "report.html": "tables and charts",
    "_qdq.onnx": "the quantized model, for ONNX Runtime",
    "_integer.onnx": "the quantized model in integer operators, for any ONNX runtime",
    "accumulators.csv": "the largest sum that every operator can reach",
    "_qat.onnx": "the trained, quantized model, for ONNX Runtime",
    "_qat.plan.json": "every decision and its reason",
    "history.csv": "loss and accuracy of every epoch",
    "_qtable": "precision of every operator",
    "new_cali_table": "thresholds of every value, as the search chose them",
    "_cali_table": "thresholds of every value",
    "sensitivity.csv": "loss of every operator by every method",
    "pareto.csv": "what every cost buys: the plans that were run",
    "interactions.csv": "pairs of operators that amplify or cancel each other",
    "luts.csv": "every table: its loss, its error, whether it is guilty",
    "remedies.csv": "what was tried on guilty tables, and what it did",
    "layers.csv": "similarity of every operator's output",
    "ranges.csv": "range, threshold and scale of every value",
    "search.log": "what the search did",
    "plan.json": "every decision and its reason",
    RECORD: "model, data and flags, for bitwright verify",
    "summary.json": "all figures",
}
#: What jobs that export write.
EXPORT_FILES = ("_qdq.onnx", "_integer.onnx", "accumulators.csv")
#: What every search writes.
SEARCH_FILES = ("_qtable", "new_cali_table", "sensitivity.csv", "search.log", "plan.json", "summary.json")


def print_files(folder: Path, *files: str, model: str = "") -> None:
    """Those of *files* (keys of `_FILES`) that are in *folder*, each with what it holds.

    *model*: the name that the model's files begin with; those of another model are not listed.
    """
    names = {f"{model}{file}" if file.startswith("_") else file: _FILES[file] for file in files}
    found = {name: says for name, says in names.items() if (folder / name).exists()}
    width = max(map(len, found), default=0)
    print(f"\nResults in {folder}:")
    for name, says in found.items():
        print(f"  {name.ljust(width)}  {says}")


def print_choice(floats: Sequence[str], *, int8: float, mixed: float) -> None:
    """Which operators stay float, and what that does."""
    print(f"\nint8: cosine {int8:.6f}. With {len(floats)} operator(s) in float: cosine {mixed:.6f}.")
    for name in floats:
        print(f"  float: {name}")


def print_tuned(tuned: Tuned, folder: Path, *, as_json: bool) -> int:
    """What `tune` found. *returns* the exit status."""
    if as_json:
        print_json(summary(tuned))
    else:
        print_table(stage_table(tuned.bench, tuned.stages))
        print_changed(tuned.choice.groups)
        print_exports(tuned.exports, NOT_GRANTED, tuned.bench.plan.refusals)
        print_files(folder, "report.html", *EXPORT_FILES, *SEARCH_FILES, RECORD, model=tuned.bench.name)
    _warn_of_the_file(tuned)
    return verdict(tuned.reached, tuned.choice.similarity, tuned.expected_cos, folder)


def print_changed(groups: Mapping[str, str]) -> None:
    """The operators that are not at the base precision, in the order in which the search changed them."""
    if not groups:
        print("\nThe search had to leave no operator in float.")
        return
    print(f"\nMixed precision ({len(groups)}):")
    width = max(len(name) for name in groups)
    for name, precision in groups.items():
        print(f"  {name.ljust(width)}  {precision}")


def _warn_of_the_file(tuned: Tuned) -> None:
    """The search ran the network without tables: the integer file may miss the target that the plan meets."""
    file = tuned.stages.get("integer")
    if tuned.reached and file is not None and file.cosine < tuned.expected_cos:
        sys.stdout.flush()
        print(
            f"bitwright: note: the integer file has cosine {file.cosine:.6f}, below the {tuned.expected_cos:g} that its plan meets "
            "with tables in float: bitwright luts says which tables are to blame, and mends them.",
            file=sys.stderr,
        )


#: What may help a search that missed its target.
ADVICE = "Allow more float operators (--max-float-ops), more methods (--methods) or a lower --expected-cos."


def verdict(
    reached: bool, found: float, expected: float, folder: Path, advice: str = ADVICE, *, what: str = "cosine"
) -> int:
    """The exit status, 0 or 1; a missed target is said on standard error."""
    if reached:
        return 0
    sys.stdout.flush()
    print(
        f"bitwright: target missed: expected {what} {expected:g}; the best found is {found:.6f}, written to {folder}. {advice}",
        file=sys.stderr,
    )
    return 1


def print_exports(exports: Exports, title: str, floats: Mapping[str, str]) -> None:
    """What the proofs found, and which operators are float and why: of an integer file, else *floats* under *title*."""
    print()
    for name, proof in exports.proofs.items():
        print(f"Proof of {name.strip('_')}: {proof_line(proof)}")
    if exports.integer is not None:
        title, floats = "Float islands of the integer model", exports.integer.islands
    if floats:
        print(f"{title} ({len(floats)}):")
        for op, why in floats.items():
            print(f"  {op}: {why}")


def proof_line(proof: Proof) -> str:
    """The extremes over all operators, how the whole networks compare, and whether ONNX Runtime runs the file as usual."""
    found = proof.to_json()
    apart = [_apart("8-bit", found["per_op_max_steps"], found["per_op_fraction"])]
    if "per_op_max_steps_int16" in found:
        apart.append(_apart("16-bit", found["per_op_max_steps_int16"], found["per_op_fraction_int16"]))
    if found["per_op_ties"]:
        apart.append(f"ties that no float engine can decide differ in {_share(found['per_op_ties'])} at most")
    failure = proof.default.failure
    return (
        f"ONNX Runtime against the simulation, operator by operator: {', '.join(apart)}; "
        f"whole network: cosine {found['cosine']:.6f}{_spread(found)}."
        + (f" At its default level ONNX Runtime cannot run the file: {failure}" if failure else "")
    )


def _apart(codes: str, steps: int, share: float) -> str:
    if steps == 0:
        return f"no {codes} code differs"
    often = f"in {_share(share)} of an operator's at most" if share else "in ties alone"
    return f"{codes} codes differ by {steps} step(s), {often}"


def _spread(proof: Mapping[str, Any]) -> str:
    """The range of the cosine over samples, and where the networks part first; nothing where they do not."""
    spread, first = proof["cosine_spread"], proof["first_op_apart"]
    if not spread or first is None:
        return ""
    return f" (of single samples: least {spread['min']:.6f}, median {spread['median']:.6f}; first apart at {first})"


def _share(x: float) -> str:
    """A share > 0 as per cent; one that would read 0 says that it is not."""
    return f"{x:.2%}" if x >= 5e-5 else "0.01%"
