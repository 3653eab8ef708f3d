"""What `quantize` and `tune --export` leave in a folder: the line of the integer file, reused folders, Ctrl-C, a full disk."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from tests.unit.cli_cases import CLASSES, SAMPLES, Command, Outcome, make_model

from bitwright.cli.results import print_tuned
from bitwright.flow.settings import Settings
from bitwright.flow.tune import tune
from bitwright.plan.plan import Plan

# --- the line of the integer file --------------------------------------------------------------------------------


def outputs(path: Path, data: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.load(data)["x"]})[0], np.float64)


@pytest.mark.parametrize("verb", ["quantize", "tune"])
def test_the_integer_file_has_a_line_of_its_own(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, verb: str
) -> None:
    """Once the only figures shown were those of the simulation without tables."""
    flags = () if verb == "quantize" else ("--max-float-ops", 1, "--expected-cos", 1)
    target = ("--target", "bm1684", "--export", "integer")
    done = bitwright(verb, model, "--data", data, *target, *flags, "-o", tmp_path, "-q")

    found, expected = outputs(tmp_path / "net_integer.onnx", data), outputs(model, data)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((found * expected).sum(1) / norms).mean())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["integer"]["cosine"] == pytest.approx(cosine, abs=1e-9)
    assert summary["integer"]["cosine"] != summary["quantized" if verb == "quantize" else "mixed"]["cosine"]
    assert summary["integer"]["top1"] == np.mean(found.argmax(1) == np.arange(SAMPLES) % CLASSES)
    line = next(row for row in done.out.splitlines() if row.startswith("integer file on ONNX Runtime"))
    islands = summary["integer"]["islands"]
    plan = Plan.load(tmp_path / "plan.json")
    assert line.split()[5:] == [
        f"{cosine:.6f}",
        f"{100 * summary['integer']['top1']:.2f}",
        "100.00",
        str(len({plan.ops[name].group for name in islands})),
    ]
    assert (verb == "quantize") == (not islands)
    assert "integer file on ONNX Runtime" in (tmp_path / "report.html").read_text()


def test_an_integer_file_that_misses_what_its_plan_meets_is_said(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(target="journey6", export="integer", expected_cos=0.9)
    found = tune(model, data, output=tmp_path, settings=settings)
    worse = {**found.stages, "integer": replace(found.stages["integer"], cosine=0.89)}

    assert print_tuned(found, tmp_path, as_json=False) == 0
    assert capsys.readouterr().err == ""
    assert print_tuned(replace(found, stages=worse), tmp_path, as_json=False) == 0
    assert capsys.readouterr().err.startswith(
        "bitwright: note: the integer file has cosine 0.890000, below the 0.9 that its plan meets"
    )


def test_what_is_float_is_said_with_its_reason(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    """Once there was a number in the table, and what a search had chosen passed for what the target refuses."""
    node = helper.make_node("Softmax", ["last"], ["y"], "softmax", axis=-1)
    soft = make_model(tmp_path / "soft.onnx", node)
    common = ("--data", data, "--target", "bm1684", "-q")
    search = ("--expected-cos", 1, "--max-float-ops", 1)
    tuned = bitwright("tune", soft, *common, *search, "-o", tmp_path / "t")
    done = bitwright("quantize", soft, *common, "--plan", tmp_path / "t" / "plan.json", "-o", tmp_path / "q")

    refused = {"softmax": "bm1684 does not allow int8 Softmax (allowed: float)"}
    line = f"\n  softmax: {refused['softmax']}\n"
    assert "\nNot granted by the target (1):" + line in tuned.out
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert summary["not_granted"] == refused
    (chosen,) = set(summary["float_ops"]) - {"softmax"}
    assert f"\nFloat operators (2):\n  {chosen}: sensitive: rank 1, loss " in done.out
    assert line in done.out
    assert summary["images"] == dict.fromkeys(("calibration", "inference", "accuracy"), SAMPLES)
    report = (tmp_path / "q" / "report.html").read_text()
    assert "Float operators" in report
    assert refused["softmax"] in report


@pytest.mark.parametrize("verb", ["quantize", "luts"])
def test_a_plan_that_cannot_be_read_is_refused_before_anything_is_computed(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, verb: str
) -> None:
    absent = tmp_path / "absent.json"
    done = bitwright(verb, model, "--data", data, "--plan", absent, "-o", tmp_path / "out")

    assert done.err == f"{done.error}\n"
    assert f"{absent}: expected a plan in JSON" in done.error


@pytest.mark.parametrize("verb", ["quantize", "luts"])
def test_a_plan_leaves_nothing_for_a_threshold_method_to_do(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, verb: str
) -> None:
    flags = ("--data", data, "--method", "kl", "--plan", tmp_path / "plan.json", "-o", tmp_path)

    said = f"--method: expected a flag of {verb} --plan; found one that it has no use for"
    assert said in bitwright(verb, model, *flags).error


# --- a folder that is used again ---------------------------------------------------------------------------------


def listed(done: Outcome) -> set[str]:
    lines = done.out[done.out.index("\nResults in ") :].splitlines()[2:]
    return {line.split()[0] for line in lines}


@pytest.mark.parametrize(("export", "gone"), [("qdq", "net_integer.onnx"), ("integer", "net_qdq.onnx")])
def test_files_of_an_earlier_run_with_another_plan_go(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, export: str, gone: str
) -> None:
    command = ("quantize", model, "--data", data, "-o", tmp_path, "--export")
    assert {"net_integer.onnx", "net_qdq.onnx", "accumulators.csv"} <= listed(bitwright(*command, "both"))
    (tmp_path / "another_integer.onnx").write_bytes(b"of another model")
    done = bitwright(*command, export)

    files = {f.name for f in tmp_path.iterdir()}
    assert f"note: removed {tmp_path / gone}: an earlier run made it" in done.err
    assert gone not in files
    assert ("accumulators.csv" in files) == (export == "integer")
    assert listed(done) == files - {"another_integer.onnx"}
    assert bitwright("verify", tmp_path, "-q").status == 0


@pytest.mark.parametrize(
    "verb",
    [
        ("luts", "--target", "journey6"),
        ("sensitivity",),
        ("search", "--mode", "mixed"),
        ("search", "--expected-cos", "0.5"),
    ],
    ids=" ".join,
)
def test_files_are_not_proven_against_the_plan_of_another_verb(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    common = ("--data", data, "-o", tmp_path, "-q")
    assert bitwright("quantize", model, *common).status == 0
    assert bitwright(verb[0], model, *common, *verb[1:]).status == 0

    assert (tmp_path / "net_qdq.onnx").exists()
    assert "the record that bitwright quantize and tune leave" in bitwright("verify", tmp_path).error


# --- Ctrl-C ------------------------------------------------------------------------------------------------------

#: Stands for the user at the keyboard, who presses Ctrl-C on reading a line, or while a file is written.
_USER = """
import os, signal, sys
import numpy as np

awaited = os.environ.get("PRESS_ON")

def press():
    global awaited
    awaited = None
    os.kill(os.getpid(), signal.SIGINT)

class Reader:
    def __init__(self, screen):
        self.screen, self.seen = screen, ""

    def write(self, text):
        self.screen.write(text)
        self.seen += text
        if awaited and text.endswith("\\n") and awaited in self.seen:
            press()

    def __getattr__(self, name):
        return getattr(self.screen, name)

def opened(event, arguments):
    if awaited and event == "open" and f"/.{awaited}." in str(arguments[0]):
        press()

def samples():
    if awaited:
        sys.stderr = Reader(sys.stderr)
        sys.addaudithook(opened)
    return dict(np.load(SAMPLES))
"""


@pytest.fixture
def keyboard(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "keyboard.py"
    path.write_text(_USER.replace("SAMPLES", repr(str(data))))
    return path


def interrupted(press_on: str, *command: object) -> str:
    """The last line of standard error of a command that was interrupted, with nothing half-written."""
    done = subprocess.run(
        [sys.executable, "-B", "-m", "bitwright", *map(str, command)],
        capture_output=True, text=True, check=False, env={**os.environ, "PRESS_ON": press_on},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_nothing_is_written_where_quantize_is_interrupted_before_its_files(
    model: Path, keyboard: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("quantize", model, "--data", f"{keyboard}:samples", "--export", "both", "-o", out)

    assert interrupted("calibrating", *command) == "bitwright: interrupted. Nothing was written."
    assert not out.exists()


def test_an_earlier_result_stays_whole_until_the_new_one_is_proven(
    bitwright: Command, model: Path, keyboard: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("quantize", model, "--data", f"{keyboard}:samples", "-o", out, "--export")
    assert bitwright(*command, "both").status == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    interrupted("proving on ONNX Runtime (integers)", *command, "integer", "--method", "percentile(90)")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert bitwright("verify", out, "-q").status == 0


def test_files_of_two_runs_do_not_pass_for_one(
    bitwright: Command, model: Path, keyboard: Path, tmp_path: Path
) -> None:
    """Interrupted between its files, a run leaves some of its own and some of the run before."""
    out = tmp_path / "out"
    command = ("quantize", model, "--data", f"{keyboard}:samples", "-o", out, "--export", "both")
    assert bitwright(*command).status == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    line = interrupted("net_integer.onnx", *command, "--method", "percentile(90)")
    assert line.startswith("bitwright: interrupted. Written, each file complete: ")
    assert line.endswith(f" in {out}. Run the same command again for the rest.")
    after = {f.name: f.read_bytes() for f in out.iterdir()}
    assert after["net_qdq.onnx"] != before["net_qdq.onnx"]
    assert after["net_integer.onnx"] == before["net_integer.onnx"]
    assert before.keys() - after.keys() == {"job.json", "summary.json"}
    assert "job.json" in bitwright("verify", out).error
    assert bitwright(*command, "--method", "percentile(90)").status == 0
    assert bitwright("verify", out, "-q").status == 0


def test_a_search_survives_an_interruption_of_its_export(
    bitwright: Command, model: Path, keyboard: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("tune", model, "--data", f"{keyboard}:samples", "-o", out, "--export", "both")
    command += ("--target", "bm1684", "--expected-cos", 1)

    state = out / "sensitivity_state.json"
    assert f"saved in {state}; run the same command again" in interrupted("net_integer.onnx", *command)
    assert not any(f.name.endswith((".tmp", ".json")) for f in out.iterdir() if f != state)
    again = bitwright(*command)
    assert "note: resuming: " in again.err
    assert not state.exists()
    assert bitwright("verify", out, "-q").status == 0


#: Of Linux: `PR_CAPBSET_DROP` and `CAP_DAC_OVERRIDE`.
_DROP_CAPABILITY, _DAC_OVERRIDE = 24, 1

# --- a full disk, a locked folder --------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("full", ["net_integer.onnx", "summary.json"])
def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_file(
    bitwright: Command, model: Path, data: Path, tmp_path: Path, full: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fill() -> None:
        # What is written under the name of the unfinished file meets the error of a disk that has no room.
        (out / f".{full}.{os.getpid()}.tmp").symlink_to("/dev/full")

    command = ["quantize", str(model), "--data", str(data), "--export", "both", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-B", "-m", "bitwright", *command],
        capture_output=True, text=True, check=False, preexec_fn=fill,
    )  # fmt: skip

    assert Outcome(done.returncode, done.stdout, done.stderr).error == (
        f"bitwright: error: {out / full}: expected a place that can be written to; found No space left on device. "
        "Choose another --output folder, or make room."
    )
    files = {f.name for f in out.iterdir()}
    assert full not in files
    assert {"job.json", "summary.json"}.isdisjoint(files)
    assert not any(name.endswith(".tmp") for name in files)
    assert "job.json" in bitwright("verify", out).error


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_turns_read_only_keeps_the_earlier_result(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lock = tmp_path / "lock.py"
    lock.write_text(
        "import os, numpy as np\n"
        f"def samples():\n    os.chmod({str(out)!r}, 0o555)\n    return dict(np.load({str(data)!r}))\n"
    )
    command = ["quantize", str(model), "-o", str(out), "--export", "both", "-q"]
    assert bitwright(*command, "--data", data).status == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def bound_by_permissions() -> None:
        ctypes.CDLL(None).prctl(_DROP_CAPABILITY, _DAC_OVERRIDE)  # which the superuser is not, else

    done = subprocess.run(
        [sys.executable, "-B", "-m", "bitwright", *command, "--data", f"{lock}:samples"],
        capture_output=True, text=True, check=False, preexec_fn=bound_by_permissions,
    )  # fmt: skip
    out.chmod(0o755)

    assert "found Permission denied" in Outcome(done.returncode, done.stdout, done.stderr).error
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(
    bitwright: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "net_qdq.onnx").mkdir()

    for export in ("qdq", "integer"):
        error = bitwright("quantize", model, "--data", data, "--export", export, "-o", tmp_path).error
        assert (
            f"{tmp_path / 'net_qdq.onnx'}: expected a place that can be written to; found Is a dir" in error
        )
        assert {f.name for f in tmp_path.iterdir()} == {"net_qdq.onnx"}
