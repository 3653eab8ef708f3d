"""Gradients through a graph: at every read, under quantized reads, with outputs of every kind."""

from __future__ import annotations

import pytest
import torch
from tests.networks import Block, Residual, pictures, randomised, ready, solved, tokens
from torch import Tensor, nn

from bitwright.graph.graph import OUTPUT
from bitwright.graph.replay import Replay
from bitwright.graph.tape import Tape
from bitwright.plan.reads import quantized_reads


def gradients(tape: Tape, taps, output: str, cotangent: Tensor) -> dict[object, Tensor]:
    found: dict[object, Tensor] = {}
    for tap in taps:
        tape.watch(tap, lambda g, tap=tap: found.__setitem__(tap, g.clone()))
    tape.pull(output, cotangent)
    return found


@pytest.mark.parametrize(("module", "data"), [(Residual, pictures), (Block, tokens)])
def test_a_gradient_tells_what_a_small_change_of_one_read_does_to_the_output(module, data) -> None:
    x = data(3).double()
    graph = ready(randomised(module()).double(), x)
    replay, name = Replay(graph), graph.info.inputs[0].name
    tape, output = Tape(replay, {name: x}), graph.info.outputs[0]
    clean = replay.run({name: x})[output]
    cotangent = torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    taps = [tap for tap in tape.seen if tap[1] != OUTPUT]

    found = gradients(tape, taps, output, cotangent)

    assert len(found) == len(taps) > 5
    for (value, reader), gradient in found.items():
        seen = tape.saw(value, reader)
        step = torch.randn(seen.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-6
        step *= seen != 0  # the maximum of zeros that a ReLU made has no gradient
        changed = {value: seen + step}
        moved = clean_but(replay, graph, tape, reader, changed)[output] - clean
        told = float((gradient * step).sum())
        assert float((moved * cotangent).sum()) == pytest.approx(told, rel=2e-3, abs=1e-10), (value, reader)


def clean_but(replay, graph, tape: Tape, reader: str, changed):
    """The network with *changed* seen by *reader* alone."""
    env = dict(tape.values)
    results = replay.apply(reader, tape.saw, changed)
    op = graph.op(reader)
    env.update(zip(op.outputs, results, strict=False))
    below, order = set(op.outputs), [s.op.name for s in replay.steps]
    for name in order[order.index(reader) + 1 :]:
        if any(i in below for i in graph.op_inputs(name)):
            here = {i: env[i] for i in graph.op_inputs(name) if i in below}
            out = replay.apply(name, tape.saw, here)
            env.update(zip(graph.op(name).outputs, out, strict=False))
            below.update(graph.op(name).outputs)
    return env


def test_a_tape_computes_what_a_run_computes() -> None:
    x = pictures(4)
    graph = ready(randomised(Residual()), x)
    _, plan = solved(graph, x)
    name, output = graph.info.inputs[0].name, graph.info.outputs[0]
    replay, reads = Replay(graph), quantized_reads(graph, plan)

    for under in ({}, reads):
        tape = Tape(replay, {name: x}, under)
        tape.pull(output, torch.ones_like(tape.seen[(output, OUTPUT)]))
        assert torch.allclose(tape.seen[(output, OUTPUT)], replay.run({name: x}, under)[output], atol=1e-6)


def test_a_quantized_read_passes_gradients_only_within_its_limits() -> None:
    x = pictures(4)
    graph = ready(randomised(Residual()), x)
    _, plan = solved(graph, x, method="percentile(90)")
    name, output = graph.info.inputs[0].name, graph.info.outputs[0]
    reads = quantized_reads(graph, plan)
    reader = next(r for v, r in reads if v == name)
    tape = Tape(Replay(graph), {name: x}, {(name, reader): reads[(name, reader)]})

    found = gradients(tape, [(name, None)], output, torch.ones_like(tape.seen[(output, OUTPUT)]))

    low, high = reads[(name, reader)].limits
    outside = (x < low) | (x > high)
    assert outside.any()
    assert not found[(name, None)][outside].any()
    assert found[(name, None)][~outside].any()


class _Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x.mean(1))
        return y.argmax(-1).float(), y


def test_an_output_that_no_gradient_reaches_is_pulled_without_an_error() -> None:
    x = tokens(3)
    graph = ready(randomised(_Argmax()), x)
    tape = Tape(Replay(graph), {graph.info.inputs[0].name: x})
    read = next(tap for tap in tape.seen if tap[1] != OUTPUT)

    hard, soft = graph.info.outputs
    assert gradients(tape, [read], hard, torch.ones(3)) == {}
    assert gradients(tape, [read], soft, torch.ones(3, 5)) != {}
