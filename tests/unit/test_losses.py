"""Losses: their values, their second-order forms, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.search.losses import LOSSES, Divergence, Loss, UserLoss
from bitwright.search.similarity import Similarity

SHAPES = [(3, 7), (2, 4, 5), (2, 3, 4, 4)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_error(output: Tensor, reference: Tensor) -> Tensor:
    return ((output - reference) ** 2).flatten(1).sum(1)


def softened(output: Tensor, reference: Tensor) -> Tensor:
    """Divergence of softmaxes, in the words of a user."""
    p, q = reference.flatten(1).log_softmax(1), output.flatten(1).log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


EVERY: dict[str, Loss] = {
    **{n: LOSSES.get(n, where="") for n in LOSSES},
    "user": UserLoss(squared_error),
    "user softmax": UserLoss(softened),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EVERY)
def test_half_the_square_of_the_factor_is_the_loss_of_a_small_error(name: str, shape) -> None:
    """The sum over an orthonormal set of probes z of <B z, e>^2 is |B^T e|^2."""
    loss, y, e = EVERY[name], randn(*shape) + 0.3, randn(*shape, seed=1) * 1e-4
    m = y[0].numel()
    found = torch.zeros(shape[0], dtype=torch.float64)
    for z in torch.eye(m, dtype=torch.float64):
        v = loss.factor(y, z.expand(shape[0], m).reshape(shape))
        found += 0.5 * (v * e).flatten(1).sum(1) ** 2

    exact = loss.measure(y, y + e)[0]

    assert torch.allclose(found, exact, rtol=5e-3, atol=1e-14), (found, exact)


def test_probabilities_diverge_by_the_reciprocal_of_the_probability() -> None:
    y = randn(4, 6).softmax(-1)
    e = randn(4, 6, seed=1) * 1e-5
    e -= e.mean(-1, keepdim=True)  # probabilities sum to one
    loss = Divergence(probabilities=True)

    found = sum(
        0.5 * (loss.factor(y, z.expand(4, 6)) * e).sum(1) ** 2 for z in torch.eye(6, dtype=torch.float64)
    )

    assert torch.allclose(found, loss.measure(y, y + e)[0], rtol=5e-3, atol=1e-16)


def test_divergence_of_probabilities_equals_that_of_their_logits() -> None:
    a, b = randn(3, 5), randn(3, 5, seed=1)
    plain, probabilities = Divergence().measure(a, b), Divergence(True).measure(a.softmax(-1), b.softmax(-1))
    assert torch.allclose(plain, probabilities, rtol=1e-6)


def test_classes_lie_along_axis_one_of_maps() -> None:
    a, b = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    p, q = a.log_softmax(1), b.log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean((1, 2))
    assert torch.allclose(Divergence().measure(a, b)[0], expected)


def test_variants_are_stacked_along_the_first_axis() -> None:
    y, one, two = randn(3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)
    for name, loss in EVERY.items():
        both = loss.measure(y, torch.cat([one, two]))
        assert torch.allclose(both[0], loss.measure(y, one)[0]), name
        assert torch.allclose(both[1], loss.measure(y, two)[0]), name


def test_known_values() -> None:
    y = torch.tensor([[3.0, 4.0]])
    out = torch.tensor([[3.0, 5.0]])
    assert float(EVERY["mse"].measure(y, out)) == pytest.approx(0.5)
    assert float(EVERY["sqnr"].measure(y, out)) == pytest.approx(1 / 25)
    assert float(EVERY["cosine"].measure(y, out)) == pytest.approx(1 - 29 / (5 * math.sqrt(34)))


@pytest.mark.parametrize("name", ["cosine", "sqnr"])
def test_an_output_of_zeros_has_no_second_order_form_and_gives_no_nan(name: str) -> None:
    y = torch.zeros(2, 4)
    assert not EVERY[name].factor(y, torch.ones(2, 4)).any()
    assert float(EVERY[name].measure(y, y).sum()) == 0.0


def test_half_the_scale_halves_the_cosine_loss_only() -> None:
    y, out = {"y": randn(2, 5)}, {"y": randn(2, 5, seed=1)}
    whole, half = Similarity(), Similarity(half=True)
    assert torch.allclose(half.losses(y, out), whole.losses(y, out) / 2)
    mse = LOSSES.get("mse", where="")
    assert torch.equal(Similarity(half=True, loss=mse).losses(y, out), Similarity(loss=mse).losses(y, out))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda out, ref: (out - ref).abs().sum(), "shape []"),
        (lambda out, ref: 1.0, "float"),
        (lambda out, ref: out.flatten(1).sum(1) / 0, "NaN or infinity"),
        (lambda out, ref: ref.flatten(1).sum(1), "no curvature"),
        (lambda out, ref: ((out - ref + 1) ** 2).flatten(1).sum(1), "a slope there"),
        (lambda out, ref: out.no_such_thing, "AttributeError"),
    ],
)
def test_a_users_function_that_is_no_loss_is_refused(function, found: str) -> None:
    with pytest.raises(DataError, match="--loss") as error:
        UserLoss(function).factor(randn(2, 4), randn(2, 4, seed=1))
    assert found in str(error.value)
