"""The searches against whole-network runs, their memory, and their resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import networks
from tests.networks import Block, Residual, pictures, randomised, tokens
from torch import Tensor, nn

from bitwright.errors import DataError, ModelError, PlanError, UnknownName
from bitwright.numerics.cosine import cosine
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.evaluator import Evaluator
from bitwright.search.mixed_precision import search_mixed_precision
from bitwright.search.sensitivity import METHODS, best_methods, measure_sensitivity
from bitwright.search.similarity import Similarity
from bitwright.search.state import SearchState, search_key

CASES = [(Residual, pictures, "generic-int8"), (Residual, pictures, "bm1684"), (Block, tokens, "onnxruntime")]


def bench(module: type[nn.Module], data, target: str, similarity: Similarity | None = None, chunk: int = 5):
    return networks.bench(randomised(module()), data(), target, similarity, chunk=chunk)


def whole_network_loss(evaluator: Evaluator, plan: Plan, group: str) -> float:
    others = [g for g in plan.groups if g != group]
    return 1 - evaluator.evaluate(plan.with_precision(others, "float", ""))


@pytest.mark.parametrize(("module", "data", "target"), CASES)
def test_every_loss_equals_that_of_a_whole_network_run(module, data, target) -> None:
    evaluator, solver, plan = bench(module, data, target)
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    activations = [n for n, e in plan.values.items() if e.role == "activation"]

    assert {r.name for r in rows} == {g for g in plan.groups if plan.precision(g) != "float"}
    for method in METHODS:
        full = solver.solve(plan.with_methods(dict.fromkeys(activations, method)))
        for row in rows:
            expected = whole_network_loss(evaluator, full, row.name)
            assert row.losses[method] == pytest.approx(expected, rel=1e-3, abs=2e-7), (row.name, method)


class _Attention(nn.Module):
    """torch's own attention, which lays tokens of all samples out as `[time * n, c]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + y).mean(1))


class _TopK(nn.Module):
    """A quantized operator with an integer output that decides what is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(16, 64), nn.Linear(4, 3)
        self.gains = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        values, places = torch.topk(self.fc(x), 4, dim=-1)
        return self.head(values * self.gains[places])


class _Centred(nn.Module):
    """A network in which samples of a batch influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h - h.mean(0, keepdim=True))


class _SeveralRowsASample(nn.Module):
    """Two outputs, the first with several rows for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(x)
        return h.reshape(-1, 8), self.head(h.mean(1))


class _OutputWithoutSamples(nn.Module):
    """An output that depends on weights alone, beside one that has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 8)
        self.prompt = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc2(self.prompt), self.fc1(x)


@pytest.mark.parametrize("module", [_Attention, _TopK, _Centred, _SeveralRowsASample, _OutputWithoutSamples])
def test_losses_are_right_where_methods_cannot_simply_be_stacked(module) -> None:
    test_every_loss_equals_that_of_a_whole_network_run(module, tokens, "generic-int8")


def test_interleaved_and_mixed_samples_are_told_apart() -> None:
    attention, centred = (
        bench(_Attention, tokens, "generic-int8")[0],
        bench(_Centred, tokens, "generic-int8")[0],
    )
    plain = bench(*CASES[0])[0]

    assert attention.stacking.interleaved
    assert not attention.stacking.mixing
    assert centred.stacking.mixing
    assert not plain.stacking.mixing | plain.stacking.interleaved


def test_outputs_that_are_too_large_to_keep_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = measure_sensitivity(*_args(bench(*CASES[0])))
    monkeypatch.setattr("bitwright.search.evaluator.REFERENCE_BYTES", 0)
    evaluator, solver, plan = bench(*CASES[0])
    again = measure_sensitivity(evaluator, plan, solver.solve)

    assert again == kept
    assert evaluator._references == {}


def test_no_sample_to_compare_on_is_a_clear_error() -> None:
    evaluator, _, plan = bench(*CASES[0])
    empty = Evaluator(evaluator.graph, lambda size: [])

    with pytest.raises(DataError, match="at least one sample"):
        empty.evaluate(plan)


def test_rows_come_in_descending_order_with_the_best_method() -> None:
    evaluator, solver, plan = bench(*CASES[0])
    rows = measure_sensitivity(evaluator, plan, solver.solve)

    assert [r.loss for r in rows] == sorted((r.loss for r in rows), reverse=True)
    assert all(r.loss == min(r.losses.values()) for r in rows)


def test_the_size_of_chunks_does_not_matter() -> None:
    small = measure_sensitivity(*_args(bench(*CASES[0], chunk=3)))
    large = measure_sensitivity(*_args(bench(*CASES[0], chunk=12)))

    for a, b in zip(sorted(small, key=lambda r: r.name), sorted(large, key=lambda r: r.name), strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-3, abs=2e-7)


def _args(made):
    evaluator, solver, plan = made
    return evaluator, plan, solver.solve


def test_an_interrupted_search_resumes_where_it_stopped(tmp_path: Path) -> None:
    evaluator, solver, plan = bench(*CASES[0])
    path = tmp_path / "state.json"
    key = search_key(evaluator.graph, evaluator.chunks(), {})
    calls = []

    def stop(done: int, total: int, name: str) -> None:
        calls.append(name)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(evaluator, plan, solver.solve, state=SearchState(path, key), progress=stop)
    state = SearchState(path, key)
    before = evaluator.effort.forward_passes
    resumed = measure_sensitivity(evaluator, plan, solver.solve, state=state)
    saved_effort = evaluator.effort.forward_passes - before
    fresh = measure_sensitivity(evaluator, plan, solver.solve)

    assert state.resumed == 7
    assert resumed == fresh
    assert saved_effort < evaluator.effort.forward_passes - before - saved_effort


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    evaluator, _, _ = bench(*CASES[0])
    path = tmp_path / "state.json"
    state = SearchState(path, search_key(evaluator.graph, evaluator.chunks(), {"methods": 1}))
    state.put("0:conv1", [[0.1]])
    state.save()

    with pytest.raises(PlanError, match="another model, data set, setting"):
        SearchState(path, search_key(evaluator.graph, evaluator.chunks(), {"methods": 2}))


def test_the_state_of_another_division_into_chunks_is_refused() -> None:
    evaluator, _, _ = bench(*CASES[0])
    key = search_key(evaluator.graph, evaluator.chunks(), {})
    evaluator.chunk_samples = 3

    assert search_key(evaluator.graph, evaluator.chunks(), {}) != key


def test_a_search_that_measured_nothing_leaves_no_file(tmp_path: Path) -> None:
    SearchState(tmp_path / "state.json", "x").save()

    assert not (tmp_path / "state.json").exists()


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"key": "x", "meas')

    with pytest.raises(PlanError, match="Delete the file"):
        SearchState(path, "x")


def test_best_methods_follow_the_producer_s_group() -> None:
    evaluator, solver, plan = bench(*CASES[0])
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    methods = best_methods(evaluator.graph, plan, rows)
    by_name = {r.name: r.method for r in rows}

    assert methods["fc"] == by_name["fc"]
    assert methods["x"] == by_name["conv1"]


def test_the_walk_reaches_its_target_or_its_limit() -> None:
    evaluator, solver, plan = bench(*CASES[1])
    walk = search_mixed_precision(
        evaluator, plan, solver.solve, target=0.99999, min_layer_similarity=1.1, limit=3
    )

    assert 0 < len(walk.float_groups) <= 3
    assert walk.similarity >= walk.initial
    assert evaluator.evaluate(walk.plan) == pytest.approx(walk.similarity)
    assert all(s.similarity >= walk.initial for s in walk.steps if s.kept)


def test_the_walk_leaves_good_layers_alone() -> None:
    evaluator, solver, plan = bench(*CASES[0])
    walk = search_mixed_precision(
        evaluator, plan, solver.solve, target=1.1, min_layer_similarity=-1.0, limit=3
    )

    assert walk.steps == ()
    assert walk.plan == plan


def test_layer_similarities_are_those_of_the_simulated_values() -> None:
    evaluator, solver, plan = bench(*CASES[0])
    walk = search_mixed_precision(evaluator, plan, solver.solve, target=0.0, limit=3)
    inputs = {"x": pictures()}
    clean = evaluator.replay.run(inputs, keep=["project"])["project"]
    noisy = evaluator.replay.run(inputs, quantized_reads(evaluator.graph, plan), keep=["project"])["project"]
    q = plan.qparams("project")
    assert q is not None
    codes = (noisy / q.scale[0]).round().clamp(-128, 127) * q.scale[0]
    expected = cosine(clean.flatten(1), codes.flatten(1)).mean()

    assert walk.layers["project"] == pytest.approx(float(expected), abs=1e-6)


def test_cosine_is_the_true_cosine_and_the_half_scale_is_offered() -> None:
    a = {"y": torch.tensor([[1.0, 0.0]])}
    b = {"y": torch.tensor([[1.0, 1.0]])}

    assert float(Similarity()(a, b)) == pytest.approx(0.5**0.5)
    assert float(Similarity(half=True)(a, b)) == pytest.approx((1 + 0.5**0.5) / 2)


def test_cosine_of_zeros_and_nan() -> None:
    zero, one, nan = torch.zeros(1, 3), torch.ones(1, 3), torch.full((1, 3), float("nan"))

    assert cosine(zero, zero).item() == 1
    assert cosine(zero, one).item() == 0
    assert cosine(one, nan).item() == 0


def test_outputs_are_weighted() -> None:
    ref = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[1.0, 0.0]])}
    out = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}

    assert float(Similarity({"a": 3.0, "b": 1.0})(ref, out)) == pytest.approx(0.75)
    with pytest.raises(UnknownName, match="'c'"):
        Similarity({"c": 1.0})(ref, out)


def test_post_processing_is_applied_to_both_sides() -> None:
    ref, out = {"y": torch.tensor([[1.0, -2.0]])}, {"y": torch.tensor([[1.0, 2.0]])}

    assert float(Similarity(post_process=lambda o: {"y": abs(o["y"])})(ref, out)) == pytest.approx(1.0)


def test_post_processing_sees_the_shape_of_the_output_with_a_batch_of_one() -> None:
    shapes = []

    def look(outputs):
        shapes.append(outputs["fc"].shape)
        return outputs

    evaluator, _, plan = bench(Residual, pictures, "generic-int8", Similarity(post_process=look))
    evaluator.evaluate(plan)

    assert set(shapes) == {(1, 10)}


def test_post_processing_to_sizes_that_vary_is_a_clear_error() -> None:
    y = {"y": torch.tensor([[1.0, -1.0], [1.0, 1.0]])}

    with pytest.raises(DataError, match="as many numbers for each of 2 samples"):
        Similarity(post_process=lambda o: {"y": o["y"][o["y"] > 0]})(y, y)


def test_a_failing_post_process_is_a_clear_error() -> None:
    def broken(outputs):
        raise ValueError("boom")

    with pytest.raises(DataError, match="ValueError: boom"):
        Similarity(post_process=broken)({"y": torch.ones(1, 2)}, {"y": torch.ones(1, 2)})


class _Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(-1)


def test_a_network_with_only_integer_outputs_is_refused() -> None:
    with pytest.raises(ModelError, match="Cut the model before argmax"):
        bench(_Argmax, tokens, "generic-int8")
