"""Recurrent layers: LSTM, GRU and plain RNN, as ONNX stores them and as torch stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role, Shape
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported


@dataclass(frozen=True)
class _Cell:
    """One kind of recurrent cell. *to_torch*: torch's gate i is ONNX's gate `to_torch[i]`; *to_onnx*: the inverse."""

    gates: int
    to_torch: tuple[int, ...]
    to_onnx: tuple[int, ...]
    activations: tuple[str, ...]


_CELLS = {
    "LSTM": _Cell(4, (0, 2, 3, 1), (0, 3, 1, 2), ("Sigmoid", "Tanh", "Tanh")),  # iofc, ifgo
    "GRU": _Cell(3, (1, 0, 2), (1, 0, 2), ("Sigmoid", "Tanh")),  # zrh, rzn
    "RNN": _Cell(1, (0,), (0,), ("Tanh",)),
}


def _reordered(x: Tensor, gates: Sequence[int], axis: int = 0) -> Tensor:
    parts = x.chunk(len(gates), axis)
    return torch.cat([parts[g] for g in gates], axis)


def _run(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bidirectional: bool,
    training: bool,
) -> Any:
    """torch's fused layers. x `[t, n, i]`; states `[layers d, n, h]`; weights as torch orders them.

    *training*: cuDNN has a backward pass in that mode only.
    """
    per_direction = 4
    layers = len(weights) // per_direction // (2 if bidirectional else 1)
    options = (True, layers, 0.0, training, bidirectional, False)
    if kind == "LSTM":
        return torch.lstm(x, list(states), list(weights), *options)
    function = {"GRU": torch.gru, "RNN": torch.rnn_tanh, "RNN relu": torch.rnn_relu}[kind]
    return function(x, states[0], list(weights), *options)


class Recurrent(Op):
    """A layer with ONNX's inputs: x `[t, n, i]`, W `[d, g h, i]`, R `[d, g h, h]`, optional B `[d, 2 g h]`, sequence lengths
    (absent or all t), initial h `[d, n, h]` and, for LSTM, initial c. Outputs: y `[t, d, n, h]`, last h, (LSTM) last c.

    *direction*: `forward`, `reverse` or `bidirectional`. *reset_after*: GRU's `linear_before_reset`. *relu*: RNN with Relu.
    """

    roles = (
        Role.ACTIVATION,
        Role.WEIGHT,
        Role.WEIGHT,
        Role.PARAMETER,
        Role.INDEX,
        Role.ACTIVATION,
        Role.ACTIVATION,
    )

    def __init__(
        self, kind: str, hidden: int, *, direction: str, reset_after: bool = False, relu: bool = False
    ) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.hidden, self.direction, self.reset_after, self.relu = hidden, direction, reset_after, relu
        self._cell = _CELLS[kind]

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        lengths: Tensor | None = None,
        h: Tensor | None = None,
        c: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        if self.direction == "reverse":
            x = x.flip(0)
        d = w.shape[0]
        zeros = x.new_zeros((d, x.shape[1], self.hidden))
        states = [zeros if s is None else s for s in (h, c)]
        if self.kind == "GRU" and not self.reset_after:
            y, last = self._reset_before(x, states[0], w, r, b)
            found: tuple[Tensor, ...] = (y, last)
        else:
            kind = "RNN relu" if self.relu else self.kind
            weights = self._torch_weights(w, r, b)
            found = _run(kind, x, states, weights, bidirectional=d == 2, training=self.training)
        t, n = x.shape[:2]
        y = found[0].reshape(t, n, d, self.hidden).transpose(1, 2)
        if self.direction == "reverse":
            y = y.flip(0)
        found = (y, *found[1:])
        return y if len(self.outputs) == 1 else found

    def _torch_weights(self, w: Tensor, r: Tensor, b: Tensor | None) -> list[Tensor]:
        gates = self._cell.to_torch
        found = []
        for k in range(w.shape[0]):
            bias = x_bias = w.new_zeros(w.shape[1]) if b is None else None
            if b is not None:
                x_bias, bias = (_reordered(half, gates) for half in b[k].chunk(2))
            assert x_bias is not None
            assert bias is not None
            found += [_reordered(w[k], gates), _reordered(r[k], gates), x_bias, bias]
        return found

    def _reset_before(
        self, x: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """GRU whose reset gate acts before the recurrent product: torch has no fused layer for it."""
        outputs, last = [], []
        for k in range(w.shape[0]):
            steps = x.flip(0) if k == 1 else x
            wb, rb = b[k].chunk(2) if b is not None else (w.new_zeros(w.shape[1]), w.new_zeros(w.shape[1]))
            from_x = (steps @ w[k].t() + wb).chunk(3, -1)
            rz, rr, rh = r[k].chunk(3)
            bz, br, bh = rb.chunk(3)
            state, states = h[k], []
            for t in range(x.shape[0]):
                z = torch.sigmoid(from_x[0][t] + state @ rz.t() + bz)
                reset = torch.sigmoid(from_x[1][t] + state @ rr.t() + br)
                candidate = torch.tanh(from_x[2][t] + (reset * state) @ rh.t() + bh)
                state = (1 - z) * candidate + z * state
                states.append(state)
            last.append(state)
            stacked = torch.stack(states)
            outputs.append(stacked.flip(0) if k == 1 else stacked)
        return torch.cat(outputs, -1), torch.stack(last)

    def weight_axis(self, index: int, rank: int) -> int | None:
        return 1 if index in (1, 2) else None  # both directions share the scale of a channel

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        x, w, r = inputs[:3]
        if x is None or w is None or r is None:
            return 0
        return x[0] * x[1] * (math.prod(w) + math.prod(r))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        attributes: dict[str, Any] = {"hidden_size": self.hidden, "direction": self.direction}
        if self.kind == "GRU":
            attributes["linear_before_reset"] = int(self.reset_after)
        if self.relu:
            attributes["activations"] = ["Relu"] * (2 if self.direction == "bidirectional" else 1)
        emit.node(self.kind, inputs, self.outputs, **attributes)

    def describe(self) -> str:
        return f"hidden={self.hidden}, {self.direction}"


class StackedRecurrent(Op):
    """Layers with torch's inputs: x, initial h (and c for LSTM) `[layers d, n, h]`, then for every layer and direction
    W `[g h, i]`, R `[g h, h]` and, with *bias*, two biases `[g h]`. Outputs: y `[t, n, d h]`, last h, (LSTM) last c.

    *batch_first*: x and y are `[n, t, …]`. *relu*: RNN with Relu instead of Tanh. *dropout*: the probability with which an
    element between two layers is zeroed in training.
    """

    def __init__(
        self,
        kind: str,
        *,
        layers: int,
        bias: bool,
        bidirectional: bool,
        batch_first: bool,
        relu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.layers, self.bias, self.bidirectional = layers, bias, bidirectional
        self.batch_first, self.relu, self.dropout = batch_first, relu, dropout
        self._states = 2 if kind == "LSTM" else 1

    def role(self, index: int) -> Role:
        if index <= self._states:
            return Role.ACTIVATION
        place = (index - 1 - self._states) % (4 if self.bias else 2)
        return Role.WEIGHT if place < 2 else Role.PARAMETER

    def weight_axis(self, index: int, rank: int) -> int | None:
        return 0 if self.role(index) is Role.WEIGHT else None

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        states, weights = rest[: self._states], list(rest[self._states :])
        p = self.dropout if self.layers > 1 else 0.0
        options = (self.bias, self.layers, p, self.training, self.bidirectional, self.batch_first)
        found: tuple[Tensor, ...]
        if self.kind == "LSTM":
            found = torch.lstm(x, list(states), weights, *options)
        else:
            function = torch.gru if self.kind == "GRU" else torch.rnn_relu if self.relu else torch.rnn_tanh
            found = function(x, states[0], weights, *options)
        return found[0] if len(self.outputs) == 1 else found

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        x = inputs[0]
        weights = [s for i, s in enumerate(inputs) if s is not None and self.role(i) is Role.WEIGHT]
        return 0 if x is None else x[0] * x[1] * sum(math.prod(s) for s in weights)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        directions = 2 if self.bidirectional else 1
        states, weights = inputs[1 : 1 + self._states], list(inputs[1 + self._states :])
        x = _node(emit, "Transpose", [inputs[0]], "x", perm=[1, 0, 2]) if self.batch_first else inputs[0]
        last: list[list[str]] = [[] for _ in range(self._states)]
        per_direction = 4 if self.bias else 2
        for layer in range(self.layers):
            mine = [
                weights[per_direction * k :][:per_direction]
                for k in range(layer * directions, (layer + 1) * directions)
            ]
            x, ends = self._layer(emit, x, states, mine, layer)
            for kept, end in zip(last, ends, strict=True):
                kept.append(end)
        order = {"perm": [1, 0, 2]} if self.batch_first else {"perm": [0, 1, 2]}
        emit.node("Transpose", [x], [self.outputs[0]], **order)
        for name, parts in zip(self.outputs[1:], last, strict=False):
            if name:
                emit.node("Concat", parts, [name], axis=0)

    def _layer(
        self,
        emit: Emitter,
        x: str | None,
        states: Sequence[str | None],
        weights: Sequence[Sequence[str | None]],
        layer: int,
    ) -> tuple[str, list[str]]:
        """One ONNX layer: its output `[t, n, d h]` and last states. *weights*: those of each direction."""
        tag, d = f"layer_{layer}", len(weights)
        w = self._joined(
            emit, [self._gates(emit, p[0], f"{tag}_w_{k}") for k, p in enumerate(weights)], f"{tag}_w"
        )
        r = self._joined(
            emit, [self._gates(emit, p[1], f"{tag}_r_{k}") for k, p in enumerate(weights)], f"{tag}_r"
        )
        b = None
        if self.bias:
            halves = [
                _node(
                    emit,
                    "Concat",
                    [self._gates(emit, v, f"{tag}_b_{k}_{i}") for i, v in enumerate(p[2:])],
                    f"{tag}_b_{k}",
                    axis=0,
                )
                for k, p in enumerate(weights)
            ]
            b = self._joined(emit, halves, f"{tag}_b")
        begin, end = (
            int_constant(emit, [layer * d], f"{tag}_begin"),
            int_constant(emit, [(layer + 1) * d], f"{tag}_end"),
        )
        axis = int_constant(emit, [0], f"{tag}_axis")
        initial = [
            _node(emit, "Slice", [s, begin, end, axis], f"{tag}_initial_{i}") for i, s in enumerate(states)
        ]
        shape = emit.array(weights[0][1]) if weights[0][1] is not None else None
        hidden = shape.shape[1] if shape is not None else (emit.shape(str(weights[0][1])) or (0, 0))[1]
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if d == 2 else "forward",
        }
        if self.kind == "GRU":
            attributes["linear_before_reset"] = 1
        if self.relu:
            attributes["activations"] = ["Relu"] * d
        y, ends = emit.temporary(f"{tag}_y"), [emit.temporary(f"{tag}_last_{i}") for i in range(self._states)]
        emit.node(self.kind, [x, w, r, b, None, *initial], [y, *ends], **attributes)
        ordered = _node(emit, "Transpose", [y], f"{tag}_ordered", perm=[0, 2, 1, 3])
        return _node(
            emit, "Reshape", [ordered, int_constant(emit, [0, 0, -1], f"{tag}_shape")], f"{tag}_out"
        ), ends

    def _gates(self, emit: Emitter, value: str | None, hint: str) -> str:
        """*value* `[g h, …]` with its gates in ONNX's order."""
        cell = _CELLS[self.kind]
        if cell.gates == 1:
            return str(value)
        parts = [emit.temporary(f"{hint}_gate_{g}") for g in range(cell.gates)]
        emit.node("Split", [value], parts, axis=0, num_outputs=cell.gates)
        return _node(emit, "Concat", [parts[g] for g in cell.to_onnx], f"{hint}_gates", axis=0)

    def _joined(self, emit: Emitter, values: Sequence[str], hint: str) -> str:
        """The directions stacked along a new first axis."""
        axis = int_constant(emit, [0], f"{hint}_axis")
        wide = [_node(emit, "Unsqueeze", [v, axis], f"{hint}_wide_{k}") for k, v in enumerate(values)]
        return _node(emit, "Concat", wide, f"{hint}_joined", axis=0)

    def describe(self) -> str:
        shown = ("bidirectional", self.bidirectional), ("batch_first", self.batch_first)
        return ", ".join([f"layers={self.layers}", *(name for name, on in shown if on)])


def _node(emit: Emitter, kind: str, inputs: Sequence[str | None], hint: str, **attributes: Any) -> str:
    """Append a node with one result and return its name."""
    name = emit.temporary(hint)
    emit.node(kind, inputs, [name], **attributes)
    return name


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("LSTM", "GRU", "RNN")
def _recurrent_from_onnx(call: OnnxCall) -> Built:
    direction = call.attribute("direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    default = [*_CELLS[call.op_type].activations] * directions
    activations = call.attribute("activations", default)
    relu = call.op_type == "RNN" and [a.lower() for a in activations] == ["relu"] * directions
    if not relu and [a.lower() for a in activations] != [a.lower() for a in default]:
        raise Unsupported(f"activations={activations}")
    for name in ("clip", "input_forget", "layout"):
        if call.attribute(name, 0):
            raise Unsupported(name)
    if call.input(7) is not None:
        raise Unsupported("peephole weights")
    _check_lengths(call)
    w_shape = call.shape(call.inputs[2])
    hidden = call.attribute("hidden_size", w_shape[2] if w_shape else None)
    if hidden is None:
        raise Unsupported("an unknown hidden size")
    op = Recurrent(
        call.op_type,
        hidden,
        direction=direction,
        reset_after=bool(call.attribute("linear_before_reset", 0)),
        relu=relu,
    )
    inputs = [call.input(i) for i in range(min(7, len(call.inputs)))]
    if len(inputs) > 4:
        inputs[4] = None  # all lengths are full
    return Built(op, tuple(inputs))


def _check_lengths(call: OnnxCall) -> None:
    if call.input(4) is None:
        return
    lengths = call.required_constant(4, "sequence_lens")
    shape = call.shape(call.inputs[0])
    if shape is None or shape[0] is None or not np.all(lengths == shape[0]):
        raise Unsupported("sequences of different lengths")


# --- ATen ----------------------------------------------------------------------------------------------------


@ATEN.register("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent_from_aten(call: AtenCall) -> Built | None:
    if "batch_first" not in call.args:  # packed sequences
        return None
    if call["train"] and call["dropout"]:  # dropout that the author wants in evaluation too
        return None
    name = call.target
    x = call["input"]
    states = call["hx"]
    listed = list(states) if isinstance(states, (list, tuple)) else [states]
    weights = list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    if len(weights) != call["num_layers"] * directions * (4 if call["has_biases"] else 2):
        return None  # projections
    if len(call.shape(x)) != 3:
        return None
    op = StackedRecurrent(
        name.split("_")[0].upper(),
        layers=call["num_layers"],
        bias=call["has_biases"],
        bidirectional=call["bidirectional"],
        batch_first=call["batch_first"],
        relu=name == "rnn_relu",
        dropout=call["dropout"],
    )
    return Built(op, (x, *listed, *weights))
