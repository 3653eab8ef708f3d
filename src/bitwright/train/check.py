"""`check_qat_model`: is what was prepared what was meant?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import ModelError, explained
from bitwright.files import write_text
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op
from bitwright.table import Column, Table
from bitwright.train.control import called, evaluating
from bitwright.train.fake_quants import Quantizer
from bitwright.train.observers.fixed_scale import FixedScale
from bitwright.train.prepared import PreparedModel, prepared_in
from bitwright.train.states import FakeQuantState

#: Real units; more is usually a mask, or a value that should be scaled in the float model.
LARGE_RANGE = 1000.0
#: The constant that activations have unless told otherwise; others are worth a look.
USUAL_CONSTANT = 0.01

_NAME, _TYPE = Column("name", "Module Name"), Column("type", "Module Type")


def check_qat_model(
    model: nn.Module, example_inputs: Any = None, out_dir: str | Path | None = None, *, verbose: bool = True
) -> dict[str, Table]:
    """Five tables: what was not fused, how often each module is called, formats of outputs, of weights, and what looks odd.

    *example_inputs*: run once, in float and evaluation mode, to see that the model accepts them. *out_dir*: gets
    `model_check_result.txt` and a CSV for each table. *verbose*: print them. *raises* `OutputError`, `ModelError`.
    """
    prepared = prepared_in(model)
    prepared.check_unchanged()
    if example_inputs is not None:
        with (
            explained(
                ModelError,
                "check_qat_model, example_inputs",
                expected="inputs that the model accepts",
                remedy="Give a batch like the one that prepare() was given.",
            ),
            evaluating(prepared, FakeQuantState.FLOAT),
        ):
            called(prepared, example_inputs)
    graph = prepared.float_graph()
    tables = {
        "fusable": _fusable(prepared, graph),
        "called_times": _called_times(prepared, graph),
        "output_qconfig": _outputs(prepared, graph),
        "weight_qconfig": _weights(prepared, graph),
        "please_check": _odd(prepared, graph),
    }
    text = "\n\n".join(str(t) if t.rows else f"{t.title}\n{_NOTHING[key]}" for key, t in tables.items())
    if verbose:
        print(text)
    if out_dir is not None:
        folder = Path(out_dir)
        write_text(folder / "model_check_result.txt", text + "\n")
        for key, table in tables.items():
            write_text(folder / f"{key}.csv", table.to_csv())
    return tables


_NOTHING = {
    "fusable": "Everything that can be fused is fused.",
    "called_times": "Every module that holds parameters runs exactly once.",
    "output_qconfig": "Nothing is quantized.",
    "weight_qconfig": "No weight is quantized.",
    "please_check": "Nothing looks odd.",
}


def _fusable(prepared: PreparedModel, graph: Graph) -> Table:
    """Batch normalisations that the chip would have to compute by themselves."""
    rows = [
        {"name": name, "type": entry.kind}
        for name, entry in prepared.facts.plan.ops.items()
        if entry.kind == "BatchNorm"
    ]
    return Table(
        "Fusable modules are listed below:", (Column("name", "name"), Column("type", "type")), tuple(rows)
    )


def _called_times(prepared: PreparedModel, graph: Graph) -> Table:
    """Modules with parameters that do not run exactly once: 0 = unused, more = shared."""
    run = [prepared.get_submodule(str(n.target)) for n in prepared.graph.nodes if n.op == "call_module"]
    names = {
        *graph.op_names,
        *(m.name for m in run if isinstance(m, Op)),
    }  # also what training alone computes
    calls = Counter(name.partition("._call_")[0] for name in names)
    quantizers = {path for path, _ in prepared.quantizers}
    owners = {
        path.rpartition(".")[0]: None
        for path, _ in prepared.named_parameters(remove_duplicate=False)
        if not any(path.startswith(f"{q}.") for q in quantizers)
    }
    readers = {
        str(v.node.target).rpartition(".")[0] for v in graph.values.values() if v.is_constant and v.readers
    }
    rows = []
    for owner in owners:
        times = calls.get(owner, 1 if owner in readers else 0)
        if times != 1:
            rows.append({"name": owner, "times": times})
    return Table(
        "Each module called times:", (Column("name", "name"), Column("times", "called times")), tuple(rows)
    )


def _outputs(prepared: PreparedModel, graph: Graph) -> Table:
    plan = prepared.facts.plan
    formats = _formats(prepared)
    rows = []
    for name, entry in plan.ops.items():
        if not entry.quantizable:
            continue
        op = graph.op(name)
        made = _output_value(prepared, graph, name)
        quantizer = formats.get(made) if made is not None else None
        rows.append(
            {
                "name": name,
                "type": op.kind,
                "input": _listed(_input_dtypes(prepared, formats, graph, name)),
                "out": quantizer.spec.dtype.name if quantizer else _passed_on(prepared, formats, made),
                "axis": None if quantizer is None else quantizer.spec.axis,
                "observer": None if quantizer is None else type(quantizer.observer).__name__,
            }
        )
    columns = (
        _NAME,
        _TYPE,
        Column("input", "Input dtype"),
        Column("out", "out dtype"),
        Column("axis", "ch_axis"),
        Column("observer", "observer"),
    )
    return Table("Each layer out qconfig:", columns, tuple(rows))


def _weights(prepared: PreparedModel, graph: Graph) -> Table:
    rows = []
    for value, quantizer in _formats(prepared).items():
        if not quantizer.is_weight:
            continue
        reader = graph.value(value).readers[0].op
        rows.append(
            {
                "name": reader,
                "type": graph.op(reader).kind,
                "dtype": quantizer.spec.dtype.name,
                "axis": quantizer.spec.axis,
                "observer": type(quantizer.observer).__name__,
            }
        )
    columns = (
        _NAME,
        _TYPE,
        Column("dtype", "weight dtype"),
        Column("axis", "ch_axis"),
        Column("observer", "observer"),
    )
    return Table("Weight qconfig:", columns, tuple(rows))


def _odd(prepared: PreparedModel, graph: Graph) -> Table:
    plan, formats = prepared.facts.plan, _formats(prepared)
    rows: list[dict[str, Any]] = []

    def remark(name: str, text: str) -> None:
        rows.append({"name": name, "type": plan.ops[name].kind if name in plan.ops else "", "message": text})

    for name, entry in plan.ops.items():
        if not entry.quantizable:
            continue
        if entry.precision == "float":
            remark(name, f"float: {entry.why or 'asked for'}")
            continue
        made = _output_value(prepared, graph, name)
        out = _passed_on(prepared, formats, made)
        inputs = _input_dtypes(prepared, formats, graph, name)
        if out is not None and set(inputs) - {out}:
            remark(name, f"input dtype [{_listed(inputs)}] is not same with out dtype {out}")
    for value, quantizer in formats.items():
        title = graph.value(value).producer or value
        if isinstance(quantizer.observer, FixedScale):
            remark(title, f"Fixed scale {float(quantizer.observer.fixed.max()):.3g}")
        elif not quantizer.is_weight and quantizer.observer.averaging_constant != USUAL_CONSTANT:
            remark(title, f"averaging_constant {quantizer.observer.averaging_constant:g}")
        reach = float(max(-quantizer.observer.lo.min(), quantizer.observer.hi.max()))
        if not quantizer.is_weight and quantizer.has_range and reach > LARGE_RANGE:
            remark(title, f"total data range, up to {reach:.3g}, may be too large for quantization (a mask?)")
    for name in graph.info.outputs:
        producer = graph.value(name).producer
        if producer is not None and _passed_on(prepared, formats, name) is None:
            remark(producer, f"output {name} is not quantized")
    return Table(
        "Please check if these OPs qconfigs are expected..",
        (_NAME, _TYPE, Column("message", "Msg")),
        tuple(rows),
    )


# --- formats ---------------------------------------------------------------------------------------------------


def _formats(prepared: PreparedModel) -> dict[str, Quantizer]:
    """Value -> its quantizer."""
    found = {}
    for place in prepared.facts.places:
        quantizer = prepared.get_submodule(place.path)
        assert isinstance(quantizer, Quantizer)
        found[place.value] = quantizer
    return found


def _output_value(prepared: PreparedModel, graph: Graph, op: str) -> str | None:
    """The value that *op* makes once batch normalisation is folded into it; None if it stays in the accumulator."""
    plan = prepared.facts.plan
    name: str = graph.op(op).outputs[0]
    readers = graph.value(name).readers
    while name not in plan.values and len(readers) == 1 and readers[0].op not in plan.ops:
        name = graph.op(readers[0].op).outputs[0]
        readers = graph.value(name).readers
    return name if name in plan.values else None


def _passed_on(prepared: PreparedModel, formats: Mapping[str, Quantizer], value: str | None) -> str | None:
    """The format of *value*, also where its codes are those of another."""
    plan = prepared.facts.plan
    while value is not None and value not in formats:
        entry = plan.values.get(value)
        value = None if entry is None else entry.same_as
    return None if value is None else formats[value].spec.dtype.name


def _input_dtypes(
    prepared: PreparedModel, formats: Mapping[str, Quantizer], graph: Graph, op: str
) -> list[str]:
    """Formats of the activations that *op* reads; `float32` where they are not quantized."""
    found = []
    for i, name in enumerate(graph.op_inputs(op)):
        if name is None or graph.op(op).role(i) != "activation" or not graph.value(name).info.is_float:
            continue
        inner = name not in prepared.facts.plan.values
        if not inner:
            found.append(_passed_on(prepared, formats, name) or "float32")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
