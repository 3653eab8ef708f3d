"""The searches from the command line: methods, budgets, fronts, metrics, workers, and what they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.unit.cli_cases import CLASSES, Command, make_model

from bitwright.exporters.tpu_mlir import read_calibration_table

INT8 = ("--target", "generic-int8")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions of a model, and losses: good and bad ones. `agreement` is the mean magnitude of the output on fixed inputs."""
    path = tmp_path_factory.mktemp("metric") / "metric.py"
    path.write_text(
        "import torch\n"
        "x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(9))\n"
        "def agreement(model):\n    return float(model(x).abs().mean())\n"
        "REFERENCE = []\n"
        "def distance_to_float(model):\n"
        "    y = model(x)\n"
        "    REFERENCE.append(y) if not REFERENCE else None\n"
        "    return -float((y - REFERENCE[0]).abs().mean())\n"
        "def broken(model):\n    raise RuntimeError('no data here')\n"
        "def words(model):\n    return 'good'\n"
        "def nothing(model):\n    return float('nan')\n"
        "def distance(output, reference):\n    return ((output - reference) ** 2).flatten(1).sum(1)\n"
        "def flat(output, reference):\n    return reference.flatten(1).sum(1)\n"
    )
    return path


# --- sensitivity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sketch", "exact", "sketch+verify", "kl,sketch"])
def test_sensitivity_says_what_was_sketched_and_what_was_measured(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, method: str
) -> None:
    done = bitwright(
        "sensitivity", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, "--method", method,
        "--verify", 2, *INT8,
    )  # fmt: skip

    assert done.status in (0, 1)
    rows = rows_of(tmp_path / "sensitivity.csv")
    measured, sketched = [bool(r["measured"]) for r in rows], [bool(r["sketched"]) for r in rows]
    expected = {"exact": {True}, "sketch": {False}, "kl,sketch": {False}, "sketch+verify": {True, False}}
    assert set(measured) == expected[method]
    assert set(sketched) == {method != "exact"}
    if method == "sketch+verify":
        assert measured[:2] == [True, True]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["ops"]


def test_an_exact_and_a_sketched_ranking_agree_at_the_top(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    names = {}
    for method in ("exact", "sketch"):
        out = tmp_path / method
        bitwright(
            "sensitivity", model, "--data", data, "--expected-cos", 1, "-o", out, "--method", method, "-q",
            *INT8,
        )  # fmt: skip
        names[method] = [r["name"] for r in rows_of(out / "sensitivity.csv")]
    assert set(names["exact"]) == set(names["sketch"])
    assert set(names["exact"][:2]) & set(names["sketch"][:2])


def test_a_second_search_on_the_same_network_and_data_begins_with_the_sketch_of_the_first(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    line = ("sensitivity", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, *INT8)
    bitwright(*line)
    first = (tmp_path / "sensitivity.csv").read_bytes()
    again = bitwright(*line)

    assert "units of error were sketched before" in again.err
    assert (tmp_path / "sensitivity.csv").read_bytes() == first
    other = bitwright(*line, "--probes", 2)
    assert "sketched before" not in other.err


def test_only_the_operators_that_patterns_name_are_ranked(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    line = ("sensitivity", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, *INT8)
    bitwright(*line, "--operators", "conv*,class*")
    assert {r["name"] for r in rows_of(tmp_path / "sensitivity.csv")} == {"conv1", "conv2", "classifier"}

    error = bitwright(*line, "--operators", "dense*").error
    assert "--operators" in error
    assert "dense*" in error
    assert "Names look like 'conv1'" in error


def test_each_pattern_must_name_an_operator(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    """A misspelt pattern beside a good one passed in silence, and its operators were not ranked."""
    error = bitwright(
        "sensitivity", model, "--data", data, "-o", tmp_path, "--operators", "conv1,dense*", *INT8
    ).error
    assert "dense*, which match none" in error
    assert "conv1, dense*" not in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--operators", "dense*"), "dense*"),
        (("--budget", "ops=1", "--max-float-ops", 2), "--budget and --max-float-ops"),
        (("--budget", "latency=0.1", *INT8), "figures to estimate latency with"),
        (("--budget", "macs=0.1", "--method", "exact"), "ops=N where operators are not sketched"),
    ],
)
@pytest.mark.parametrize("verb", [("sensitivity", "--auto"), ("tune",), ("search",)], ids=lambda v: v[0])
def test_what_no_search_can_do_is_said_where_nothing_is_searched_too(
    bitwright: Command,
    model: Path,
    data: Path,
    tmp_path: Path,
    verb: tuple[str, ...],
    flags: tuple[object, ...],
    says: str,
) -> None:
    """The target was met already: the wrong name, or the budget that nothing can count, passed in silence."""
    line = (*verb, model, "--data", data, "--expected-cos", "0", "-o", tmp_path / "o", "-q")
    assert says in bitwright(*line, *flags).error


@pytest.mark.parametrize("loss", ["mse", "sqnr", "kl"])
def test_operators_are_ranked_by_the_loss_asked_for(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, loss: str
) -> None:
    line = ("sensitivity", model, "--data", data, "--expected-cos", 1, *INT8, "-q")
    bitwright(*line, "-o", tmp_path / "cosine", "--method", "exact")
    bitwright(*line, "-o", tmp_path / loss, "--loss", loss, "--method", "exact")
    bitwright(*line, "-o", tmp_path / "sketch", "--loss", loss, "--method", "sketch", "--probes", 5)
    measured = {r["name"]: r for r in rows_of(tmp_path / loss / "sensitivity.csv")}
    sketched = {r["name"]: r for r in rows_of(tmp_path / "sketch" / "sensitivity.csv")}
    by_cosine = {r["name"]: r for r in rows_of(tmp_path / "cosine" / "sensitivity.csv")}

    for name, row in measured.items():
        assert float(row["loss"]) != float(by_cosine[name]["loss"])
        assert float(sketched[name]["loss"]) == pytest.approx(float(row["loss"]), rel=0.6, abs=1e-6)


def test_a_loss_of_the_users_own_ranks_operators_and_the_target_stays_a_cosine(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path
) -> None:
    done = bitwright(
        "search", model, "--data", data, "--expected-cos", 0.9999, "-o", tmp_path, "--loss", f"{metric}:distance",
        *INT8,
    )  # fmt: skip

    assert done.status == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mixed"]["cosine"] >= 0.9999
    for tried in summary["pareto"]:
        if tried["predicted"] is not None:
            assert 1 - tried["predicted"] == pytest.approx(1 - tried["cosine"], rel=1.5, abs=5e-5)


# --- search ------------------------------------------------------------------------------------------------------


def test_the_joint_search_meets_its_target_and_writes_the_front(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "search", model, "--data", data, "--expected-cos", 0.9999, "--explain", "-o", tmp_path, *INT8
    )

    summary = json.loads((tmp_path / "summary.json").read_text())
    front = rows_of(tmp_path / "pareto.csv")
    assert done.status == 0
    assert done.out.startswith("Pareto front\n")
    assert summary["reached"] is True
    assert summary["mixed"]["cosine"] >= 0.9999
    chosen = [r for r in front if r["chosen"] == "yes"]
    assert len(chosen) == 1
    assert float(chosen[0]["cosine"]) == pytest.approx(summary["mixed"]["cosine"], abs=1e-6)
    cheaper = [r for r in front if float(r["cost"]) < float(chosen[0]["cost"])]
    assert all(float(r["cosine"]) < 0.9999 for r in cheaper)
    pairs = rows_of(tmp_path / "interactions.csv")
    assert {p["says"] for p in pairs} <= {"amplify", "cancel", "uncertain"}
    assert "Interactions at int8" in done.out
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert read_calibration_table(tmp_path / "new_cali_table")


@pytest.mark.parametrize("budget", ["ops=1", "macs=0.4", "bytes=0.5"])
def test_a_budget_is_kept_and_without_a_target_the_best_within_it_is_chosen(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, budget: str
) -> None:
    done = bitwright("search", model, "--data", data, "--budget", budget, "-o", tmp_path, *INT8)

    limit = float(budget.partition("=")[2])
    front = rows_of(tmp_path / "pareto.csv")
    assert done.status == 0
    assert all(float(r["cost"]) <= limit + 1e-6 for r in front)
    best = max(front, key=lambda r: float(r["cosine"]))
    assert best["chosen"] == "yes"


def test_all_precisions_that_the_target_has_are_used(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "search", model, "--data", data, "--expected-cos", 0.99, "--budget", "bytes=0.9", "-o", tmp_path,
        "--precisions", "w4a8,int8,int16,float",
    )  # fmt: skip

    assert done.status == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    used = {p for tried in summary["pareto"] for p in tried["groups"].values()}
    assert "w4a8" in used
    assert summary["mixed"]["cosine"] >= 0.99


def test_without_a_sketch_only_operators_can_be_budgeted(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    line = ("search", model, "--data", data, "-o", tmp_path, "--method", "exact", *INT8)
    assert "ops=N where operators are not sketched" in bitwright(*line, "--budget", "macs=0.2").error
    done = bitwright(*line, "--budget", "ops=2")
    assert done.status == 0
    assert len(json.loads((tmp_path / "summary.json").read_text())["float_ops"]) <= 2


def test_latency_needs_a_target_with_figures(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    line = ("search", model, "--data", data, "--budget", "latency=0.5", "-o", tmp_path)
    assert bitwright(*line, "--target", "bm1684").status == 0
    assert "figures to estimate latency with" in bitwright(*line, *INT8).error


# --- a metric of the user's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_metric_chooses_the_cheapest_plan_that_is_good_enough(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path, workers: int
) -> None:
    done = bitwright(
        "search", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, "--evaluate",
        f"{metric}:agreement", "--min-metric", 0.0, "--workers", workers, *INT8,
    )  # fmt: skip

    summary = json.loads((tmp_path / "summary.json").read_text())
    front = rows_of(tmp_path / "pareto.csv")
    assert done.status == 0
    assert {"float", "int8", "0"} <= set(summary["metrics"])
    assert all(float(r["metric"]) > 0 for r in front if r["metric"])
    assert min(front, key=lambda r: float(r["cost"]))["chosen"] == "yes"


def test_a_metric_that_the_cheapest_plan_misses_is_met_by_a_dearer_one(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path
) -> None:
    line = (
        "search",
        model,
        "--data",
        data,
        "-o",
        tmp_path,
        "--evaluate",
        f"{metric}:distance_to_float",
        *INT8,
    )
    done = bitwright(*line, "--min-metric", -1e-4)
    front = rows_of(tmp_path / "pareto.csv")
    chosen = next(r for r in front if r["chosen"] == "yes")

    assert done.status == 0
    assert float(chosen["metric"]) >= -1e-4
    cheaper = [r for r in front if r["metric"] and float(r["cost"]) < float(chosen["cost"])]
    assert all(float(r["metric"]) < -1e-4 for r in cheaper)
    assert float(chosen["cost"]) > 0
    missed = bitwright(*line, "--min-metric", 5)
    assert missed.status == 1
    assert "expected metric 5; the best found is" in missed.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--budget", "ops=1"),
        ("--precisions", "int8"),
        ("--evaluate", "m.py:f"),
        ("--explain",),
        ("--loss", "kl"),
    ],
)
def test_flags_that_the_walk_has_no_use_for_are_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    error = bitwright("search", model, "--data", data, "--mode", "mixed", "-o", tmp_path, *flags).error
    assert flags[0] in error
    assert "no use for" in error


def test_a_metric_keeps_a_file_of_its_own_beside_a_saved_state(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path
) -> None:
    done = bitwright(
        "search", model, "--data", data, "-o", tmp_path / "out", "--evaluate", f"{metric}:agreement", "--min-metric", 0,
        "--save-state", tmp_path / "state.json", *INT8,
    )  # fmt: skip
    assert done.status == 0
    assert not list(tmp_path.glob("state*.json"))


def test_sensitivity_by_a_metric_ranks_from_the_worst_up(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path
) -> None:
    bitwright(
        "sensitivity", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, "--evaluate",
        f"{metric}:agreement", *INT8,
    )  # fmt: skip

    values = [float(r["metric"]) for r in rows_of(tmp_path / "sensitivity.csv")]
    assert len(values) > 3
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("name", "says"),
    [("broken", "no data here"), ("words", "found str"), ("nothing", "found nan"), ("absent", "absent")],
)
def test_a_metric_that_gives_no_number_is_named(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path, name: str, says: str
) -> None:
    error = bitwright(
        "search", model, "--data", data, "--expected-cos", 1, "-o", tmp_path, "--evaluate", f"{metric}:{name}",
        *INT8,
    ).error  # fmt: skip

    assert "--evaluate" in error
    assert says in error


def test_workers_find_what_one_process_finds(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    found = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        bitwright(
            "sensitivity", model, "--data", data, "--expected-cos", 1, "-o", out, "--method", "exact",
            "--workers", workers, *INT8,
        )  # fmt: skip
        found[workers] = rows_of(out / "sensitivity.csv")
    assert [r["name"] for r in found[1]] == [r["name"] for r in found[2]]
    for one, two in zip(found[1], found[2], strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-3, abs=1e-7)


# --- what is refused or falls back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--budget", "macs=x"), "--budget"),
        (("--budget", "watts=3"), "--budget"),
        (("--budget", "macs=-1"), "--budget"),
        (("--budget", "ops=1", "--max-float-ops", "2"), "--budget and --max-float-ops"),
        (("--precisions", "int8,int7"), "int7"),
        (("--loss", "huber"), "huber"),
        (("--loss", "absent.py:f"), "absent.py"),
        (("--method", "sketch,exact"), "--method"),
        (("--method", "kl,max"), "--method"),
        (("--min-metric", "1"), "--min-metric"),
        (("--ray", "ray://nobody.invalid:1"), "--ray"),
    ],
)
def test_wrong_flags_are_one_line(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    extra = ("--method", "exact") if "--ray" in flags else ()
    error = bitwright(
        "search", model, "--data", data, "-o", tmp_path / "out", "--expected-cos", 1, *INT8, *extra, *flags
    ).error
    assert says in error


def test_a_loss_without_curvature_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, metric: Path
) -> None:
    error = bitwright(
        "search",
        model,
        "--data",
        data,
        "-o",
        tmp_path,
        "--expected-cos",
        1,
        "--loss",
        f"{metric}:flat",
        *INT8,
    ).error
    assert "no curvature" in error


def argmax_head(path: Path) -> Path:
    nodes = [
        helper.make_node("ArgMax", ["last"], ["best"], "argmax", axis=1, keepdims=1),
        helper.make_node("Cast", ["best"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    model = onnx.load(make_model(path, *nodes))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)
    return path


def constant_output(path: Path) -> Path:
    """The scored output does not depend on the input: no operator can matter to it."""
    nodes = [
        helper.make_node("Mul", ["last", "none"], ["zero"], "mul"),
        helper.make_node("Add", ["zero", "b3"], ["y"], "add"),
    ]
    model = onnx.load(make_model(path, *nodes))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "none"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("make", [argmax_head, constant_output])
@pytest.mark.parametrize("verb", ["sensitivity", "search", "tune"])
def test_a_network_that_no_gradient_leads_through_is_measured_exactly_and_that_is_said(
    bitwright: Command, data: Path, tmp_path: Path, make, verb: str
) -> None:
    odd = make(tmp_path / "odd.onnx")
    np.savez(tmp_path / "unlabelled.npz", x=np.load(data)["x"])

    done = bitwright(
        verb, odd, "--data", tmp_path / "unlabelled.npz", "-o", tmp_path / "out", "--expected-cos", 1, *INT8
    )

    assert done.status in (0, 1)
    if (
        make is constant_output or verb == "search"
    ):  # int8 argmax is exact here: there is nothing else to search
        assert "measured exactly" in done.err


def test_more_probes_than_the_output_has_elements_are_said_to_have_no_use(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "sensitivity", model, "--data", data, "-o", tmp_path, "--expected-cos", 1, "--probes", 100, *INT8
    )
    assert f"{CLASSES} probe(s) span an output of {CLASSES} element(s)" in done.err


def test_one_sample_is_enough(bitwright: Command, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32))
    done = bitwright(
        "search", model, "--data", tmp_path / "one.npy", "-o", tmp_path / "out", "--expected-cos", 0.9999,
        "--explain", *INT8,
    )  # fmt: skip
    assert done.status in (0, 1)
    assert rows_of(tmp_path / "out" / "pareto.csv")


def test_a_post_processing_function_is_measured_exactly_and_that_is_said(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    process = tmp_path / "process.py"
    process.write_text("def PostProcess(outputs):\n    return {k: v * 2 for k, v in outputs.items()}\n")
    done = bitwright(
        "search", model, "--data", data, "-o", tmp_path / "out", "--expected-cos", 0.999, "--post-process",
        process, "--explain", *INT8,
    )  # fmt: skip
    assert done.status == 0
    assert "--post-process has no gradient to sketch with; everything is measured exactly" in done.err
    assert "no interactions are listed" in done.err
