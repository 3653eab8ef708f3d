"""How sensitive each output is to single quantizers, or single tables, alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitwright.analysis.metrics import Metric
from bitwright.analysis.switches import Switch, switched, switches_of
from bitwright.analysis.trace import Trace
from bitwright.search.jobs import Progress
from bitwright.table import Column, Table
from bitwright.train.prepared import PreparedModel

#: A model's output -> output name -> tensors of the baseline and of the model.
Comparison = Callable[[Any], Mapping[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Effects:
    """*values*: output -> what the metric says of it with each of *switches* alone. *macs*: operator -> multiply-accumulates."""

    metric: Metric
    switches: Sequence[Switch]
    values: Mapping[str, Sequence[float]]
    macs: Mapping[str, int]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return list(self.values)

    def columns(self) -> tuple[Column, ...]:
        """Columns of the tables and files."""
        names = ("op_name", "sensitive_type", "op_type", self.metric.name, "quant_dtype", "flops")
        return tuple(Column(name, name, digits=9) for name in names)

    def table(self, output: str, *, reserve: bool = False) -> Table:
        """All switches, those that *output* suffers most from first; *reserve*: last."""
        ranked = sorted(
            zip(self.switches, self.values[output], strict=True),
            key=lambda pair: self.metric.badness(pair[1]),
            reverse=not reserve,
        )
        total = sum(self.macs.values())
        rows = tuple(
            {
                "op_name": s.name,
                "sensitive_type": s.kind,
                "op_type": s.op_type,
                self.metric.name: value,
                "quant_dtype": s.dtype,
                "flops": _share(0 if s.op is None else self.macs.get(s.op.name, 0), total),
            }
            for s, value in ranked
        )
        return Table(f"Sensitivity of output {output}", self.columns(), rows)

    def as_lists(self, table: Table) -> list[list[Any]]:
        """The rows of *table* as lists, which the `sensitive_op_…` setters take."""
        return [[row[column.key] for column in table.columns] for row in table.rows]


def measure_effects(
    model: PreparedModel, data: Any, compare: Comparison, metric: Metric, progress: Progress
) -> Effects:
    """*metric* of every output with each quantizer (or table) of *model* on alone.

    What lies before a quantizer is the same as with all of them off, and is computed once: the run with one on starts there.
    """
    switches = switches_of(model)
    values: dict[str, list[float]] = {}
    with switched(model, switches, on=False):
        trace = Trace(model, data)
        for done, switch in enumerate(switches, 1):
            with switched(model, (switch,), on=True):
                output = trace.rerun({switch.path})
            for name, (reference, found) in compare(output).items():
                values.setdefault(name, []).append(metric.measure(reference, found))
            progress(done, len(switches), switch.name)
    return Effects(metric, switches, values, model.float_graph().macs())


def _share(macs: int, total: int) -> str:
    return f"{macs}({macs / total if total else 0:.2%})"
