"""Proof that an exported model computes what was simulated (docs/numerics.md §7).

Each quantized group is compared on its own: ONNX Runtime runs the whole file literally, and what a group of operators read
there, code for code, is what the simulation of that group is fed with. Its output codes must then agree, apart from
the few that float32 summation order decides. Whole networks are reported beside it: there, one flipped code spreads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from torch import Tensor

from bitwright.errors import DataError, ModelError, ProofError
from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.replay import Environment, Reads, Replay
from bitwright.numerics.affine import dequantize, quantize
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams
from bitwright.ops.table import TableOp
from bitwright.plan.code_names import codes_in
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.runtime.agreement import AgreementMeter
from bitwright.runtime.proof import OpDifference, Proof, tie_width
from bitwright.runtime.session import Session


def verify(
    graph: Graph,
    plan: Plan,
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Proof:
    """As `measure`. *raises* `ProofError` naming the operator, if the rule of docs/numerics.md §7 is broken."""
    proof = measure(graph, plan, model, batches, progress=progress)
    proof.check()
    return proof


def measure(
    graph: Graph,
    plan: Plan,
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Proof:
    """How far ONNX Runtime, running the exported *model*, is from the simulation of *plan*.

    *batches*: input name -> `[n, ...]`, small (all codes of a batch are held at once). *progress* is called with the
    number of samples after each batch. *raises* `ModelError` if ONNX Runtime refuses *model*, `DataError` without data.
    """
    comparison = _Comparison(graph, plan, model)
    with torch.no_grad():
        for batch in batches:
            samples = comparison.add(batch)
            if progress:
                progress(samples)
    return comparison.result()


@dataclass
class _Row:
    """Counts of one group, so far."""

    steps: int = 0
    differing: int = 0
    elements: int = 0
    ties: int = 0
    slack: int = 0


class _Comparison:
    """The three runs of each batch (float, simulated, ONNX Runtime twice) and what their comparison has found."""

    def __init__(self, graph: Graph, plan: Plan, model: onnx.ModelProto) -> None:
        self.graph, self.plan, self.replay = graph, plan, Replay(graph)
        codes = codes_in(model)
        # QuantizeLinear rounds half-even whatever the target does; integer operators round as the target.
        self.half_even = {value for value, (_, op_type) in codes.items() if op_type == "QuantizeLinear"}
        self.reads = half_even(quantized_reads(graph, plan), self.half_even)
        self.constants = {k: q for k, q in self.reads.items() if graph.value(k[0]).is_constant}
        self.groups = {g: ops for g, ops in plan.groups.items() if plan.precision(g) != "float"}
        self.rows = {g: _Row() for g in self.groups}
        self.codes = {value: name for value, (name, _) in codes.items()}
        self._check_codes()
        self.inputs = [i.name for i in graph.info.inputs]
        self.outputs = list(dict.fromkeys(graph.info.outputs))
        sides = self._side_values()
        available = {name for node in model.graph.node for name in node.output}
        self.sides = [n for n in sides if n in available and n not in self.outputs]
        self.simulated_sides = [n for n in sides if n not in available]
        extra = [*self.codes.values(), *self.sides]
        self.literal = Session(_with_outputs(model, extra), optimisation="disabled")
        quantized_outputs = {n: self.reads[n, OUTPUT] for n in self.outputs if (n, OUTPUT) in self.reads}
        self.literal_meter = AgreementMeter(graph, quantized_outputs, "disabled")
        self.default_meter = AgreementMeter(graph, quantized_outputs, "default")
        self.default: Session | None = None
        try:
            self.default = Session(model, optimisation="default")
        except ModelError as e:
            self.default_meter.failure = e.found

    def _check_codes(self) -> None:
        """*raises* `ProofError` if the file lacks codes that quantized groups read or make: nothing may go unseen."""
        for group, ops in self.groups.items():
            made = [v for op in ops for v in self.graph.op(op).outputs if self.plan.qparams(v) is not None]
            read = [v for op in ops for v in self._variables(op) if (v, op) in self.reads]
            missing = [v for v in (*read, *made) if v not in self.codes]
            if missing:
                raise ProofError(
                    f"operator {group}, value {missing[0]}",
                    expected="its codes in the file, as the plan says",
                    found="none that the file calls by this name",
                    remedy="The plan is not the one that the file was made from; write both again.",
                )

    # --- one batch -------------------------------------------------------------------------------------------

    def add(self, batch: Mapping[str, Tensor]) -> int:
        """Compare on one batch; returns its number of samples."""
        inputs = {name: batch[name] for name in self.inputs}
        first = next(iter(inputs.values()))
        samples = first.shape[0] if first.dim() else 1
        network = self.replay.run(inputs, keep=self.simulated_sides)
        simulation = self.replay.run(inputs, self.reads)
        found = self.literal.tensors(inputs)
        self.literal_meter.add(network, simulation, found, samples=samples)
        self._add_default(inputs, network, simulation, samples)
        sides: Environment = {n: network[n] for n in self.simulated_sides} | dict(inputs)
        sides |= {n: found[n] for n in (*self.sides, *self.outputs)}
        codes = {value: found[name] for value, name in self.codes.items()}
        for group, ops in self.groups.items():
            self._compare_group(group, ops, codes, sides)
        return samples

    def _add_default(
        self, inputs: Mapping[str, Tensor], network: Environment, simulation: Environment, samples: int
    ) -> None:
        if self.default is None:
            return
        try:
            engine = self.default.tensors(inputs)
        except ModelError as e:
            self.default, self.default_meter.failure = None, e.found
            return
        self.default_meter.add(network, simulation, engine, samples=samples)

    # --- one group -------------------------------------------------------------------------------------------

    def _compare_group(
        self, group: str, ops: list[str], codes: Mapping[str, Tensor], sides: Mapping[str, Any]
    ) -> None:
        """Execute *ops* on the engine's own input codes and compare output codes."""
        inner: Environment = {}
        for op in ops:
            env = {v: self._operand(v, op, inner, codes, sides) for v in self._variables(op)}
            self.replay.run_op(op, env, self.constants)
            inner |= {v: env[v] for v in self.graph.op(op).outputs if v in env}
        for value in (v for op in ops for v in self.graph.op(op).outputs):
            q = self.plan.qparams(value)
            if value in codes and value in inner and q is not None:
                q = _half_even(q) if value in self.half_even else q
                self._count(group, value, inner[value], q, codes[value])

    def _variables(self, op: str) -> list[str]:
        """Names of what *op* reads, constants left out."""
        return [v for v in self.graph.op_inputs(op) if v is not None and not self.graph.value(v).is_constant]

    def _operand(
        self, value: str, op: str, inner: Environment, codes: Mapping[str, Tensor], sides: Mapping[str, Any]
    ) -> Any:
        """What *op* reads as *value*: real numbers of the engine's codes, or the unquantized value."""
        q = self.reads.get((value, op))
        if q is not None:
            return dequantize(codes[value], q)
        if value in inner:
            return inner[value]
        x = sides[value]
        is_number = self.graph.value(value).info.dtype is None and isinstance(x, Tensor)
        return int(x.reshape(())) if is_number else x

    def _count(self, group: str, value: str, x: Tensor, q: QParams, theirs: Tensor) -> None:
        """Compare the codes of *x*, the simulation's unrounded result, with the engine's."""
        if x.shape != theirs.shape:
            raise ProofError(
                f"operator {group}, value {value}",
                expected=f"the simulation's shape {list(x.shape)}",
                found=f"{list(theirs.shape)} in ONNX Runtime",
                remedy="The exported model does not compute what was simulated; please report it with the model.",
            )
        self._check_type(group, value, q, theirs)
        difference = (quantize(x, q).int() - theirs.int()).abs_()
        differing = int(torch.count_nonzero(difference))
        row = self.rows[group]
        row.elements += difference.numel()
        if differing:
            row.steps = max(row.steps, int(difference.max()))
            row.differing += differing
            producer = self.graph.value(value).producer
            assert producer is not None
            width = tie_width(q.scale[0], self.graph.op(producer).output_range())
            row.slack = max(row.slack, int(width))
            near = (difference > 0) & (difference <= 1 + int(width))
            steps = (x / q.scale_tensor(x))[near].double()
            row.ties += int(((steps - steps.floor() - 0.5).abs() <= width).sum())

    def _check_type(self, group: str, value: str, q: QParams, theirs: Tensor) -> None:
        """*raises* `ProofError` if the file's codes have not the width of the plan's: equal numbers, but another range."""
        d, found = q.spec.dtype, str(theirs.dtype).removeprefix("torch.")
        carried = "int32" if d.bits > 8 and value not in self.half_even else d.name
        if found != carried:
            raise ProofError(
                f"operator {group}, value {value}",
                expected=f"codes of type {carried}, for the plan's {d.name}",
                found=f"{found} in the file",
                remedy="The plan is not the one that the file was made from; write both again.",
            )

    def _side_values(self) -> list[str]:
        """Values that quantized groups read unquantized from outside: indices, shapes, float parameters."""
        found: dict[str, None] = {}
        for ops in self.groups.values():
            made = {v for op in ops for v in self.graph.op(op).outputs}
            for op in ops:
                for v in self._variables(op):
                    if v not in made and v not in self.inputs and (v, op) not in self.reads:
                        found[v] = None
        return list(found)

    # --- the end ---------------------------------------------------------------------------------------------

    def result(self) -> Proof:
        """*raises* `DataError` if there was no batch."""
        if self.literal_meter.samples == 0:
            raise DataError(
                "proof", expected="at least one sample to compare on", found="none", remedy="Check the data."
            )
        per_op = tuple(self._difference(g, row) for g, row in self.rows.items() if row.elements)
        roundings = {
            e.qparams.spec.rounding.value
            for e in self.plan.values.values()
            if e.qparams is not None and e.role == "activation"
        }
        rounding = roundings.pop() if len(roundings) == 1 else Rounding.HALF_EVEN.value
        made = {v for ops in self.groups.values() for op in ops for v in self.graph.op(op).outputs}
        exact = not made & self.half_even
        return Proof(
            per_op,
            self.literal_meter.result(),
            self.default_meter.result(),
            rounding,
            rounding if exact else Rounding.HALF_EVEN.value,
        )

    def _difference(self, group: str, row: _Row) -> OpDifference:
        ops = [self.graph.op(op) for op in self.groups[group]]
        compared = [
            (v, q.spec.dtype)
            for op in ops
            for v in op.outputs
            if v in self.codes and (q := self.plan.qparams(v)) is not None
        ]
        return OpDifference(
            group,
            self.plan.ops[group].kind,
            max((d for _, d in compared), key=lambda d: d.bits),
            row.steps,
            row.differing,
            row.elements,
            row.ties,
            row.slack,
            integers=not any(v in self.half_even for v, _ in compared),
            table=len(ops) == 1 and isinstance(ops[0], TableOp),
        )


# --- the file ----------------------------------------------------------------------------------------------------


def half_even(reads: Reads, values: Collection[str]) -> Reads:
    """*reads* as an exported file means them: the codes of *values* are made by QuantizeLinear, which rounds half-even."""
    # One object for each value, because the executor shares copies of a value that have the same parameters.
    changed = {value: _half_even(q) if value in values else q for (value, _), q in reads.items()}
    return {(value, reader): changed[value] for value, reader in reads}


def _half_even(q: QParams) -> QParams:
    return replace(q, spec=replace(q.spec, rounding=Rounding.HALF_EVEN))


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of *model* that also returns *names*."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    present = {o.name for o in made.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            made.graph.output.add(name=name)  # ONNX Runtime infers the type
    return made
