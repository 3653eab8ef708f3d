"""Networks that compute something else in training: auxiliary heads, other outputs."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.unit.branch_cases import Net, OtherWeights, Temperature
from tests.unit.qat_cases import calibrate, everywhere, features
from torch import Tensor, nn

from bitwright import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    convert,
    export,
    get_default_qconfig,
    prepare,
    set_fake_quantize,
)

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


def same_in_training(ours: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """*ours* and *model* return the same in training mode, by the same numbers drawn for dropout."""
    torch.manual_seed(3)
    expected = model.train()(*inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(ours.train()(*inputs), expected)


def unquantized(model: nn.Module) -> nn.Module:
    set_fake_quantize(model, FakeQuantState.FLOAT)
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

    same_in_training(ours, model, features())


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


def test_a_part_that_only_training_computes_can_be_named() -> None:
    """Its name was unknown, since nothing of it is in the graph of evaluation."""
    model = auxiliary()
    model.aux.qconfig = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, features(2), everywhere(get_default_qconfig()))
        prepare(
            auxiliary(),
            features(2),
            [ModuleNameQconfigSetter({"aux": None}), everywhere(get_default_qconfig())],
        )
    with pytest.warns(UserWarning, match=r"aux is computed in training alone, and stays float") as told:
        prepare(auxiliary(), features(2), ModuleNameQconfigSetter({"aux": get_default_qconfig()}))
    assert [w.filename for w in told] == [__file__]


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


# --- what made it fail -----------------------------------------------------------------------------------------------


class _Clash(Net):
    """The branch uses functions before the main path does: their generated names are those of other operators."""

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.fc1(x))
        side = None
        if self.training:
            side = self.aux(self.act(F.relu(x + 1.0)))
        y = self.fc3(self.act(F.relu(self.fc2(x) + 2.0)))
        return (y, side) if self.training else y


class _Makes(Net):
    """The branch makes tensors of its own."""

    def forward(self, x: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        if self.training:
            return y, torch.zeros(x.shape[0], 1) + y, self.lstm(y.unsqueeze(1))[0]
        return y


class _Part(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.fc2(x)
        return (x, self.aux(x)) if self.training else (x, None)


class _Twice(nn.Module):
    """A part with a branch inside runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = _Part(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([x, x[:, :2]], 1)
        x, first = self.part(x)
        x, second = self.part(torch.relu(x))
        return (self.head(x), first, second) if self.training else self.head(x)


class _Returns(Net):
    """Training returns what evaluation only computes, and a parameter."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.fc1(x))
        y = self.fc3(hidden)
        return (y, hidden, self.logvar) if self.training else y


class _Hidden(Net):
    """No operator differs, only what is returned."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.fc1(x))
        y = self.fc3(hidden)
        return [y, hidden, x] if self.training else y


class _Swapped(Net):
    """The same outputs in another order."""

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        pair = self.aux(x), self.fc3(x)
        return pair if self.training else pair[::-1]


class _Region(Net):
    """A branch inside of torch.no_grad."""

    def forward(self, x: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        with torch.no_grad():
            side = y * 2.0 if self.training else y * 3.0
        return y + side


class _Normed(Net):
    """Normalised heads, which the plan has folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        return self.norm(self.aux(x)) if self.training else self.norm2(self.fc3(x))


class _InPlace(Net):
    """A write of which nobody reads the result by name."""

    def forward(self, x: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        if self.training:
            y.mul_(2.0)
        return y


_KINDS = [
    _Clash,
    _Makes,
    _Twice,
    _Returns,
    _Hidden,
    OtherWeights,
    Temperature,
    _Swapped,
    _InPlace,
    _Region,
    _Normed,
]


@pytest.mark.parametrize("network", _KINDS)
def test_branches_of_many_kinds_are_kept(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "prepare: training computes .* otherwise")
        ours = unquantized(prepare(model, features(2)))

    for again in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        same_in_training(again, model, features())
        torch.testing.assert_close(again.eval()(features()), model.eval()(features()))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]


class _Loss(Net):
    """Labels, which evaluation need not have, and statistics that evaluation alone takes."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        y = self.fc3(torch.relu(self.fc1(x)))
        return (y, F.cross_entropy(y, labels)) if self.training else self.norm(y)


def test_each_mode_computes_only_what_it_returns() -> None:
    """Evaluation failed on labels that only training reads, and training moved statistics that only evaluation reads."""
    torch.manual_seed(0)
    model, labels = _Loss().eval(), torch.zeros(16, dtype=torch.int64)
    with pytest.warns(UserWarning, match="training computes norm otherwise or not at all"):
        ours = unquantized(prepare(model, (features(2), labels[:2])))
    before = ours.get_buffer("norm.running_mean").clone()

    same_in_training(ours, model, features(), labels)
    assert torch.equal(ours.get_buffer("norm.running_mean"), before)
    torch.testing.assert_close(ours.eval()(features(), labels - 1), model.eval()(features(), labels - 1))


def test_the_signature_is_the_author_s() -> None:
    """Those who look it up (trainers that leave out unknown columns) found *args."""
    with pytest.warns(UserWarning, match="training computes norm"):
        ours = prepare(_Loss().eval(), (features(2), torch.zeros(2, dtype=torch.int64)))

    assert list(inspect.signature(ours.forward).parameters) == ["x", "labels"]
