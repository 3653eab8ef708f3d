"""Capture of torch modules: names, numbers, modes, aliases, batch sizes, errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture

torch.manual_seed(0)


def captured(model: nn.Module, *shape: int, batch: int = 2) -> tuple[Graph, Tensor]:
    x = torch.randn(batch, *shape)
    return capture(model, x), x


def assert_same(model: nn.Module, graph: Graph, *inputs: Tensor) -> None:
    """Equal answers in evaluation mode, on inputs that neither may change."""
    found, expected = graph(*(x.clone() for x in inputs)), model.eval()(*(x.clone() for x in inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- names -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.act(self.conv(x)) + x).log1p()


def test_leaf_modules_give_their_path_and_other_operators_are_counted_per_enclosing_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x) + 1

    graph, _ = captured(Net(), 3, 4, 4)
    block = ["conv", "act", "_generated_add_0", "_generated_relu_1", "_generated_log1p_2"]
    assert graph.op_names == [f"features.{i}.{name}" for i in (0, 1) for name in block] + ["_generated_add_0"]
    assert graph.op("features.0.conv").outputs == ("features.0.conv",)


def test_further_calls_of_a_module_share_its_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(self.fc(x)))

    model = Net()
    graph, x = captured(model, 4)
    assert graph.op_names == ["fc", "fc._call_1", "fc._call_2"]
    assert set(dict(graph.named_parameters())) == {"fc.weight", "fc.bias"}
    assert [r.op for r in graph.value("fc.weight").readers] == graph.op_names
    assert_same(model, graph, x)


def test_a_block_called_twice_numbers_its_operators_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    graph, _ = captured(Net(), 3, 4, 4)
    assert graph.op_names[5:] == [
        "block.conv._call_1",
        "block.act._call_1",
        "block._generated_add_3",
        "block._generated_relu_4",
        "block._generated_log1p_5",
    ]


def test_a_module_registered_twice_keeps_its_first_path_and_all_checkpoint_keys() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Net()
    graph, x = captured(model, 4)
    assert graph.op_names == ["first", "first._call_1"]
    assert set(graph.state_dict()) == set(model.state_dict())
    assert_same(model, graph, x)


def test_tied_weights_are_one_value_under_their_first_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = Net(), torch.randint(0, 7, (2, 5))
    graph = capture(model, x)
    assert [r.op for r in graph.value("embed.weight").readers] == ["embed", "head"]
    graph.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(graph)
    assert copied.get_parameter("head.weight") is copied.get_parameter("embed.weight")
    assert_same(model, graph, x)


def test_an_input_called_like_a_module_is_renamed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, fc: Tensor) -> Tensor:
            return self.fc(fc)

    graph, _ = captured(Net(), 4)
    assert [i.name for i in graph.info.inputs] == ["fc_"]


def test_a_parameter_called_like_an_attribute_of_our_operators_keeps_its_path() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.scalar, self.kind = (nn.Parameter(torch.rand(4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scalar

    model = nn.Sequential(Gain(), nn.ReLU())
    graph, x = captured(model, 4)
    assert graph.op_names == ["0", "1"]
    graph.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, graph, x)


def test_constants_get_paths_of_their_own_and_stay_out_of_checkpoints() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.tensor([2.0, 3.0])
            self.register_buffer("offset", torch.ones(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x + torch.tensor([1.0, -1.0])) * self.gain + self.offset

    model = nn.Sequential(Shift())
    graph, x = captured(model, 2)
    constants = {v.name for v in graph.values.values() if v.is_constant}
    assert constants == {"0._constant_0", "0.gain", "0.offset"}
    assert not graph.state_dict()
    assert not copy.deepcopy(graph).state_dict()
    assert_same(model, graph, x)


def test_all_checkpoint_keys_are_there_also_of_what_is_never_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.unused = nn.Sequential(nn.Linear(2, 2))
            self.free = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight)

    model = Net()
    graph, x = captured(model, 3, 5, 5)
    assert set(graph.state_dict()) == set(model.state_dict())
    other = Net()
    nn.init.normal_(other.bn.weight)
    for g in (graph, copy.deepcopy(graph)):
        g.load_state_dict(other.state_dict(), strict=True)
        assert_same(other, g, x)


def test_the_users_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    graph, _ = captured(model, 4)
    with torch.no_grad():
        graph.get_parameter("0.weight").zero_()
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- writes in place ---------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


def write_to_slice(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1:3] = 0
    return y + x


def write_to_nested_view(x: Tensor) -> Tensor:
    y = x * 1
    y.transpose(1, 2)[:, 0].add_(5)
    return y


def read_view_after_base_was_written(x: Tensor) -> Tensor:
    y = x * 1
    view = y.flatten(1)
    y.mul_(3)
    return view


def read_sibling_view_after_write(x: Tensor) -> Tensor:
    y = x * 1
    left, right = y[:, :2], y[:, 1:]
    left.neg_()
    return right * 2


def read_part_of_split_after_write(x: Tensor) -> Tensor:
    y = x * 1
    left, right = y.chunk(2, dim=1)
    y.add_(1)
    return left * right


def chain_of_writes(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.relu_()
    y += 1
    z *= 2
    return y - z.reshape(y.shape)


def write_to_input(x: Tensor) -> Tensor:
    x.relu_()
    return x + 1


def write_to_dropped_input(x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, False)
    y.add_(1)
    return x * y


def masked_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0.5
    y.clamp_(max=0.7)
    return y


def copy_into_rows(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 1].copy_(x[:, 0])
    return y


def write_through_reshape(x: Tensor) -> Tensor:
    y = x * 1
    y.view(y.shape[0], -1)[:, ::2].fill_(7)
    return y


def write_in_no_grad_region(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        y[:, 0] = 0
        z = y + 1
    return y * z


WRITES = [
    write_to_slice,
    write_to_nested_view,
    read_view_after_base_was_written,
    read_sibling_view_after_write,
    read_part_of_split_after_write,
    chain_of_writes,
    write_to_input,
    write_to_dropped_input,
    masked_write,
    copy_into_rows,
    write_through_reshape,
    write_in_no_grad_region,
]


@pytest.mark.parametrize("function", WRITES)
def test_writes_in_place_are_seen_by_every_later_read(function) -> None:  # type: ignore[no-untyped-def]
    model = Function(function)
    graph, x = captured(model, 4, 4)
    assert_same(model, graph, x)
    kept = x.clone()
    assert_same(model, graph, torch.randn(5, 4, 4))
    graph(x)
    assert torch.equal(x, kept)


def test_a_write_through_a_view_that_cannot_be_undone_is_refused_only_if_it_is_read() -> None:
    def spoil(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        view = y.as_strided((2,), (1,))
        view.add_(1)
        return view, y

    with pytest.raises(ModelError, match=r"view.*as_strided"):
        capture(Function(spoil), torch.randn(2, 4), dynamic_batch=False)
    graph = capture(Function(lambda x: spoil(x)[0]), torch.randn(2, 4), dynamic_batch=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(graph(x), x[0, :2] + 1)


def test_a_write_to_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    with pytest.raises(ModelError, match="'count'"):
        captured(Counter(), 1)


# --- train and eval ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_trains_as_the_module_does(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(inplace=True))
    graph, _ = captured(model, 3, 6, 6)
    reference = copy.deepcopy(model).train()
    graph.train()
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(graph(x), reference(x), rtol=1e-5, atol=1e-6)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(graph.state_dict()[key], tensor)
    graph(x).sum().backward()
    assert graph.get_parameter("0.weight").grad is not None


def test_dropout_is_alive_in_training_only() -> None:
    graph, x = captured(nn.Sequential(nn.Dropout(0.5), nn.Identity()), 1000)
    assert torch.equal(graph(x), x)
    zeros = (graph.train()(x) == 0).float().mean()
    assert 0.3 < zeros < 0.7


def test_a_branch_on_training_is_reported() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (
                F.dropout(x, 0.1, self.training) * 2
                if self.training
                else F.dropout(x, 0.1, self.training).exp()
            )

    with pytest.warns(UserWarning, match=r"branches on self.training.*exp.*mul") as told:
        capture(Net(), torch.randn(2, 4))
    assert [w.filename for w in told] == [__file__]


def test_functional_dropout_is_no_branch() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.1, self.training)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph, _ = captured(Net(), 4)
    assert [op.kind for op in graph.ops] == ["Dropout"]


# --- inputs and outputs ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def forward(self, image: Tensor, scale: Tensor, bias: Tensor | None = None) -> dict[str, object]:
        y = image * scale
        return {"y": y, "more": (y.exp(), [y + 1, None]), "plain": image}


def test_nested_outputs_keep_their_structure_and_named_inputs_their_names() -> None:
    model = Pair()
    inputs = {"scale": torch.randn(2, 3), "image": torch.randn(2, 3)}
    graph = capture(model, inputs)
    assert [i.name for i in graph.info.inputs] == ["image", "scale"]
    found = graph(inputs["image"], inputs["scale"])
    expected = model(**inputs)
    assert isinstance(found["more"], tuple)
    assert found["more"][1][1] is None
    torch.testing.assert_close(found["more"][0], expected["more"][0])
    torch.testing.assert_close(found["more"][1][0], expected["more"][1][0])
    assert graph.info.outputs == ("_generated_mul_0", "_generated_exp_1", "_generated_add_2", "image")


def test_positional_inputs_are_named_after_the_parameters_too() -> None:
    graph = capture(Pair(), (torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)))
    assert [(i.name, i.shape) for i in graph.info.inputs] == [
        ("image", (None, 3)),
        ("scale", (None, 3)),
        ("bias", (None, 3)),
    ]


def test_operators_with_several_outputs_number_them() -> None:
    graph, x = captured(Function(lambda x: x.max(dim=1)), 4)
    name = graph.op_names[0]
    assert graph.info.outputs == (f"{name}.0", f"{name}.1")
    torch.testing.assert_close(tuple(graph(x)), tuple(x.max(dim=1)))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_dynamic_batch_takes_any_batch_size(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    graph, _ = captured(model, 3, 6, 6, batch=batch)
    assert graph.info.dynamic_batch
    assert graph.info.example_batch == batch
    assert graph.value("0").info.batch_axis == 0
    assert graph.value("0").info.shape == (batch, 4, 4, 4)
    assert graph.info.inputs[0].shape == (None, 3, 6, 6)
    for n in (1, 2, 7):
        assert_same(model, graph, torch.randn(n, 3, 6, 6))


def test_a_model_that_fixes_the_batch_is_captured_with_a_warning() -> None:
    model = Function(lambda x: x.reshape(3, 8) * 2)
    with pytest.warns(UserWarning, match="batch size is fixed at 3"):
        graph, x = captured(model, 2, 4, batch=3)
    assert not graph.info.dynamic_batch
    assert graph.info.inputs[0].shape == (3, 2, 4)
    assert_same(model, graph, x)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            (torch.ones(4, 3), torch.ones(1, 3)),
            "all shapes are fixed: the inputs have no common first axis (xs_0 [4, 3], xs_1 [1, 3])",
        ),
        (
            (torch.ones(4, 3), torch.ones(())),
            "all shapes are fixed: the inputs have no common first axis (xs_0 [4, 3], xs_1 [])",
        ),
        (
            (torch.ones(0, 3), torch.ones(0, 3)),
            "the batch size is fixed at 0: the example is empty",
        ),
    ],
)
def test_inputs_without_a_common_length_fix_all_shapes(inputs: tuple[Tensor, Tensor], said: str) -> None:
    with pytest.warns(UserWarning, match="^capture: ") as told:
        graph = capture(Function(lambda x, y: x + y), inputs)
    assert [(str(w.message), w.filename) for w in told] == [(f"capture: {said}", __file__)]
    assert not graph.info.dynamic_batch
    assert [i.shape for i in graph.info.inputs] == [tuple(x.shape) for x in inputs]


def test_sizes_computed_from_the_batch_follow_it() -> None:
    model = Function(lambda x: x.sum() / (x.shape[0] * 2 + 1) + x.new_zeros(x.shape[0], 1))
    graph, _ = captured(model, 4)
    assert_same(model, graph, torch.randn(5, 4))


# --- operators without a class -----------------------------------------------------------------------------------


def test_unknown_operators_run_as_they_are_and_are_listed() -> None:
    model = Function(lambda x: torch.logcumsumexp(x, dim=1).relu())
    graph, x = captured(model, 4)
    assert graph.info.opaque == ("_generated_logcumsumexp_0",)
    assert graph.op("_generated_logcumsumexp_0").kind == "aten.logcumsumexp"
    assert_same(model, graph, x)
    assert_same(model, copy.deepcopy(graph), torch.randn(3, 4))


# --- networks ----------------------------------------------------------------------------------------------------

NETWORKS = {
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "attention, not batch first inside": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        (5, 8),
    ),
    "encoder": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        (5, 8),
    ),
    "reflect padding": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "bidirectional lstm": (Function(nn.LSTM(4, 3, batch_first=True, bidirectional=True)), (6, 4)),
    "gru": (Function(nn.GRU(4, 3, num_layers=2, batch_first=True)), (6, 4)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "norms": (
        nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LocalResponseNorm(3), nn.RMSNorm(5)),
        (4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_as_their_modules_do(name: str) -> None:
    model, shape = NETWORKS[name]
    graph, x = captured(model, *shape)
    assert_same(model, graph, x)
    assert_same(model, graph, torch.randn(3, *shape))
    graph.load_state_dict(model.state_dict(), strict=True)


def test_multi_head_attention_is_made_of_parts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model = Net()
    graph, x = captured(model, 5, 8, batch=1)
    kinds = {op.kind for op in graph.ops}
    assert {"Linear", "Attention"} <= kinds
    assert not graph.info.opaque
    assert_same(model, graph, x)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, found",
    [
        (([1.0], torch.ones(1, 2)), "list"),
        ({"image": torch.ones(1, 2)}, "scale"),
        ({"image": torch.ones(1, 2), "scale": torch.ones(1, 2), "no": torch.ones(1)}, "no"),
        ((), "image"),
        ((torch.ones(2, 3), torch.ones(2, 4)), "must match"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: object, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        capture(Pair(), inputs)


def test_control_flow_on_contents_is_refused_with_the_line() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ModelError, match=r"test_capture_torch.py:\d+"):
        captured(Net(), 4)


def test_chance_in_evaluation_is_refused() -> None:
    with pytest.raises(ModelError, match="rand"):
        captured(Function(lambda x: x + torch.rand_like(x)), 4)
    with pytest.raises(ModelError, match="chance"):
        captured(Function(lambda x: F.dropout(x, 0.5, True)), 400)


def test_outputs_that_are_no_tensors_stay() -> None:
    graph, _ = captured(
        Function(lambda x: {"y": x + 1, "n": x.shape[0], "name": "here", "ones": torch.ones(2)}), 4
    )
    found = graph(torch.ones(5, 4))
    assert (found["n"], found["name"]) == (5, "here")
    assert torch.equal(found["ones"], torch.ones(2))


def test_control_flow_operators_are_refused() -> None:
    model = Function(lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    with pytest.raises(ModelError, match="cond"):
        captured(model, 4)
