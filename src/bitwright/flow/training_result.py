"""What a training job found, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from bitwright.files import write_text
from bitwright.flow.outputs import versions, write_json
from bitwright.flow.recipe import Recipe
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.runtime.proof import Proof
from bitwright.table import Column, Table


@dataclass
class Trained:
    """What a training job found: top-1 in 0..1 of each stage, and where the file is.

    *history*: of every epoch the mean loss, top-1 in 0..1 after it, and the learning rate that it began with.
    """

    name: str
    accuracy: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    file: str = ""
    best_epoch: int = 0

    def table(self) -> Table:
        """The stages beside each other."""
        rows = tuple({"stage": k, "top1": 100 * v} for k, v in self.accuracy.items())
        return Table(
            f"{self.name}: top-1 of each stage",
            (Column("stage", "stage"), Column("top1", "top-1", "%", 2)),
            rows,
        )


def write_training(
    folder: Path, result: Trained, recipe: Recipe, operators: Table, proof: Proof, seconds: float
) -> None:
    """`history.csv`, `report.html` and, last, `summary.json`. *operators*: what each got."""
    columns = tuple(Column(k, k) for k in ("epoch", "loss", "top1", "rate"))
    write_text(folder / "history.csv", Table("history", columns, tuple(result.history)).to_csv())
    write_page(folder / "report.html", training_page(result, recipe, operators, proof))
    summary = {**asdict(result), "seconds": round(seconds, 1), "versions": versions()}
    write_json(folder / "summary.json", summary)


def training_page(result: Trained, recipe: Recipe, operators: Table, proof: Proof) -> Page:
    """The report: top-1 of every stage, the curves of training, what each operator got, the proof of the file."""
    subtitle = (
        f"target {recipe.target} · {recipe.epochs} epochs at a learning rate of {recipe.optimizer.rate:g} · activations "
        f"{recipe.activation.dtype}, {recipe.activation.fake_quant} · weights {recipe.weight.dtype}, {recipe.weight.fake_quant}"
    )
    best = ("epoch", result.best_epoch)
    sections = (
        Section(result.table()),
        Section(_loss_table(result), curve=Curve("epoch", ("loss",), mark=best)),
        Section(
            _accuracy_table(result),
            curve=Curve("epoch", ("top1",), mark=best, level=100 * result.accuracy["float"]),
            note="The line is the float model; the marked epoch is the one that was kept.",
        ),
        Section(operators),
        Section(proof.table()),
    )
    return Page(f"Bitwright: training of {result.name}", subtitle, sections)


def _loss_table(result: Trained) -> Table:
    columns = (Column("epoch", "epoch"), Column("loss", "mean loss"), Column("rate", "learning rate", "", 6))
    return Table("Loss of every epoch", columns, tuple(result.history))


def _accuracy_table(result: Trained) -> Table:
    columns = (Column("epoch", "epoch"), Column("top1", "top-1", "%", 2))
    rows = tuple({"epoch": h["epoch"], "top1": 100 * h["top1"]} for h in result.history)
    return Table("Top-1 after every epoch", columns, rows)
