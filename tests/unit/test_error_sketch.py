"""The error sketch against exact measurements: where it must be exact, how far off it may be elsewhere, and what it survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import Block, Residual, bench, pictures, randomised, tokens
from torch import Tensor, nn

from bitwright.errors import DataError
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.error_sketch import ErrorSketch, effective_reads
from bitwright.search.evaluator import Evaluator
from bitwright.search.losses import LOSSES
from bitwright.search.probes import draw_probes
from bitwright.search.sensitivity import METHODS, candidate_reads, measure_sensitivity
from bitwright.search.similarity import Similarity
from bitwright.search.sketch_file import SketchFile
from bitwright.search.sketched import sketch_sensitivity, verify_top

MSE = Similarity(loss=LOSSES.get("mse", where=""))


class _Linear(nn.Module):
    """Linear from input to output: an error sketch of it, with as many probes as outputs, is exact for the squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.project = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.conv(x))
        return self.fc((y + 2 * y[..., :1]).mean((2, 3)))


def sketched(evaluator: Evaluator, plans: list[Plan], **options) -> ErrorSketch:
    sketch = ErrorSketch(evaluator, **options)
    sketch.measure(sketch.missing(quantized_reads(evaluator.graph, p) for p in plans))
    return sketch


def alone(plan: Plan, group: str) -> Plan:
    return plan.with_precision([g for g in plan.groups if g != group], "float", "")


def true_loss(evaluator: Evaluator, plan: Plan) -> float:
    return float(evaluator.losses(quantized_reads(evaluator.graph, plan)).mean())


# --- where it is exact -------------------------------------------------------------------------------------------


def test_on_a_linear_network_with_a_probe_for_each_output_element_every_unit_is_exact() -> None:
    evaluator, _, plan = bench(randomised(_Linear()), pictures(), similarity=MSE)
    reads = quantized_reads(evaluator.graph, plan)
    sketch = sketched(evaluator, [plan], probes=5)
    assert sketch.unreachable == {}
    for edge, q in effective_reads(evaluator.graph, reads).items():
        found, exact = sketch.predict({edge: q}), float(evaluator.losses({edge: q}).mean())
        assert found.loss == pytest.approx(exact, rel=2e-3, abs=1e-12), edge
        assert found.error == 0.0  # no direction was left to chance


@pytest.mark.parametrize(
    ("module", "x"), [(Residual(), pictures()), (Block(), tokens())], ids=["residual", "transformer"]
)
def test_small_errors_are_predicted_one_by_one_and_together(module: nn.Module, x: Tensor) -> None:
    """At int16 a network is as good as linear; a probe for each output element leaves nothing to chance."""
    evaluator, solver, plan = bench(randomised(module), x)
    fine = solver.solve(plan.with_precision(list(plan.groups), "int16", ""))
    reads = {
        k: q
        for k, q in effective_reads(evaluator.graph, quantized_reads(evaluator.graph, fine)).items()
        if q.spec.dtype.bits == 16
    }
    sketch = ErrorSketch(evaluator, probes=10)
    sketch.measure(sketch.missing([reads]))
    exact = {e: float(evaluator.losses({e: q}).mean()) for e, q in reads.items()}

    assert len(reads) > 5
    for edge, q in reads.items():
        assert sketch.predict({edge: q}).loss == pytest.approx(exact[edge], rel=0.05, abs=1e-12), edge
    # A value is rounded after errors before it have moved it: rounding errors of combinations are other ones, no smaller.
    assert 0.5 < sketch.predict(reads).loss / float(evaluator.losses(reads).mean()) < 2


@pytest.mark.parametrize("module", [Residual, Block])
def test_the_ranking_agrees_with_the_exact_search(module: type[nn.Module]) -> None:
    x = pictures() if module is Residual else tokens()
    evaluator, solver, plan = bench(randomised(module()), x)
    candidates = candidate_reads(evaluator.graph, plan, solver.solve, METHODS)
    rows, unreachable = sketch_sensitivity(ErrorSketch(evaluator, probes=10), plan, candidates)
    exact = {r.name: r for r in measure_sensitivity(evaluator, plan, solver.solve)}

    assert unreachable == {}
    assert {r.name for r in rows} == set(exact)
    pairs = [(exact[r.name].losses[m], r.losses[m]) for r in rows for m in METHODS]
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    assert torch.corrcoef(ranks.T)[0, 1] > 0.9
    assert all(0.4 < told / true < 2.5 for true, told in pairs if true > 1e-4), pairs


@pytest.mark.parametrize("loss", list(LOSSES))
def test_each_loss_is_predicted_in_its_own_unit(loss: str) -> None:
    evaluator, _, plan = bench(
        randomised(Residual()), pictures(), similarity=Similarity(loss=LOSSES.get(loss, where=""))
    )
    group = next(iter(plan.groups))
    sketch = sketched(evaluator, [alone(plan, group)], probes=10)
    found = sketch.predict(quantized_reads(evaluator.graph, alone(plan, group))).loss
    assert found == pytest.approx(true_loss(evaluator, alone(plan, group)), rel=0.3)


# --- chance ------------------------------------------------------------------------------------------------------


def test_probes_are_orthogonal_of_squared_length_m_and_the_first_do_not_depend_on_their_number() -> None:
    reference = torch.zeros(3, 4, 5)
    few, many = draw_probes(reference, 3, 7, 10), draw_probes(reference, 20, 7, 10)
    rows = many.reshape(20, 3, 20).transpose(0, 1).double()

    assert torch.allclose(rows @ rows.transpose(1, 2), torch.eye(20).double() * 20, atol=1e-4)
    assert torch.allclose(few, many[:3], atol=1e-5)
    assert not torch.allclose(draw_probes(reference, 3, 8, 10), few)
    assert torch.allclose(draw_probes(reference[:2], 3, 7, 11), few[:, 1:])  # by image, not by chunk


def test_the_standard_error_is_what_seeds_differ_by() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    reads = quantized_reads(evaluator.graph, plan)
    for probes in (1, 2, 5):
        found = []
        for seed in range(40):
            sketch = ErrorSketch(evaluator, probes=probes, seed=seed)
            sketch.measure(sketch.missing([reads]))
            found.append(sketch.predict(reads))
        spread = torch.tensor([p.loss for p in found]).std()
        told = torch.tensor([p.error**2 for p in found]).mean().sqrt()
        # One probe cannot tell how independent roundings even out: there it is an upper bound.
        low, high = (0.8, 2.5) if probes == 1 else (0.6, 1.5)
        assert low * spread < told < high * spread, probes


def test_one_probe_and_one_image_give_a_finite_error() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures(12))
    sketch = sketched(evaluator, [plan], probes=1)
    assert sketch.predict(quantized_reads(evaluator.graph, plan)).error > 0
    one, _, plan = bench(randomised(Residual()), pictures(4)[:1].repeat(2, 1, 1, 1))
    assert sketched(one, [plan], probes=1).predict(quantized_reads(one.graph, plan)).loss > 0


def test_more_probes_than_output_elements_are_not_drawn() -> None:
    evaluator, _, _ = bench(randomised(Residual()), pictures())
    assert ErrorSketch(evaluator, probes=64).rows == 10
    with pytest.raises(DataError, match="expected at least 1; found 0"):
        ErrorSketch(evaluator, probes=0)


# --- independence of how it is computed --------------------------------------------------------------------------


def test_chunks_passes_and_other_units_do_not_matter() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    reads = quantized_reads(evaluator.graph, plan)
    units = list(ErrorSketch(evaluator).missing([reads]))
    whole, parts = ErrorSketch(evaluator), ErrorSketch(evaluator)
    whole.chunk_samples = lambda index: 12  # type: ignore[method-assign]
    parts.chunk_samples = lambda index: 5  # type: ignore[method-assign]
    whole.measure(units)
    for unit in reversed(units):
        parts.measure([unit])
    for unit in units:
        assert torch.allclose(whole.c[unit], parts.c[unit], rtol=1e-3, atol=1e-6), unit


def test_around_a_quantized_base_the_loss_of_the_base_is_exact_and_changes_are_told() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    base = quantized_reads(evaluator.graph, plan)
    sketch = ErrorSketch(evaluator, probes=10, base=base)
    first = next(iter(plan.groups))
    without = solver.solve(plan.with_precision([first], "float", ""))
    sketch.measure(sketch.missing([base, quantized_reads(evaluator.graph, without)]))

    assert all(u.qparams is None for u in sketch.units_of(base))
    assert sketch.predict(base).loss == pytest.approx(true_loss(evaluator, plan), rel=1e-5)
    told = sketch.predict(quantized_reads(evaluator.graph, without)).loss
    assert told == pytest.approx(true_loss(evaluator, without), rel=0.35)


def test_what_passes_through_as_codes_is_no_unit_of_its_own() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    reads = quantized_reads(evaluator.graph, plan)
    gone = set(reads) - set(effective_reads(evaluator.graph, reads))
    made_by = {evaluator.graph.op(evaluator.graph.value(v).producer).kind for v, _ in gone}
    assert made_by
    assert made_by <= {"MaxPool", "Flatten"}


# --- what no gradient tells --------------------------------------------------------------------------------------


class _Rounded(nn.Module):
    """The first layer's effect goes through a rounding: a gradient of zero, while the loss is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.round(3 * self.first(x.mean(1))))


class _MostlyRounded(nn.Module):
    """A small path with a gradient beside the rounding that carries nearly all of the effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.mean(1))
        return self.second(torch.round(2 * h) + 0.01 * h)


class _RootOfZero(nn.Module):
    """A square root at zero, whose gradient is infinite, times zero: NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.mean(1))
        return self.second(torch.sqrt(torch.relu(h)) * 0.5)


class _Indices(nn.Module):
    """Integers made of real numbers, held between bounds: an activation function, but no place for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)
        self.rows = nn.Embedding(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x.mean(1))
        return self.rows((3 * h).long().clamp(0, 5)).mean(1) + h


class _Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1)).argmax(-1).float().unsqueeze(-1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (_Rounded, "zero"),
        (_MostlyRounded, "which has no gradient"),
        (_RootOfZero, "not finite"),
        (_Indices, "which has no gradient"),
        (_Argmax, "no gradient leads from it"),
    ],
)
def test_operators_without_a_gradient_are_listed_with_the_reason(module: type[nn.Module], why: str) -> None:
    evaluator, solver, plan = bench(randomised(module()), tokens())
    candidates = candidate_reads(evaluator.graph, plan, solver.solve, ["max"])
    rows, unreachable = sketch_sensitivity(ErrorSketch(evaluator), plan, candidates)

    assert any(why in reason for reason in unreachable.values()), unreachable
    assert {r.name for r in rows} == set(plan.groups)


def test_what_quantizes_without_an_error_is_no_operator_without_a_gradient() -> None:
    """A bias of zeros: its `c` is zero because nothing changes."""
    module = randomised(Residual())
    with torch.no_grad():
        module.project.bias.zero_()
    evaluator, solver, plan = bench(module, pictures())
    candidates = candidate_reads(evaluator.graph, plan, solver.solve, ["max"])
    _, unreachable = sketch_sensitivity(ErrorSketch(evaluator), plan, candidates)
    assert unreachable == {}


def test_verified_rows_are_measured_and_ranked_anew_until_the_top_is_all_exact() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    candidates = candidate_reads(evaluator.graph, plan, solver.solve, METHODS)
    rows, _ = sketch_sensitivity(ErrorSketch(evaluator, probes=1), plan, candidates)
    exact = {r.name: r for r in measure_sensitivity(evaluator, plan, solver.solve)}
    asked: list[str] = []

    def measure(groups):
        asked.extend(groups)
        return [exact[g] for g in groups]

    found = verify_top(rows, measure, count=2, always=[rows[-1].name])

    assert len(asked) == len(set(asked)) >= 3
    assert all(r.exact == (r.name in asked) for r in found)
    assert [r.loss for r in found] == sorted((r.loss for r in found), reverse=True)
    assert found[0].exact
    assert found[0].sketched
    assert found[0].losses == exact[found[0].name].losses
    assert next(r for r in found if r.name == rows[-1].name).sketched == {}


def test_the_first_operators_are_verified_whatever_the_sketch_says_of_them() -> None:
    """MobileNetV2's fourth convolution, one of the exact top 5, was eleventh in the sketch, and never measured."""
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    candidates = candidate_reads(evaluator.graph, plan, solver.solve, METHODS)
    rows, _ = sketch_sensitivity(ErrorSketch(evaluator, probes=1), plan, candidates)
    least = [r.name for r in reversed(rows)]
    exact = {r.name: r for r in measure_sensitivity(evaluator, plan, solver.solve)}

    def measure(groups):
        return [exact[g] for g in groups]

    one = verify_top(rows, measure, count=1, early=least)
    none = verify_top(rows, measure, count=0, early=least)
    assert least[0] in {r.name for r in one if r.exact}
    assert next(r for r in one if r.name == least[0]).sketched
    assert least[1] not in {r.name for r in one if r.exact}
    assert not any(r.exact for r in none)


# --- on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "left"), [(4, 4), (5, 12)])  # of 12; chunks of another size begin anew
def test_an_interrupted_sketch_is_taken_up_where_it_stopped_and_equals_one_in_a_single_run(
    size: int, left: int, tmp_path: Path
) -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    reads, path = quantized_reads(evaluator.graph, plan), tmp_path / "sketch.npz"
    expected = sketched(evaluator, [plan])

    class Stop(Exception):
        pass

    def stop(done: int, count: int) -> None:
        if done > 4:
            raise Stop

    first = ErrorSketch(evaluator, file=SketchFile(path, "key"))
    first.chunk_samples = lambda index: 4  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.measure(first.missing([reads]), progress=stop)

    second = ErrorSketch(evaluator, file=SketchFile(path, "key"))
    second.chunk_samples = lambda index: size  # type: ignore[method-assign]
    before = evaluator.effort.forward_passes
    second.measure(second.missing([reads]))
    assert evaluator.effort.forward_passes - before == left
    third = ErrorSketch(evaluator, file=SketchFile(path, "key"))
    assert third.missing([reads]) == []
    for sketch in (second, third):
        assert sketch.predict(reads).loss == pytest.approx(expected.predict(reads).loss, rel=1e-4)
    assert ErrorSketch(evaluator, file=SketchFile(path, "another key")).missing([reads])


@pytest.mark.parametrize("contents", [b"", b"nonsense", b"PK\x03\x04broken"])
def test_a_damaged_file_costs_time_and_nothing_else(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "sketch.npz"
    path.write_bytes(contents)
    assert SketchFile(path, "key").passes == []
