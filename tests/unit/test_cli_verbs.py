"""Every verb on a small network, from the command line to its files; and every kind of bad input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from PIL import Image
from tests.unit.cli_cases import CLASSES, SAMPLES, Command, Outcome, make_model

from bitwright.exporters.tpu_mlir import read_calibration_table, read_qtable

# --- what works --------------------------------------------------------------------------------------------------


def test_tune_writes_every_promised_file_and_prints_the_table(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = bitwright("tune", model, "--data", data, "--expected_cos", "0.9", "-o", out)

    assert done.status == 0
    names = {"net_qdq.onnx", "net_qtable", "new_cali_table", "plan.json", "report.html", "search.log"}
    assert {f.name for f in out.iterdir()} == names | {"sensitivity.csv", "summary.json", "job.json"}
    table = done.out.split("\n\n")[0]
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [
        "float",
        "int8",
        "int8 + new thresholds",
        "mixed",
    ]
    assert "top-1 [%]" in table
    assert all(name in done.out for name in names)
    assert done.err.splitlines()[0] == "bitwright: reading the model"
    assert "\x1b" not in done.out + done.err
    onnxruntime.InferenceSession(out / "net_qdq.onnx", providers=["CPUExecutionProvider"])


def test_a_missed_target_is_status_1_with_the_best_result_written(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "tune", model, "--data", data, "--expected-cos", 1, "--max-float-ops", 1, "-o", tmp_path, "-q"
    )

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.status == 1
    assert len(summary["float_ops"]) <= 1
    assert done.err.splitlines() == [
        f"bitwright: target missed: expected cosine 1; the best found is {summary['mixed']['cosine']:.6f}, written to "
        f"{tmp_path}. Allow more float operators (--max-float-ops), more methods (--methods) or a lower --expected-cos."
    ]
    assert set(read_qtable(tmp_path / "net_qtable")) or not summary["float_ops"]


def test_json_is_all_that_is_printed_when_asked_for(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright("tune", model, "--data", data, "--expected-cos", "0.9", "-o", tmp_path, "--json")

    assert done.status == 0
    assert json.loads(done.out) == json.loads((tmp_path / "summary.json").read_text())


def test_sensitivity_leaves_exactly_as_many_float_as_asked(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "sensitivity",
        model,
        "--data",
        data,
        "--expected-cos",
        1,
        "--max-float-ops",
        2,
        "-o",
        tmp_path,
        "--methods",
        "max,mse",
    )

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["float_ops"]) == 2
    assert summary["float_ops"] == [op["name"] for op in summary["ops"][:2]]
    assert "max [loss]" in done.out
    assert "mse [loss]" in done.out
    assert read_calibration_table(tmp_path / "new_cali_table")
    assert done.status == (0 if summary["reached"] else 1)


def test_sensitivity_stops_where_int8_is_good_enough(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    done = bitwright("sensitivity", model, "--data", data, "--expected-cos", "0.5", "--auto", "-o", tmp_path)

    assert done.status == 0
    assert "nothing to search" in done.out
    assert read_qtable(tmp_path / "net_qtable") == {}


def test_search_prints_the_walk(bitwright: Command, model: Path, data: Path, tmp_path: Path) -> None:
    done = bitwright("search", model, "--data", data, "--mode", "mixed", "--expected-cos", 1, "-o", tmp_path)

    assert done.status in (0, 1)
    assert done.out.startswith("Mixed-precision walk\n")
    assert "layers.csv" in done.out
    assert (tmp_path / "net_qtable").exists()


def test_calibrate_writes_a_table_that_holds_what_it_prints(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    target = ("--target", "generic-int8")
    done = bitwright(
        "calibrate", model, "--data", data, "--method", "percentile(90)", "-o", tmp_path, "--json", *target
    )

    rows = {r["name"]: r for r in json.loads(done.out)}
    table = read_calibration_table(tmp_path / "net_cali_table")
    assert done.status == 0
    assert {"net_cali_table", "ranges.csv"} == {f.name for f in tmp_path.iterdir()}
    assert rows["x"]["method"] == "percentile(90)"
    assert rows["x"]["high"] < rows["x"]["max"]
    assert table["x"].threshold == pytest.approx(rows["x"]["high"], rel=1e-5)
    assert (table["x"].lo, table["x"].hi) == pytest.approx((rows["x"]["min"], rows["x"]["max"]))


def test_pictures_with_labels_are_read_as_the_flags_say(
    bitwright: Command, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    write_pictures(folder, 6)
    (folder / "labels.txt").write_text("".join(f"{i}.png {i % CLASSES}\n" for i in range(6)))

    done = bitwright(
        "tune", model, "--data", folder, "--resize", "10", "--crop", "8", "--mean", "127", "--scale", "0.01",
        "--pixel-format", "bgr", "--expected-cos", "0.5", "-o", tmp_path / "out",
    )  # fmt: skip

    assert done.status == 0
    assert "top-5" in done.out


def test_raw_files_are_read_with_their_shape_and_dtype(
    bitwright: Command, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(4):
        np.random.default_rng(i).standard_normal((3, 8, 8)).astype(np.float16).tofile(folder / f"{i}.bin")

    done = bitwright(
        "calibrate",
        model,
        "--data",
        folder,
        "--bin-shape",
        "3,8,8",
        "--bin-dtype",
        "float16",
        "-o",
        tmp_path / "out",
    )

    assert done.status == 0


def write_pictures(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 14, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


# --- what does not -----------------------------------------------------------------------------------------------


def test_a_missing_model_is_said_to_be_missing(bitwright: Command, data: Path, tmp_path: Path) -> None:
    done = bitwright("tune", tmp_path / "absent.onnx", "--data", data, "-o", tmp_path / "out")

    assert "absent.onnx" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 1, 30, 700])
def test_a_truncated_model_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, keep: int
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.read_bytes()[:keep])

    assert "broken.onnx" in bitwright("tune", broken, "--data", data, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_a_model_of_noise_is_refused(bitwright: Command, data: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))

    assert "noise.onnx" in bitwright("tune", noise, "--data", data, "-o", tmp_path / "out").error


def test_all_unknown_operators_are_named_at_once(bitwright: Command, data: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Polish", ["last"], ["q"], "one", domain="mine"),
        helper.make_node("Varnish", ["q"], ["y"], "two", domain="mine"),
    ]
    odd = make_model(tmp_path / "odd.onnx", *nodes)

    error = bitwright("tune", odd, "--data", data, "-o", tmp_path / "out").error

    assert "Polish" in error
    assert "Varnish" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--target", "bm1685"), "bm1684"),
        (("--target", "absent.yaml"), "absent.yaml"),
        (("--method", "median"), "median"),
        (("--method", "kl(3)"), "kl"),
        (("--methods", "max,median"), "median"),
        (("--resize", "wide"), "--resize"),
        (("--output-weights", "z=1"), "z"),
        (("--post-process", "absent.py"), "absent.py"),
        (("--device", "abacus"), "abacus"),
        (("--labels", "absent.txt"), "absent.txt"),
    ],
)
def test_a_wrong_flag_is_one_line(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    error = bitwright(
        "tune", model, "--data", data, "-o", tmp_path / "out", "--expected-cos", 1, *flags
    ).error

    assert says in error
    assert "expected" in error
    assert "found" in error
    assert not (tmp_path / "out").exists()


def test_arrays_named_after_no_input_are_refused(bitwright: Command, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=np.ones((2, 3, 8, 8), np.float32), mask=np.ones((2, 1), np.float32))

    error = bitwright("tune", model, "--data", tmp_path / "d.npz", "-o", tmp_path / "out").error

    assert "'x'" in error
    assert "'mask'" in error


def test_arrays_of_another_shape_are_refused(bitwright: Command, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((2, 3, 9, 8), np.float32))

    error = bitwright("tune", model, "--data", tmp_path / "d.npy", "-o", tmp_path / "out").error

    assert "[n, 3, 8, 8]" in error
    assert "[2, 3, 9, 8]" in error


@pytest.mark.parametrize(("bad", "says"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_samples_that_are_not_finite_are_refused(
    bitwright: Command,
    model: Path,
    tmp_path: Path,
    x: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    bad: float,
    says: str,
) -> None:
    broken = x.copy()
    broken[3, 1, 2, 2] = bad
    np.save(tmp_path / "d.npy", broken)

    assert says in bitwright("tune", model, "--data", tmp_path / "d.npy", "-o", tmp_path / "out").error


def test_samples_that_never_vary_are_refused(bitwright: Command, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.full((4, 3, 8, 8), 0.5, np.float32))

    error = bitwright("tune", model, "--data", tmp_path / "d.npy", "-o", tmp_path / "out").error

    assert "the constant 0.5" in error


def test_an_empty_folder_is_refused(bitwright: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert "empty" in bitwright("tune", model, "--data", tmp_path / "empty", "-o", tmp_path / "out").error


def test_data_that_does_not_exist_is_refused(bitwright: Command, model: Path, tmp_path: Path) -> None:
    error = bitwright("tune", model, "--data", tmp_path / "absent", "-o", tmp_path / "out").error

    assert "no such file or folder" in error


def test_an_unreadable_picture_among_good_ones_is_named(
    bitwright: Command, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    write_pictures(folder, 4)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:90])

    error = bitwright("tune", model, "--data", folder, "--resize", "8,8", "-o", tmp_path / "out").error

    assert "2.png" in error


def test_labels_of_the_wrong_length_are_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("0\n" * (SAMPLES - 1))

    error = bitwright(
        "tune", model, "--data", data, "--labels", tmp_path / "labels.txt", "-o", tmp_path / "out"
    ).error

    assert str(SAMPLES) in error


def test_an_output_folder_that_cannot_be_made_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    assert "file/out" in bitwright("tune", model, "--data", data, "-o", tmp_path / "file" / "out").error


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_output_folder_is_refused(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)

    assert (
        "a folder that can be written"
        in bitwright("tune", model, "--data", data, "-o", tmp_path / "out").error
    )


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_file(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    out = tmp_path / "out"
    command = [
        sys.executable,
        "-B",
        "-m",
        "bitwright",
        "tune",
        str(model),
        "--data",
        str(data),
        "-o",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--expected-cos", "0.5"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small_files,
    )

    assert "net_qdq.onnx" in Outcome(done.returncode, done.stdout, done.stderr).error
    assert all(not f.name.endswith(".part") for f in out.iterdir())
    assert not (out / "summary.json").exists()


def test_an_interrupted_search_is_resumed(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    # The post-processing stands for the user at the keyboard: after some comparisons it presses Ctrl-C.
    process = tmp_path / "process.py"
    process.write_text(
        "import os, signal\ncalls = 0\n"
        "def identity(outputs):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == int(os.environ.get('PRESS_AT', '0')):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return outputs\n"
    )
    out = tmp_path / "out"
    command = ["tune", str(model), "--data", str(data), "--expected-cos", "1", "-o", str(out)]
    command += ["--post-process", f"{process}:identity", "--inference-num", "8", "--input-num", "8"]

    stopped = subprocess.run(
        [sys.executable, "-m", "bitwright", *command],
        capture_output=True, text=True, check=False, env={**os.environ, "PRESS_AT": "60"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    resumed = bitwright(*command)

    state = out / "sensitivity_state.json"
    assert stopped.returncode == 2
    assert stopped.stderr.splitlines()[-1] == (
        f"bitwright: interrupted. What was measured so far is saved in {state}; "
        "run the same command again to go on from there."
    )
    assert resumed.status in (0, 1)
    assert "note: resuming: " in resumed.err
    assert not state.exists()


def test_a_traceback_is_shown_only_when_asked_for(
    bitwright: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_TRACEBACK", "1")
    done = bitwright("tune", tmp_path / "absent.onnx", "--data", data, "-o", tmp_path / "out")

    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("bitwright: error: ")
