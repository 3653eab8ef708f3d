"""A captured graph as a float ONNX model, written by its operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from export_cases import Builder, attention, residual, runs_alike, samples
from onnx import numpy_helper
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.exporters.onnx_float import check_exportable, export_float
from bitwright.graph.op import Emitter, Op
from bitwright.ops.conv import Conv, ConvTranspose
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.length import Size
from bitwright.ops.linear import Linear, MatMul
from bitwright.ops.unary import Unary
from bitwright.runtime.session import Session


class Untranslatable(Op):
    kind = "Untranslatable"

    def forward(self, x: Tensor) -> Tensor:
        return x


class Refused(Op):
    kind = "Refused"

    def forward(self, x: Tensor) -> Tensor:
        return x

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        raise ModelError("here", expected="a", found="a reason", remedy="c")


class Silent(Op):
    kind = "Silent"

    def forward(self, x: Tensor) -> Tensor:
        return x

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        pass


class Halves(Op):
    """Two outputs, the second of which nobody may read."""

    kind = "Halves"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        return a, b

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Split", inputs, self.outputs, axis=1, num_outputs=2)


class Scaled(Op):
    """Takes its constant apart itself."""

    kind = "Scaled"

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x * w.t()

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        w = emit.array(str(inputs[1]))
        assert w is not None
        assert emit.array(str(inputs[0])) is None
        emit.node("Mul", [inputs[0], emit.constant(w.T, "turned")], self.outputs)


class NeedsNewerOpset(Op):
    kind = "NeedsNewerOpset"

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.opset = max(emit.opset, 23)
        gain = emit.constant(np.ones(6, np.float32), "gain")
        emit.node("RMSNormalization", [inputs[0], gain], self.outputs, axis=-1, epsilon=1e-5)


@pytest.mark.parametrize("make", [residual, attention])
def test_onnx_runtime_computes_what_the_graph_computes(make) -> None:
    graph = make()
    model = export_float(graph)
    onnx.checker.check_model(model, full_check=True)
    runs_alike(graph, model)


def conv1d_same() -> Conv:
    return Conv((4,), stride=(2,), pads="same_upper", dilation=(1,), groups=1)


@pytest.mark.parametrize(
    ("op", "x", "weight"),
    [
        (conv1d_same(), (4, 9), (3, 4, 4)),
        (Conv((3, 2), stride=(1, 2), pads=[1, 0, 0, 1], dilation=(1, 1), groups=2), (4, 7, 8), (6, 2, 3, 2)),
        (
            Conv((2, 2, 2), stride=(1,) * 3, pads=[0] * 6, dilation=(1, 1, 2), groups=1),
            (2, 4, 4, 5),
            (3, 2, 2, 2, 2),
        ),
        (
            ConvTranspose(
                (3, 3), stride=(2, 2), pads=[1, 0, 0, 1], output_padding=(1, 0), dilation=(1, 1), groups=2
            ),
            (4, 5, 5),
            (4, 3, 3, 3),
        ),
        (Linear(), (7,), (5, 7)),
        (Linear(transposed=True), (7,), (7, 5)),
        (Linear(), (3, 7), (5, 7)),
        (Linear(transposed=True), (3, 7), (7, 5)),
    ],
    ids=lambda v: f"{v.kind}({v.describe()})" if isinstance(v, Op) else str(v),
)
@pytest.mark.parametrize("bias", [True, False])
def test_operators_with_weights_export_in_every_form(
    op: Op, x: tuple[int, ...], weight: tuple[int, ...], bias: bool
) -> None:
    b = Builder()
    channels = {"Conv": weight[0], "ConvTranspose": 2 * weight[1], "Linear": 5}[op.kind]
    inputs = [b.input("x", None, *x), b.constant("w", *weight), b.constant("b", channels) if bias else None]
    graph = b.done(b.op(op, "y", *inputs))
    model = export_float(graph)
    onnx.checker.check_model(model, full_check=True)
    runs_alike(graph, model)


def test_names_of_values_operators_and_constants_are_the_graphs_own() -> None:
    model = export_float(residual()).graph
    assert [n.name for n in model.node] == ["conv1", "relu1", "conv2", "add", "relu2", "flatten", "fc"]
    assert [list(n.output) for n in model.node] == [[n.name] for n in model.node]
    assert {t.name for t in model.initializer} == {
        f"{op}.{part}" for op in ("conv1", "conv2", "fc") for part in ("weight", "bias")
    }


def test_further_nodes_and_temporaries_are_named_after_their_operator() -> None:
    model = export_float(attention()).graph
    written = [(n.op_type, n.name, n.output[0]) for n in model.node if n.name.partition("/")[0] == "q"]
    assert written == [
        ("Transpose", "q", "q/weight_transposed"),
        ("MatMul", "q/MatMul_1", "q/product"),
        ("Add", "q/Add_2", "q"),
    ]


def test_a_dynamic_batch_is_called_n_and_other_dimensions_are_numbers() -> None:
    model = export_float(residual()).graph
    dims = [
        [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in (*model.input, *model.output)
    ]
    assert dims == [["N", 3, 6, 6], ["N", 5]]


def test_opset_ir_version_and_producer_are_set() -> None:
    model = export_float(residual())
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert model.producer_name == "bitwright"
    assert model.producer_version


def test_an_operator_may_ask_for_a_newer_opset() -> None:
    b = Builder()
    graph = b.done(b.op(NeedsNewerOpset(), "norm", b.input("x", None, 6)))
    model = export_float(graph)
    assert (model.opset_import[0].version, model.ir_version) == (23, 11)
    onnx.checker.check_model(model, full_check=True)


def test_unread_constants_are_left_out() -> None:
    b = Builder()
    graph = b.done(b.op(Scaled(), "s", b.input("x", None, 4), b.constant("w", 4, 1)))
    model = export_float(graph)
    assert [t.name for t in model.graph.initializer] == ["s/turned"]
    runs_alike(graph, model)


def test_only_the_read_output_of_an_operator_with_several_is_needed() -> None:
    b = Builder()
    b.op(Halves(), "halves", b.input("x", None, 6), outputs=["left", "right"])
    graph = b.done(b.op(Unary("Neg"), "minus", "right"))
    model = export_float(graph)
    onnx.checker.check_model(model, full_check=True)
    runs_alike(graph, model)


def test_a_value_that_is_output_twice_is_written_once() -> None:
    b = Builder()
    y = b.op(Unary("Relu"), "y", b.input("x", None, 4))
    graph = b.done(y, y)
    model = export_float(graph)
    assert [o.name for o in model.graph.output] == ["y"]
    runs_alike(graph, model)


def test_an_input_or_constant_may_be_an_output() -> None:
    b = Builder()
    x, k = b.input("x", None, 4), b.constant("k", 3)
    graph = b.done(b.op(Unary("Relu"), "y", x), x, k)
    model = export_float(graph)
    onnx.checker.check_model(model)
    runs_alike(graph, model)


def test_python_integers_become_int64_scalars() -> None:
    b = Builder()
    x = b.input("x", None, 3, 5)
    b.op(Size(0), "n", x)
    graph = b.done("n", b.op(Unary("Relu"), "y", x))
    model = export_float(graph)
    kind = model.graph.output[0].type.tensor_type
    assert (kind.elem_type, len(kind.shape.dim)) == (onnx.TensorProto.INT64, 0)
    assert Session(model).run(samples(graph, 3))["n"] == 3


def test_numbers_in_a_call_become_constants_of_the_type_computed_in() -> None:
    b = Builder()
    x = b.input("x", None, 4)
    b.assembler.add_op(Elementwise("Add"), "shifted", (x, 2), ["shifted"])
    graph = b.done("shifted")
    model = export_float(graph)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert stored["shifted/operand_1"].dtype == np.float32
    runs_alike(graph, model)


def test_a_constant_operand_of_a_product_is_stored_under_its_name() -> None:
    b = Builder()
    graph = b.done(b.op(MatMul(), "y", b.input("x", None, 3, 4), b.constant("table", 4, 2)))
    model = export_float(graph)
    assert [t.name for t in model.graph.initializer] == ["table"]
    runs_alike(graph, model)


def test_check_lists_every_operator_that_cannot_be_translated() -> None:
    b = Builder()
    x = b.op(Untranslatable(), "first", b.input("x", None, 4))
    graph = b.done(b.op(Refused(), "third", b.op(Unary("Relu"), "second", x)))
    with pytest.raises(ModelError) as caught:
        check_exportable(graph)
    assert "2 that cannot" in str(caught.value)
    assert "first (Untranslatable has no translation)" in caught.value.found
    assert "third (Refused: a reason)" in caught.value.found
    assert "second" not in caught.value.found
    with pytest.raises(ModelError):
        export_float(graph)


def test_an_operator_that_writes_nothing_is_refused() -> None:
    b = Builder()
    graph = b.done(b.op(Silent(), "silent", b.input("x", None, 4)))
    with pytest.raises(ModelError, match="nothing for silent"):
        check_exportable(graph)


def test_exportable_graphs_pass_the_check() -> None:
    check_exportable(residual())
