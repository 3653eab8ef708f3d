"""Branches on `self.training` that are told of, and what is none."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.unit.branch_cases import Net, OtherWeights, Temperature
from tests.unit.qat_cases import features, train
from torch import Tensor, nn

from bitwright import FakeQuantState, capture, prepare, set_fake_quantize
from bitwright.graph.op import Op
from bitwright.graph.training_branch import OfValue, is_faithful, join_training
from bitwright.importers.from_torch import capture_training

pytestmark = pytest.mark.usefixtures("one_thread")


class _Elsewhere(nn.Module):
    """The same weight is read from something else in training: no quantizer of evaluation fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.abs()) if self.training else self.fc(x)


def test_what_cannot_be_matched_stays_as_in_evaluation_and_is_told() -> None:
    with pytest.warns(UserWarning, match="branches on self.training.*also in training") as told:
        ours = prepare(_Elsewhere().eval(), features(2))
    assert [w.filename for w in told] == [__file__]
    x = features()
    set_fake_quantize(ours, FakeQuantState.FLOAT)
    torch.testing.assert_close(ours.train()(-x), ours.eval()(-x))
    assert not torch.allclose(ours.train()(-x), ours(x))
    before = ours.get_parameter("fc.weight").clone()
    train(ours, features(), 2)
    assert not torch.equal(ours.get_parameter("fc.weight"), before)


@pytest.mark.parametrize("network, name", [(OtherWeights, "fc3"), (Temperature, "_generated_mul_")])
def test_variants_of_what_is_quantized_are_told(network: type[nn.Module], name: str) -> None:
    """They were computed in float without a word, so that nothing was trained for the codes of the chip."""
    with pytest.warns(
        UserWarning, match=f"training computes {name}.* otherwise or not at all .* float"
    ) as told:
        ours = prepare(network().eval(), features(2))

    assert [w.filename for w in told] == [__file__]
    assert name in ", ".join(op.name for op in ours.in_evaluation_alone if isinstance(op, Op))


class _Constant(Net):
    """The same operator by a tensor of other numbers."""

    def forward(self, x: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        return y * torch.tensor([1.0, 2.0, 3.0] if self.training else [3.0, 2.0, 1.0])


def test_another_constant_is_told() -> None:
    """It was not seen: both are stored under one name, so that they cannot stand side by side."""
    with pytest.warns(
        UserWarning, match=r"branches on self.training \(differs in: aten.lift_fresh_copy.default\)"
    ):
        prepare(_Constant().eval(), features(2))


@torch.library.custom_op("bitwright_tests::by_mode", mutates_args=())
def _by_mode(x: Tensor, training: bool) -> Tensor:
    return 2.0 * x if training else x.clone()


@_by_mode.register_fake
def _(x: Tensor, training: bool) -> Tensor:
    return torch.empty_like(x)


class _Noisy(Net):
    """Nothing can say whether two networks that draw numbers compute the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc3(torch.relu(self.fc1(x)))
        return y + 0.1 * torch.rand_like(y) if self.training else y


def test_a_branch_that_draws_numbers_is_told_and_left_out() -> None:
    with pytest.warns(UserWarning, match="branches on self.training.*also in training"):
        ours = prepare(_Noisy().eval(), features(2))
    set_fake_quantize(ours, FakeQuantState.FLOAT)

    assert torch.equal(ours.train()(features()), ours.eval()(features()))


def test_a_joined_graph_is_compared_with_what_training_computes() -> None:
    model, x = OtherWeights().eval(), features(4)
    with pytest.warns(UserWarning, match="branches on self.training"):
        graph = capture(model, x)
    trained = capture_training(model, x, dynamic=True)
    assert trained is not None
    branch = join_training(graph, trained)
    assert branch is not None
    mistaken = replace(branch, outputs=OfValue("fc3"))

    assert is_faithful(branch, trained, {"x": x})
    assert not is_faithful(mistaken, trained, {"x": x})


class _Custom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return _by_mode(self.fc1(x), self.training)


class _NormedInEvaluation(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc3(torch.relu(self.fc1(x)))
        return x if self.training else self.norm(x)


def test_what_a_custom_operator_does_in_training_is_not_ours_to_leave_out() -> None:
    with pytest.warns(UserWarning, match=r"branches on self.training .*by_mode"):
        capture(_Custom().eval(), features(2))


def test_a_norm_that_evaluation_alone_computes_is_told() -> None:
    with pytest.warns(UserWarning, match="training computes norm otherwise or not at all"):
        prepare(_NormedInEvaluation().eval(), features(2))


class _Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.eye(3).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc3(torch.relu(self.fc1(x))), 0.1, self.training) + self.table.to_dense().sum()


class _Recurrent(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(F.dropout(self.fc3(torch.relu(self.fc1(x))), 0.1, self.training)[:, None])[0]


class _Attends(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)[:, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


class _TwiceNormed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.dropout(self.fc3(torch.relu(self.fc1(x))), 0.1, self.training))
        return self.norm(x * 2.0)


class _WithoutStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm.track_running_stats = False

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.dropout(self.fc3(torch.relu(self.fc1(x))), 0.1, self.training))


@pytest.mark.parametrize("network", [_Sparse, _Recurrent, _Attends, _TwiceNormed, _WithoutStatistics])
def test_what_torch_does_otherwise_in_training_is_no_branch(network: type[nn.Module]) -> None:
    """Recurrent layers, attention with dropout and norms that run twice were taken for branches of the author's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(network().eval(), features(2))
        ours = prepare(network().eval(), features(2))
    assert not ours.in_evaluation_alone


class _Counts(Net):
    """Statistics of the author's own, which only training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        if self.training:
            self.seen.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.fc3(x)


def test_a_buffer_that_training_moves_is_told() -> None:
    """It stood still without a word."""
    with pytest.warns(UserWarning, match=r"branches on self.training.*mul_"):
        prepare(_Counts().eval(), features(2))


class _Untraceable(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        if self.training and y.sum() > 0:
            return y * 2
        return y


def test_a_branch_that_cannot_be_traced_is_told() -> None:
    with pytest.warns(UserWarning, match="cannot be traced in training .* keeps the evaluation branch"):
        prepare(_Untraceable().eval(), features(2))
