"""`run_luts`: what it says of tables, and of what it did about them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.bench import open_bench
from bitwright.flow.luts import most_suspicious_first, run_luts
from bitwright.flow.luts_result import LutsResult, TableRow, score_table, table_table, verdict
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.flow.table_scores import Score, TableScores
from bitwright.numerics.lut import TableSettings
from bitwright.search.state import SearchState


class _RootOfZero(nn.Module):
    """A square root that reads zeros behind the softmax: infinity there, times the product's zero, is no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.softmax(3 * self.before(x), -1) - 0.25)
        return torch.sqrt(y * y)


def test_a_table_before_the_root_of_zero_is_measured_and_not_acquitted_unheard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(1, 8) for _ in range(16)]
    found = run_luts(
        _RootOfZero().eval(),
        samples,
        output=tmp_path,
        settings=Settings(target="journey6"),
        table_settings=TableSettings(strategy="evenly", num_tables=1),
        example_inputs=samples[0],
    )
    (exp,) = (row for row in found.rows if row.kind == "Exp")

    assert exp.largest > 1
    assert exp.loss > 0
    assert exp.standard_error is None  # measured
    assert all(row.standard_error is None or math.isfinite(row.standard_error) for row in found.rows)


def test_where_quantization_costs_more_than_the_tables_the_verdict_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(1, 8) * (100 if i == 0 else 1) for i in range(16)]
    network = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4)).eval()
    found = run_luts(
        network, samples, output=tmp_path, settings=Settings(target="journey6"), example_inputs=samples[0]
    )

    assert not found.to_blame
    assert "Quantization costs 0." in verdict(found)
    assert "try bitwright tune" in verdict(found)
    assert "Quantization costs 0." in (tmp_path / "report.html").read_text()
    assert {"put_back", "guilty", "remedy"} <= {c.key for c in table_table(found).columns}
    shown = {c.key for c in table_table(found).without_empty().columns}
    assert not {"put_back", "guilty", "remedy"} & shown  # nothing was put back
    assert {"name", "loss", "rms"} <= shown


class _TwoNorms(nn.Module):
    """Each half of the input has a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([self.first(a), self.second(b)], -1)


_BOTH_OR_NOTHING = """
import torch

def score(model):
    x = torch.load({path!r})
    exact = torch.cat([torch.nn.functional.layer_norm(h, (8,)) for h in x.chunk(2, -1)], -1)
    wrong = (model(x) - exact).abs().reshape(-1, 2, 8).mean((0, 2))
    return float(wrong.max() < 0.1)
"""


def test_two_tables_that_each_spoil_the_metric_are_both_mended(tmp_path: Path) -> None:
    """Each was tried with the other still bad: nothing seemed to help, and nothing was tried."""
    torch.manual_seed(0)
    x = torch.randn(24, 16) * 10 ** -torch.rand(24, 1)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "metric.py").write_text(_BOTH_OR_NOTHING.format(path=str(tmp_path / "x.pt")))
    found = run_luts(
        _TwoNorms().eval(),
        list(x.split(1)),
        output=tmp_path / "out",
        settings=Settings(target="journey6", evaluate=f"{tmp_path / 'metric.py'}:score"),
        table_settings=TableSettings(strategy="evenly", num_tables=1),
        example_inputs=x[:1],
    )

    assert {n: s.metric for n, s in found.stages.items()} == {
        "float": 1,
        "float tables": 1,
        "fixed tables": 0,
        "integer model": 0,
        "guilty in float": 1,
        "repaired": 1,
        "integer model, repaired": 1,
    }
    assert set(found.blame.guilty) == {"first.rsqrt", "second.rsqrt"}
    assert found.outcomes == {r.name: r.remedy for r in found.remedies if r.kept}
    assert found.outcomes.keys() == set(found.blame.guilty)
    assert found.repaired
    assert "plan.json has what helped" in verdict(found)
    rows = list(csv.DictReader((tmp_path / "out" / "luts.csv").open()))
    assert [float(r["put_back"]) for r in rows] == [0, 1]
    assert [(r["name"], r["remedy"]) for r in rows] == [(n, found.outcomes[n]) for n, _ in found.blame.steps]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [s["score"] for s in summary["put_back"]] == [0, 1]


_PRESSES_CTRL_C = """
from pathlib import Path

def interrupted_score(model):
    calls = Path({calls!r})
    count = int(calls.read_text()) + 1
    calls.write_text(str(count))
    if count == {at}:
        raise KeyboardInterrupt
    return score(model)
"""


def test_scores_of_an_interrupted_run_are_not_measured_again(tmp_path: Path) -> None:
    """A user's metric may take minutes, and dozens of networks are measured."""
    at = 9  # behind the comparison and the tables put back to float: among the remedies
    torch.manual_seed(0)
    x = torch.randn(24, 16) * 10 ** -torch.rand(24, 1)
    torch.save(x, tmp_path / "x.pt")
    calls, metric = tmp_path / "calls", tmp_path / "metric.py"
    metric.write_text(
        _BOTH_OR_NOTHING.format(path=str(tmp_path / "x.pt")) + _PRESSES_CTRL_C.format(calls=str(calls), at=at)
    )

    def run(folder: str, before: int) -> tuple[LutsResult, int]:
        calls.write_text(str(before))
        torch.manual_seed(0)
        settings = Settings(target="journey6", evaluate=f"{metric}:interrupted_score")
        wish = TableSettings(strategy="evenly", num_tables=1)
        found = run_luts(
            _TwoNorms().eval(),
            list(x.split(1)),
            output=tmp_path / folder,
            settings=settings,
            table_settings=wish,
            example_inputs=x[:1],
        )
        return found, int(calls.read_text()) - before

    whole, needed = run("whole", 1000)
    assert needed > at
    with pytest.raises(KeyboardInterrupt):
        run("out", 0)
    state = tmp_path / "out" / "luts_state.json"
    assert sum(k.startswith("metric") for k in json.loads(state.read_text())["measured"]) == at - 1
    resumed, rest = run("out", at)
    assert rest == needed - (at - 1)
    assert not state.exists()
    assert {n: vars(s) for n, s in resumed.stages.items()} == {n: vars(s) for n, s in whole.stages.items()}
    assert resumed.remedies == whole.remedies
    assert resumed.rows == whole.rows


def test_where_nothing_was_mended_the_report_shows_nothing_as_repaired(tmp_path: Path) -> None:
    """The settled plan's tables are other objects: every curve once had a second one beside it."""
    module, x = _TwoNorms().eval(), torch.randn(24, 16)
    run_luts(
        module, list(x.split(1)), output=tmp_path, settings=Settings(target="journey6"), example_inputs=x[:1]
    )

    report = (tmp_path / "report.html").read_text()
    assert "mean error" in report
    assert "repaired" not in report


def test_a_score_that_is_no_number_is_worse_than_any() -> None:
    """Its difference to a number is greater than nothing: tables that made one were acquitted."""
    good, none = Score(0.99), Score(math.nan)

    assert good.exceeds(none, 0.5)
    assert none.exceeds(good, 0.5)
    assert good.exceeds(Score(1.0, metric=math.nan), 0.5)
    assert not good.exceeds(Score(0.6), 0.5)
    assert good.exceeds(Score(0.4), 0.5)


def test_a_table_whose_loss_is_no_number_is_the_most_suspicious() -> None:
    losses = [0.1, math.nan, 0.3, 0.0, 0.0]
    rows = [TableRow(str(i), "Exp", "segment", loss, None, 1.0, float(i)) for i, loss in enumerate(losses)]

    assert [row.name for row in most_suspicious_first(rows)] == ["1", "2", "0", "4", "3"]


def test_accuracies_are_measured_again_with_other_labels() -> None:
    """After an interruption a mended file of labels once changed nothing."""
    torch.manual_seed(0)
    network, inputs = nn.Linear(8, 6).eval(), torch.randn(24, 1, 8)
    state, settings = SearchState(None, ""), Settings(target="journey6")

    def top1(shift: int) -> float:
        samples = [{"input": x, "label": (int(network(x).argmax()) + shift) % 6} for x in inputs]
        bench = open_bench(network, samples, settings, Silence(), example_inputs=inputs[0])
        scores = TableScores(bench, settings, state)
        return scores.accuracies({"float": scores.exact()}, Silence())["float"].top1

    assert top1(1) == 0
    measured = len(state.measured)
    assert top1(0) == 1
    assert top1(1) == 0
    assert len(state.measured) == measured + 1  # the third was known


def test_labelled_samples_are_counted_at_every_stage(tmp_path: Path) -> None:
    """They were read, and nothing was done with them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 6)).eval()
    inputs = torch.randn(24, 1, 8)
    samples = [{"input": x, "label": int(network(x).argmax())} for x in inputs]
    found = run_luts(
        network, samples, output=tmp_path, settings=Settings(target="journey6"), example_inputs=inputs[0]
    )
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]

    assert stages["float"]["top1"] == stages["float"]["top5"] == 1
    assert all(0.8 <= s["top1"] <= s["top5"] <= 1 for s in stages.values())
    assert [r["top1"] for r in score_table(found).rows] == [100 * s["top1"] for s in stages.values()]
