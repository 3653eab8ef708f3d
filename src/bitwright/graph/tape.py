"""`Tape`: one run of a graph that gradients can be taken through, at every read and every operator output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.graph.graph import OUTPUT
from bitwright.graph.replay import Environment, Reads, Replay, Step
from bitwright.numerics.affine import fake_quantize

#: Where a gradient is taken: (value, operator that reads it), or (value, None): the value as its producer computed it.
Tap = tuple[str, str | None]


class Tape:
    """The network at one batch of inputs, executed under *reads* with gradients recorded.

    Quantized reads pass the gradient on where the value lies within their limits (straight-through estimation). Gradients
    are with respect to activations only. *values*: every value as its producer computed it. *seen*: (value, reader) ->
    what that reader saw; only real-valued activations are in it, graph outputs under the reader `OUTPUT`.
    """

    def __init__(self, replay: Replay, inputs: Mapping[str, Tensor], reads: Reads | None = None) -> None:
        self._replay, self._reads = replay, reads or {}
        self.values: Environment = {}
        self.seen: dict[tuple[str, str], Tensor] = {}
        self._roots: list[Tensor] = []
        with torch.enable_grad():
            for name, x in inputs.items():
                self.values[name] = self._rooted(x)
            for step in replay.steps:
                self._execute(step)
            for name in replay.outputs:
                self._see(name, OUTPUT)

    def _rooted(self, x: Any) -> Any:
        """*x*, made a root of the recording if it is real-valued and no gradient would reach it otherwise."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.requires_grad:
            return x
        root = x.detach().requires_grad_()
        self._roots.append(root)
        return root.view_as(root)  # hooks fire on what an operator made, not on a root

    def _execute(self, step: Step) -> None:
        args = [
            literal if name is None else self._see(name, step.op.name)
            for name, literal in zip(step.names, step.literals, strict=True)
        ]
        result = step.op(*args)
        made = result if step.is_tuple else (result,)
        for name, x in zip(step.outputs, made, strict=False):
            self.values[name] = self._rooted(x)

    def _see(self, name: str, reader: str) -> Any:
        """What *reader* sees of the value *name*."""
        if self._replay.is_constant(name):
            return self._replay.read_constant(name, reader, self._reads)
        x = self.values[name]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if (name, reader) in self.seen:
            return self.seen[(name, reader)]
        q = self._reads.get((name, reader))
        if q is not None:
            held = x.clamp(*q.limits)
            x = held + (fake_quantize(x.detach(), q) - held.detach())
        else:
            x = x.view_as(x)  # each reader has a gradient of its own
        self.seen[(name, reader)] = x
        return x

    def saw_recorded(self, name: str, reader: str) -> Any:
        """What *reader* saw of the value *name*, as it was recorded."""
        return self._see(name, reader)

    def saw(self, name: str, reader: str) -> Any:
        """What *reader* saw of the value *name*, without its gradient."""
        x = self._see(name, reader)
        return x.detach() if isinstance(x, Tensor) else x

    def at(self, tap: Tap) -> Tensor:
        """The tensor whose gradient is meant by *tap*. *raises* `KeyError` if nothing real-valued is there."""
        value, reader = tap
        found = self.values[value] if reader is None else self.seen[(value, reader)]
        if not isinstance(found, Tensor):
            raise KeyError(tap)
        return found

    def watch(self, tap: Tap, receive: Callable[[Tensor], None]) -> None:
        """Have *receive* called with the gradient at *tap* in every later `pull` that reaches it."""

        def hook(gradient: Tensor) -> None:
            receive(gradient.detach())

        self.at(tap).register_hook(hook)  # type: ignore[no-untyped-call]

    def pull(self, output: str, cotangent: Tensor) -> None:
        """Send *cotangent*, of the shape of the graph output *output*, back to the inputs; watchers receive gradients."""
        y = self.seen[(output, OUTPUT)]
        if y.grad_fn is None or not self._roots:
            return
        torch.autograd.grad(y, self._roots, cotangent, retain_graph=True, allow_unused=True)
