"""Running a graph under a choice of quantized reads, whole or only downstream of what changed.

This is the one executor of calibration, simulation and search. It executes the graph's own operators, node by node; a
*read* `(value, operator)` that is listed with parameters is fake-quantized first. Nothing here knows what a plan is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.op import Op
from bitwright.numerics.affine import fake_quantize
from bitwright.numerics.spec import QParams

#: (value, operator that reads it) -> parameters of the quantized copy it reads. `OUTPUT` reads graph outputs.
Reads = Mapping[tuple[str, str], QParams]
#: Value name -> tensor (or Python integer).
Environment = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One operator call: argument positions hold a value name, or a literal where the name is None."""

    op: Op
    names: tuple[str | None, ...]
    literals: tuple[Any, ...]
    outputs: tuple[str, ...]
    is_tuple: bool


@dataclass(frozen=True)
class Stacking:
    """Values that variants cannot be stacked in. *mixing*: one sample's numbers depend on the others of the batch.

    *interleaved*: along their batch axis the samples alternate.
    """

    mixing: frozenset[str]
    interleaved: frozenset[str]


class Replay:
    """A graph flattened into steps. Evaluation mode is the caller's business; no gradients are tracked by `run`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps = [self._step(graph.op_node(name)) for name in graph.op_names]
        self._constants = {
            v.name: graph.constant(v.name).detach() for v in graph.values.values() if v.is_constant
        }
        self._quantized_constants: dict[tuple[str, str], tuple[QParams, Tensor]] = {}
        self.outputs = graph.info.outputs
        self._last_use = self._find_last_use()

    def _step(self, node: fx.Node) -> Step:
        op = self.graph.get_submodule(str(node.target))
        assert isinstance(op, Op)
        names = tuple(self.graph.value_name(a) if isinstance(a, fx.Node) else None for a in node.args)
        literals = tuple(None if isinstance(a, fx.Node) else a for a in node.args)
        is_tuple = any(u.op == "call_function" and u.target is operator.getitem for u in node.users)
        return Step(op, names, literals, op.outputs, is_tuple)

    def _find_last_use(self) -> dict[str, int]:
        last = {}
        for i, step in enumerate(self.steps):
            for name in (*step.names, *step.outputs):
                if name is not None:
                    last[name] = i
        last.update(dict.fromkeys(self.outputs, len(self.steps)))
        return last

    # --- whole network ---------------------------------------------------------------------------------------

    def run(
        self,
        inputs: Mapping[str, Tensor],
        reads: Reads | None = None,
        *,
        keep: Iterable[str] | None = (),
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> Environment:
        """Execute everything. *keep*: values to return besides the outputs; None keeps all of them.

        *inputs*: name -> `[n, ...]`. *observe*: called with every float value (not constants) once, unquantized.
        *returns*: the kept values as their producers computed them, and the outputs under their names as readers of
        the graph see them (quantized if `(output, OUTPUT)` is among the reads).
        """
        reads = reads or {}
        kept = None if keep is None else {*keep}
        env: Environment = dict(inputs)
        copies: dict[tuple[str, int], Tensor] = {}
        with torch.no_grad():
            if observe:
                for name, x in inputs.items():
                    if x.is_floating_point():
                        observe(name, x)
            for i, step in enumerate(self.steps):
                self._execute(step, env, reads, copies)
                for name in step.outputs:
                    made = env.get(name)
                    if observe and isinstance(made, Tensor) and made.is_floating_point():
                        observe(name, made)
                if kept is not None:
                    self._release(i, step, env, copies, kept)
            return self._with_outputs(env, reads, copies)

    def _release(
        self, i: int, step: Step, env: Environment, copies: dict[tuple[str, int], Tensor], kept: set[str]
    ) -> None:
        for name in {*step.names, *step.outputs}:
            if name is not None and self._last_use[name] == i:
                if name not in kept:
                    env.pop(name, None)
                for key in [k for k in copies if k[0] == name]:
                    del copies[key]

    def _with_outputs(
        self, env: Environment, reads: Reads, copies: dict[tuple[str, int], Tensor]
    ) -> Environment:
        for name in self.outputs:
            env[name] = self._read(name, OUTPUT, env, reads, copies)
        return env

    # --- part of the network ---------------------------------------------------------------------------------

    def rerun(
        self,
        cached: Mapping[str, Any],
        changed: Mapping[str, Any],
        reads: Reads,
        *,
        dirty: Iterable[str] = (),
        repeat: int = 1,
        stop_at: Iterable[str] | None = None,
    ) -> Environment:
        """Execute only what depends on *changed* values or is one of the *dirty* operators.

        *cached*: all other values, as an earlier `run(..., keep=None)` left them. *repeat*: the changed values hold
        *repeat* variants stacked along the batch; cached values are repeated to match where they meet. *stop_at*: values
        after which nothing more is needed. *returns*: the recomputed values, and all outputs.
        """
        dirty = set(dirty)
        wanted = None if stop_at is None else set(stop_at)
        env = _Overlay(cached, self.graph, repeat)
        env.update(changed)
        copies: dict[tuple[str, int], Tensor] = {}
        last = (
            len(self.steps) if wanted is None else max((self._produced_at[w] for w in wanted), default=-1) + 1
        )
        with torch.no_grad():
            for step in self.steps[:last]:
                touched = any(n in env.changed for n in step.names if n is not None)
                if (touched or step.op.name in dirty) and not all(o in changed for o in step.outputs):
                    self._execute(step, env, reads, copies)
            if wanted is not None:
                return {w: env[w] for w in wanted}
            return dict(self._with_outputs(env, reads, copies))

    @cached_property
    def _produced_at(self) -> dict[str, int]:
        return {o: i for i, step in enumerate(self.steps) for o in step.outputs}

    def downstream(self, ops: Iterable[str]) -> set[str]:
        """The operators *ops* and all that depend on their outputs."""
        found, values = set(ops), set[str]()
        for step in self.steps:
            if step.op.name in found or any(n in values for n in step.names if n is not None):
                found.add(step.op.name)
                values.update(step.outputs)
        return found

    @cached_property
    def _macs(self) -> dict[str, int]:
        return self.graph.macs()

    def share(self, ops: Iterable[str]) -> float:
        """The share of the network's MACs that a change of *ops* makes necessary to execute again."""
        total = sum(self._macs.values())
        below = self.downstream(ops)
        if total == 0:
            return len(below) / max(1, len(self.steps))
        return sum(self._macs[op] for op in below) / total

    # --- samples beside each other ---------------------------------------------------------------------------

    def stacking(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Stacking:
        """Which values keep samples apart, and in order, found by running two samples alone and together.

        *one*, *other*: name -> `[1, ...]`, samples that differ. A batch axis alone does not tell: of `[time * n, c]` it
        is axis 0, yet stacking two of them gives another order than the network gives to stacked samples.
        """
        together = {name: self._beside(name, x, other[name]) for name, x in one.items()}
        a, b, both = (self.run(x, keep=None) for x in (one, other, together))
        mixing, interleaved = set[str](), set[str]()
        for name, found in both.items():
            expected = self._beside(name, a[name], b[name])
            axis = self.graph.value(name).info.batch_axis
            if _close(found, expected):
                continue
            same_numbers = (
                axis is not None
                and found.shape == expected.shape
                and _close(found.sort(axis)[0], expected.sort(axis)[0])
            )
            (interleaved if same_numbers else mixing).add(name)
        return Stacking(frozenset(mixing), frozenset(interleaved))

    def _beside(self, name: str, one: Any, other: Any) -> Any:
        axis = self.graph.value(name).info.batch_axis
        return _repeated(self.graph, name, one, 2) if axis is None else torch.cat([one, other], axis)

    # --- one operator ----------------------------------------------------------------------------------------

    def apply(
        self, name: str, seen: Callable[[str, str], Any], instead: Mapping[str, Tensor]
    ) -> tuple[Any, ...]:
        """The results of one operator on what it sees, *seen* (value, operator), with some values replaced."""
        step = self._step_of[name]
        args = [
            literal if value is None else instead[value] if value in instead else seen(value, name)
            for value, literal in zip(step.names, step.literals, strict=True)
        ]
        with torch.no_grad():
            result = step.op(*args)
        return tuple(result) if step.is_tuple else (result,)

    @cached_property
    def _step_of(self) -> dict[str, Step]:
        return {step.op.name: step for step in self.steps}

    def run_op(self, name: str, env: Environment, reads: Reads) -> None:
        """Execute one operator on the values in *env* and store its outputs there (unquantized)."""
        step = self._step_of[name]
        with torch.no_grad():
            self._execute(step, env, reads, {})

    def _execute(
        self, step: Step, env: Environment, reads: Reads, copies: dict[tuple[str, int], Tensor]
    ) -> None:
        args = [
            literal if name is None else self._read(name, step.op.name, env, reads, copies)
            for name, literal in zip(step.names, step.literals, strict=True)
        ]
        result = step.op(*args)
        if step.is_tuple:
            for name, x in zip(step.outputs, result, strict=False):
                env[name] = x
        else:
            env[step.outputs[0]] = result

    def _read(
        self,
        name: str,
        reader: str,
        env: Mapping[str, Any],
        reads: Reads,
        copies: dict[tuple[str, int], Tensor],
    ) -> Any:
        if name in self._constants:
            return self.read_constant(name, reader, reads)
        q = reads.get((name, reader))
        x = env[name]
        if q is None:
            return x
        key = (name, id(q))
        if key not in copies:
            copies[key] = fake_quantize(x, q)
        return copies[key]

    def is_constant(self, name: str) -> bool:
        """Whether the value *name* is a weight, bias or buffer."""
        return name in self._constants

    def read_constant(self, name: str, reader: str, reads: Reads) -> Tensor:
        """What *reader* sees of the constant *name*; the quantized copy is kept until it asks for another."""
        x, q = self._constants[name], reads.get((name, reader))
        if q is None:
            return x
        held = self._quantized_constants.get((name, reader))
        if held is None or (held[0] is not q and held[0] != q):
            held = (q, fake_quantize(x, q))
            self._quantized_constants[(name, reader)] = held
        return held[1]


class _Overlay(dict[str, Any]):
    """Changed values over cached ones; a cached value is repeated along its batch axis when it is first read."""

    def __init__(self, cached: Mapping[str, Any], graph: Graph, repeat: int) -> None:
        super().__init__()
        self.changed: set[str] = set()
        self._cached, self._graph, self._repeat = cached, graph, repeat
        self._repeated: dict[str, Any] = {}

    def __setitem__(self, name: str, x: Any) -> None:
        super().__setitem__(name, x)
        self.changed.add(name)

    def update(self, other: Any = (), /, **_: Any) -> None:
        for name, x in dict(other).items():
            self[name] = x

    def __missing__(self, name: str) -> Any:
        if self._repeat == 1:
            return self._cached[name]
        if name not in self._repeated:
            self._repeated[name] = _repeated(self._graph, name, self._cached[name], self._repeat)
        return self._repeated[name]


def _repeated(graph: Graph, name: str, x: Any, times: int) -> Any:
    """The value *name* of a batch that holds the samples of *x* so many times."""
    info = graph.value(name).info
    if info.scales:
        return x * times
    if not isinstance(x, Tensor):
        return x
    if info.scaled_entries:
        x = x.clone()
        x.view(-1)[list(info.scaled_entries)] *= times
        return x
    if info.batch_axis is None:
        return x
    counts = [1] * x.dim()
    counts[info.batch_axis] = times
    return x.repeat(counts)


def _close(found: Any, expected: Any) -> bool:
    """Equal up to what float32 sums in another order differ by."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return bool(found == expected)
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()]
    slack = 1e-4 * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-4, atol=slack, equal_nan=True)
