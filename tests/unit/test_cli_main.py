"""The command line without a model: help, usage errors, import time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module

import pytest

from bitwright.cli.main import PACKAGE, VERBS, run
from bitwright.version import __version__


@pytest.fixture(autouse=True)
def wide_terminal_and_own_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "240")
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "240"},
    )


def test_help_answers_at_once_and_imports_neither_torch_nor_numpy() -> None:
    script = (
        "import sys; from bitwright.cli.main import run; status = run(['--help']); "
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules); "
        "print('imported', sorted(heavy)); sys.exit(status)"
    )
    began = time.perf_counter()
    done = command("-c", script)
    seconds = time.perf_counter() - began

    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "imported []"
    # Half a second on a quiet machine; torch alone takes longer than this on a busy one.
    assert seconds < 1.5


def test_the_package_runs_as_a_module() -> None:
    done = command("-m", "bitwright", "--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"bitwright {__version__}\n", "")


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0

    shown = capsys.readouterr().out
    assert all(verb in shown and line in shown for verb, line in VERBS.items())


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "targets" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_ends_with_examples_that_name_it(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--help"]) == 0

    examples = capsys.readouterr().out.partition("Examples:")[2].split("\n")
    lines = [line.strip() for line in examples if line.strip()]
    assert 2 <= len(lines) <= 5
    assert lines == [" ".join(e.split()) for e in import_module(f"{PACKAGE}.{verb}").EXAMPLES]
    assert any(line.startswith(f"bitwright {verb}") for line in lines)


@pytest.mark.parametrize("verb", ["tune", "sensitivity", "search", "calibrate"])
def test_the_flags_of_a_job_are_shown_with_their_defaults(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "-h"]) == 0

    shown = capsys.readouterr().out
    flags = "--data --target --method --input-num --seed --device --labels --resize --crop --mean --scale "
    flags += "--pixel-format --layout --bin-shape --bin-dtype --output"
    if verb != "calibrate":
        flags += " --methods --expected-cos --inference-num --max-float-ops --output-weights --post-process"
        flags += " --cosine-scale --save-state"
        flags += " --loss --probes --verify --operators --precisions --budget --workers --ray"
        assert "[default: (0.99)]" in shown
    assert [f for f in flags.split() if f not in shown] == []
    assert "[default: onnxruntime]" in shown
    assert "[default: 100]" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["polish"], "No such command 'polish'"),
        (["tnue"], "Did you mean 'tune'?"),
        (["--colour"], "No such option: --colour"),
        (["targets", "--colour"], "No such option: --colour"),
        (["tune"], "Missing argument 'MODEL'"),
        (["tune", "m.onnx"], "Missing option '--data'"),
        (["tune", "m.onnx", "--data", "d", "--input-num", "many"], "Invalid value for '--input-num'"),
        (["tune", "m.onnx", "--data", "d", "--input-num", "-1"], "Invalid value for '--input-num'"),
        (["tune", "m.onnx", "--data", "d", "--expected-cos", "1.5"], "Invalid value for '--expected-cos'"),
        (["tune", "m.onnx", "--data", "d", "--layout", "chwn"], "Invalid value for '--layout'"),
        (["demo", "--network", "mlp"], "Invalid value for '--network'"),
        (["search", "m.onnx", "--data", "d", "--mode", "wild"], "Invalid value for '--mode'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bitwright: error: ")
    assert says in err
    assert err.count("\n") == 1


def test_an_error_of_a_verb_names_the_verb_whose_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    run(["tune", "--colour"])
    assert "See: bitwright tune --help" in capsys.readouterr().err


def test_targets_are_listed_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["bm1684", "bm1684x", "generic", "generic-int8", "journey6", "onnxruntime"]

    assert run(["targets"]) == 0
    people = capsys.readouterr().out
    assert run(["targets", "--json"]) == 0
    programs = import_module("json").loads(capsys.readouterr().out)

    assert [line.split()[0] for line in people.splitlines()[2:]] == names
    assert [t["name"] for t in programs] == names


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m bitwright targets | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
