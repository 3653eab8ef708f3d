"""Networks that compute something else in training: auxiliary heads, other outputs."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.unit.qat_cases import calibrate, everywhere, features, train
from torch import Tensor, nn

from bitwright import FakeQuantState, convert, export, get_default_qconfig, prepare, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")


class _Auxiliary(nn.Module):
    """A head that reads a hidden value in training only; functional code stands before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(
            nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)
        )
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.fc1(x))
        if self.training:
            side = F.dropout(torch.tanh(self.aux(hidden)), 0.1, self.training) * 2.0
            return self.fc2(torch.relu(hidden)), side
        return self.fc2(torch.relu(hidden))


def auxiliary() -> _Auxiliary:
    torch.manual_seed(0)
    return _Auxiliary().eval()


def unquantized(model: nn.Module) -> nn.Module:
    set_fake_quantize(model, FakeQuantState.FLOAT)
    return model


def without_chance(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return model


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_training_returns_what_the_author_wrote(how: Any) -> None:
    """The branch of evaluation was frozen into the graph, so that an auxiliary loss could not be computed."""
    model = auxiliary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = how(unquantized(prepare(model, features(2))))
    assert isinstance(ours.eval()(features()), Tensor)
    torch.testing.assert_close(ours(features()), model(features()))

    y, side = ours.train()(features())
    assert side.shape == (16, 3)
    model.train()
    torch.testing.assert_close(y, model(features())[0])


def test_the_auxiliary_head_reads_quantized_values_and_is_trained_in_float() -> None:
    ours = prepare(auxiliary(), features(2))
    ours.get_submodule("aux.3").p = 0.0
    seen: list[Tensor] = []
    hook = ours.get_submodule("aux.0").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    y, side = ours.train()(features())
    (y.square().mean() + side.square().mean()).backward()
    hook.remove()

    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in ours.named_parameters() if n != "aux.0.bias"
    )
    scale = ours.quantizer_of("_generated_relu_0").step()
    assert torch.equal((seen[0] / scale).round(), seen[0] / scale)
    assert not any(path.startswith("aux") for path, _ in ours.quantizers)


def test_names_and_checkpoints_are_those_of_the_author() -> None:
    model, ours = auxiliary(), prepare(auxiliary(), features(2))

    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    ours.load_state_dict(model.state_dict())
    again = prepare(auxiliary(), features(2))
    again.load_state_dict(ours.state_dict())


def test_the_chip_gets_what_evaluation_computes(tmp_path: Path) -> None:
    ours = prepare(auxiliary(), features(2), everywhere(get_default_qconfig()))
    calibrate(ours, features())
    set_fake_quantize(ours.train(), FakeQuantState.QAT)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    for _ in range(3):
        y, side = ours(features())
        optimizer.zero_grad()
        (y.square().mean() + side.square().mean()).backward()
        optimizer.step()
    exported = export(ours, tmp_path / "net.onnx")

    assert min(exported.validation.values()) > 0.999
    assert isinstance(convert(ours)(features()), Tensor)
    assert not any(name.startswith("aux") for name in exported.plan.ops)


class _Probabilities(nn.Module):
    """Logits in training, probabilities in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"logits": y} if self.training else {"probabilities": y.softmax(-1)}


def test_outputs_may_differ_in_kind() -> None:
    torch.manual_seed(0)
    ours = unquantized(prepare(_Probabilities().eval(), features(2)))

    assert list(ours.train()(features())) == ["logits"]
    assert list(ours.eval()(features())) == ["probabilities"]
    logits = ours.train()(features())["logits"]
    torch.testing.assert_close(logits.softmax(-1), ours.eval()(features())["probabilities"])


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
    assert torch.equal(ours.train()(-features()), ours(-features()))
    assert train(ours, features(), 2)[0] > 0
