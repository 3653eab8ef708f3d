"""Every ONNX spelling, at several opsets: the loaded graph equals ONNX Runtime, and so does the graph written anew."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import parser

from bitwright.exporters.onnx_float import export_float
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_onnx import load_onnx
from bitwright.ops.spelling import ONNX

RANDOM = np.random.default_rng(7)


def literal(*shape: int) -> str:
    """Random initializer contents in ONNX's text form."""
    return "{" + ", ".join(f"{v:.3f}" for v in RANDOM.normal(size=shape).reshape(-1)) + "}"


X = "float[N,3,6,8] x"
Y = "float[A,B,C,D] y"

#: opsets, signature, initializers, body
CASES: dict[str, tuple[tuple[int, ...], str, str, str]] = {
    # --- shape
    "reshape": ((9, 13, 21), f"({X}) => (float[A,B] y)", "int64[2] s = {0, -1}", "y = Reshape(x, s)"),
    "reshape to a shape": (
        (13, 19),
        f"({X}) => (float[A,B] y)",
        "int64[1] i = {0}, int64[1] m = {-1}",
        "s = Shape(x) n = Gather(s, i) t = Concat<axis=0>(n, m) y = Reshape(x, t)",
    ),
    "flatten": ((9, 21), f"({X}) => (float[A,B] y)", "", "y = Flatten<axis=2>(x)"),
    "flatten from the end": ((13,), f"({X}) => (float[A,B] y)", "", "y = Flatten<axis=-1>(x)"),
    "squeeze 9": ((9, 11), f"({X}) => ({Y})", "", "u = Unsqueeze<axes=[1,4]>(x) y = Squeeze<axes=[1,4]>(u)"),
    "squeeze 13": (
        (13, 21),
        f"({X}) => ({Y})",
        "int64[2] a = {-1, 1}",
        "u = Unsqueeze(x, a) y = Squeeze(u, a)",
    ),
    "squeeze everything": ((13,), "(float[2,1,3,1] x) => (float[A,B] y)", "", "y = Squeeze(x)"),
    "transpose": ((9, 21), f"({X}) => ({Y})", "", "t = Transpose<perm=[0,2,3,1]>(x) y = Transpose(t)"),
    "depth to space": (
        (9, 13),
        "(float[N,8,2,3] x) => (float[A,B,C,D] y)",
        "",
        "y = DepthToSpace<blocksize=2>(x)",
    ),
    "pixel shuffle": (
        (11, 13),
        "(float[N,8,2,3] x) => (float[A,B,C,D] y)",
        "",
        'y = DepthToSpace<blocksize=2,mode="CRD">(x)',
    ),
    "space to depth": ((9, 13), f"({X}) => ({Y})", "", "y = SpaceToDepth<blocksize=2>(x)"),
    "expand": (
        (9, 13),
        "(float[N,1,6,1] x) => (float[A,B,C,D] y)",
        "int64[4] s = {1, 3, 1, 4}",
        "y = Expand(x, s)",
    ),
    "expand to more axes": (
        (13,),
        "(float[N,1] x) => (float[A,B,C] y)",
        "int64[3] s = {2, 1, 4}",
        "y = Expand(x, s)",
    ),
    "expand to a batch": (
        (13,),
        f"({X}) => (float[A,B,C,D] y)",
        "float[1,1,1,8] c = " + literal(8) + ", int64[1] i = {0}, int64[3] r = {3, 6, 8}",
        "s = Shape(x) n = Gather(s, i) t = Concat<axis=0>(n, r) e = Expand(c, t) y = Add(x, e)",
    ),
    "tile": ((9, 13), f"({X}) => ({Y})", "int64[4] r = {1, 2, 1, 3}", "y = Tile(x, r)"),
    "shape": ((9,), f"({X}) => (int64[A] y)", "", "y = Shape(x)"),
    "part of a shape": ((15, 21), f"({X}) => (int64[A] y)", "", "y = Shape<start=-3,end=-1>(x)"),
    "size": ((13,), f"({X}) => (int64 y)", "", "y = Size(x)"),
    "cast": ((9, 13), f"({X}) => (int32[A,B,C,D] y)", "", "y = Cast<to=6>(x)"),
    "cast like": ((15,), f"({X}, int32[N] z) => (int32[A,B,C,D] y)", "", "y = CastLike(x, z)"),
    # --- slicing, indexing, padding
    "slice 9": ((9,), f"({X}) => ({Y})", "", "y = Slice<axes=[2,-1],starts=[1,-3],ends=[5,100]>(x)"),
    "slice": (
        (10, 13, 21),
        f"({X}) => ({Y})",
        "int64[2] s = {4, -1}, int64[2] e = {0, -100}, int64[2] a = {2, 3}, int64[2] t = {-2, -1}",
        "y = Slice(x, s, e, a, t)",
    ),
    "slice without axes": (
        (13,),
        f"({X}) => ({Y})",
        "int64[3] s = {0, 1, 2}, int64[3] e = {9, 9, 9}",
        "y = Slice(x, s, e)",
    ),
    "slice to a computed end": (
        (13,),
        f"({X}) => ({Y})",
        "int64[1] z = {0}, int64[1] two = {2}, int64[1] i = {0}",
        "s = Shape(x) n = Gather(s, i) e = Mul(n, two) h = Div(e, two) y = Slice(x, z, h, z)",
    ),
    "split 9": (
        (9, 11),
        f"({X}) => ({Y}, float[A,B,C,F] z)",
        "",
        "y, z = Split<axis=3,split=[3,5]>(x)",
    ),
    "split 13": (
        (13, 21),
        f"({X}) => ({Y}, float[A,B,C,F] z)",
        "int64[2] s = {3, 5}",
        "y, z = Split<axis=-1>(x, s)",
    ),
    "equal split": ((9, 13), f"({X}) => ({Y}, float[A,B,C,F] z)", "", "y, z = Split<axis=2>(x)"),
    "uneven split": (
        (18,),
        f"({X}) => ({Y}, float[A,B,C,F] z, float[A,B,C,G] w)",
        "",
        "y, z, w = Split<axis=3,num_outputs=3>(x)",
    ),
    "gather": ((9, 13), f"({X}) => ({Y})", "int64[2] i = {-1, 0}", "y = Gather<axis=3>(x, i)"),
    "gather one": ((13,), f"({X}) => (float[A,B,C] y)", "int64 i = {-2}", "y = Gather<axis=2>(x, i)"),
    "gather from a table": (
        (13,),
        "(int64[N,5] x) => (float[A,B,C] y)",
        "float[4,3] t = " + literal(4, 3),
        "y = Gather(t, x)",
    ),
    "gather elements": (
        (11, 13),
        "(float[N,4] x, int64[N,3] i) => (float[A,B] y)",
        "",
        "y = GatherElements<axis=1>(x, i)",
    ),
    "gather nd": (
        (12, 13),
        "(float[N,4,5] x, int64[N,3,2] i) => (float[A,B] y)",
        "",
        "y = GatherND<batch_dims=1>(x, i)",
    ),
    "scatter": (
        (9, 10),
        "(float[3,4] x) => (float[A,B] y)",
        "int64[1,4] i = {0,2,1,0}, float[1,4] u = {1,2,3,4}",
        "y = Scatter(x, i, u)",
    ),
    "scatter elements": (
        (18,),
        "(float[3,4] x) => (float[A,B] y)",
        "int64[2,4] i = {0,-1,1,0,0,2,1,0}, float[2,4] u = {1,2,3,4,5,6,7,8}",
        'y = ScatterElements<reduction="add">(x, i, u)',
    ),
    "scatter nd": (
        (11, 13),
        "(float[3,4] x) => (float[A,B] y)",
        "int64[2,1] i = {2,0}, float[2,4] u = {1,2,3,4,5,6,7,8}",
        "y = ScatterND(x, i, u)",
    ),
    "scatter nd max": (
        (18,),
        "(float[3,4] x) => (float[A,B] y)",
        "int64[3,2] i = {2,1,0,-1,2,1}, float[3] u = {1,2,3}",
        'y = ScatterND<reduction="max">(x, i, u)',
    ),
    "pad 9": ((9,), f"({X}) => ({Y})", "", "y = Pad<pads=[0,0,1,2,0,0,0,3],value=0.5>(x)"),
    "pad": (
        (11, 13, 21),
        f"({X}) => ({Y})",
        "int64[8] p = {0,0,1,-2,0,1,0,3}, float v = {-1.5}",
        "y = Pad(x, p, v)",
    ),
    "pad some axes": (
        (18,),
        f"({X}) => ({Y})",
        "int64[4] p = {1,2,0,3}, int64[2] a = {-1,1}",
        "y = Pad(x, p, , a)",
    ),
    "reflect": (
        (11, 21),
        f"({X}) => ({Y})",
        "int64[8] p = {0,0,2,3,0,0,1,0}",
        'y = Pad<mode="reflect">(x, p)',
    ),
    "edge": ((11, 21), f"({X}) => ({Y})", "int64[8] p = {0,1,2,3,0,0,1,0}", 'y = Pad<mode="edge">(x, p)'),
    "wrap": ((19, 21), f"({X}) => ({Y})", "int64[8] p = {0,0,2,3,0,0,1,0}", 'y = Pad<mode="wrap">(x, p)'),
    # --- made from numbers
    "constant of shape": (
        (9, 20),
        f"({X}) => ({Y})",
        "",
        "s = Shape(x) c = ConstantOfShape<value=float[1] {2.5}>(s) y = Add(x, c)",
    ),
    "range": (
        (11,),
        "(float[N,5] x) => (float[A,B] y)",
        "int64 z = {0}, int64 o = {1}, int64 i = {0}",
        "s = Shape(x) n = Gather(s, i) r = Range(z, n, o) y = Gather(x, r)",
    ),
    "one hot": (
        (9, 11),
        "(int64[N,3] x) => (float[A,B,C] y)",
        "int64 d = {4}, float[2] v = {-1, 2}",
        "y = OneHot<axis=1>(x, d, v)",
    ),
    # --- joining
    "concat": ((9, 13), f"({X}, float[N,2,6,8] z) => ({Y})", "", "y = Concat<axis=-3>(x, z)"),
    "einsum": (
        (12,),
        "(float[N,3,4] x) => (float[A,B,C] y)",
        "float[4,5] w = " + literal(4, 5),
        'y = Einsum<equation="bij,jk->bik">(x, w)',
    ),
    # --- pooling and reducing
    "max pool": (
        (9, 12),
        f"({X}) => ({Y})",
        "",
        "y = MaxPool<kernel_shape=[3,2],strides=[2,1],pads=[1,0,0,1]>(x)",
    ),
    "max pool, ceil": (
        (10, 12),
        f"({X}) => ({Y})",
        "",
        "y = MaxPool<kernel_shape=[3,3],strides=[2,2],dilations=[1,2],ceil_mode=1>(x)",
    ),
    "max pool, same": (
        (9,),
        f"({X}) => ({Y})",
        "",
        'y = MaxPool<kernel_shape=[3,2],strides=[2,2],auto_pad="SAME_LOWER">(x)',
    ),
    "max pool 1d": ((12,), "(float[N,3,9] x) => (float[A,B,C] y)", "", "y = MaxPool<kernel_shape=[4]>(x)"),
    "max pool 3d": (
        (12,),
        "(float[N,2,5,6,7] x) => (float[A,B,C,D,E] y)",
        "",
        "y = MaxPool<kernel_shape=[2,3,2],strides=[1,2,3]>(x)",
    ),
    "average pool": (
        (9, 11, 21),
        f"({X}) => ({Y})",
        "",
        "y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(x)",
    ),
    "average pool with padding": (
        (11, 19),
        f"({X}) => ({Y})",
        "",
        "y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,0,0,1],ceil_mode=1,count_include_pad=1>(x)",
    ),
    "average pool, same": (
        (9,),
        f"({X}) => ({Y})",
        "",
        'y = AveragePool<kernel_shape=[3,2],strides=[2,2],auto_pad="SAME_UPPER">(x)',
    ),
    "global average": ((9,), f"({X}) => ({Y})", "", "y = GlobalAveragePool(x)"),
    "global maximum": ((9,), f"({X}) => ({Y})", "", "y = GlobalMaxPool(x)"),
    **{
        f"reduce {kind}": (
            (9, 13, 18),
            f"({X}) => (float[A,B,C] y)",
            "",
            f"p = Abs(x) y = Reduce{kind}<axes=[1],keepdims=0>(p)",
        )
        for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
    },
    "reduce all": ((13,), f"({X}) => ({Y})", "", "y = ReduceMean(x)"),
    "reduce nothing": (
        (18,),
        f"({X}) => ({Y})",
        "int64[0] a = {}",
        "y = ReduceSum<noop_with_empty_axes=1>(x, a)",
    ),
    # --- resizing
    "upsample": ((9,), f"({X}) => ({Y})", "float[4] s = {1,1,2,3}", 'y = Upsample<mode="nearest">(x, s)'),
    "linear upsample": (
        (9,),
        f"({X}) => ({Y})",
        "float[4] s = {1,1,2,3}",
        'y = Upsample<mode="linear">(x, s)',
    ),
    "resize 10": ((10,), f"({X}) => ({Y})", "float[4] s = {1,1,0.5,0.7}", 'y = Resize<mode="nearest">(x, s)'),
    "resize 11": (
        (11,),
        f"({X}) => ({Y})",
        "float[0] r = {}, float[4] s = {1,1,2,1.5}",
        'y = Resize<mode="linear",coordinate_transformation_mode="align_corners">(x, r, s)',
    ),
    "resize to sizes": (
        (13, 19),
        f"({X}) => ({Y})",
        "int64[1] i = {0}, int64[3] t = {3,9,5}",
        "h = Shape(x) n = Gather(h, i) z = Concat<axis=0>(n, t) "
        'y = Resize<mode="linear",coordinate_transformation_mode="pytorch_half_pixel">(x, , , z)',
    ),
    "cubic resize": (
        (13,),
        f"({X}) => ({Y})",
        "float[4] s = {1,1,1.7,0.6}",
        'y = Resize<mode="cubic",cubic_coeff_a=-0.5,exclude_outside=1>(x, , s)',
    ),
    "resize some axes": ((18,), f"({X}) => ({Y})", "float[2] s = {2,2}", "y = Resize<axes=[3,2]>(x, , s)"),
    # --- order
    "top k 9": ((9,), "(float[N,7] x) => (float[A,B] y, int64[A,B] i)", "", "y, i = TopK<k=3>(x)"),
    "top k": (
        (11,),
        "(float[N,7] x) => (float[A,B] y, int64[A,B] i)",
        "int64[1] k = {3}",
        "y, i = TopK<largest=0>(x, k)",
    ),
    "arg max": ((9, 13), f"({X}) => (int64[A,B,C,D] y)", "", "y = ArgMax<axis=2>(x)"),
    "arg min": (
        (12,),
        f"({X}) => (int64[A,B,C] y)",
        "",
        "y = ArgMin<axis=-1,keepdims=0,select_last_index=1>(x)",
    ),
    "non zero": ((9,), "(float[3,4] x) => (int64[A,B] y)", "", "p = Relu(x) y = NonZero(p)"),
    "running sum": (
        (11,),
        f"({X}) => ({Y})",
        "int64 a = {2}",
        "y = CumSum<exclusive=1,reverse=1>(x, a)",
    ),
    "triangle": ((14,), f"({X}) => ({Y})", "int64 k = {-1}", "y = Trilu<upper=0>(x, k)"),
    # --- recurrent
    **{
        f"{kind} {direction}{extra}": (
            (9, 14),
            "(float[5,2,3] x) => (float[A,B,C,D] y, float[A,B,E] h)",
            f"float[{d},{g * 4},3] w = {literal(d, g * 4, 3)}, float[{d},{g * 4},4] r = {literal(d, g * 4, 4)}, "
            f"float[{d},{2 * g * 4}] b = {literal(d, 2 * g * 4)}",
            f'y, h = {kind}<hidden_size=4,direction="{direction}"{extra}>(x, w, r, b)',
        )
        for kind, g, extra in (
            ("LSTM", 4, ""),
            ("GRU", 3, ""),
            ("GRU", 3, ",linear_before_reset=1"),
            ("RNN", 1, ""),
        )
        for direction, d in (("forward", 1), ("reverse", 1), ("bidirectional", 2))
    },
    "LSTM with states": (
        (9, 14),
        "(float[5,2,3] x, float[1,2,4] h, float[1,2,4] c) => (float[A,B,D] ho, float[A,B,D] co)",
        f"float[1,16,3] w = {literal(16, 3)}, float[1,16,4] r = {literal(16, 4)}",
        ", ho, co = LSTM<hidden_size=4>(x, w, r, , , h, c)",
    ),
    "RNN with Relu": (
        (14,),
        "(float[5,2,3] x) => (float[A,B,C,D] y)",
        f"float[1,4,3] w = {literal(4, 3)}, float[1,4,4] r = {literal(4, 4)}, int32[1] l = {{5}}",
        'y = RNN<hidden_size=4,activations=["Relu"]>(x, w, r)',
    ),
    # --- operators whose meaning changed between opsets
    "softmax over the last axis": ((9, 11, 13, 21), f"({X}) => ({Y})", "", "y = Softmax<axis=3>(x)"),
    "flattening softmax": ((9, 11), f"({X}) => ({Y})", "", "y = Softmax<axis=1>(x)"),
    "softmax's default axis": ((9, 12, 13), f"({X}) => ({Y})", "", "y = Softmax(x)"),
    "flattening log softmax": ((9, 12), f"({X}) => ({Y})", "", "y = LogSoftmax<axis=2>(x)"),
    "flattening hardmax": ((9,), f"({X}) => ({Y})", "", "y = Hardmax<axis=2>(x)"),
    "clip 9": ((9,), f"({X}) => ({Y})", "", "y = Clip<min=-0.2,max=0.3>(x)"),
    "one-sided clip 9": ((9,), f"({X}) => ({Y})", "", "y = Clip<max=0.3>(x)"),
    "clip": ((11, 13), f"({X}) => ({Y})", "float hi = {0.3}", "y = Clip(x, , hi)"),
    "dropout": ((9, 12, 13), f"({X}) => ({Y})", "", "y = Dropout(x)"),
    "dropout 9": ((9, 10), f"({X}) => ({Y})", "", "y = Dropout<ratio=0.3>(x)"),
    "batch norm": (
        (9, 14, 15),
        f"({X}) => ({Y})",
        "float[3] s = {1,2,3}, float[3] b = {0.1,0.2,0.3}, float[3] m = {0,0.5,1}, float[3] v = {1,2,0.5}",
        "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)",
    ),
}


def build(name: str, opset: int) -> onnx.ModelProto:
    _, signature, initializers, body = CASES[name]
    between = f"<{initializers}>" if initializers else ""
    if opset >= 13:
        body = re.sub(r"ReduceSum<axes=\[1\],keepdims=0>\(p\)", "ReduceSum<keepdims=0>(p, axes)", body)
    if opset >= 18:
        body = re.sub(r"(Reduce\w+)<axes=\[1\],keepdims=0>\(p\)", r"\1<keepdims=0>(p, axes)", body)
    if "axes)" in body:
        between = "<int64[1] axes = {1}>"
    text = f'<ir_version: {4 if opset == 9 else 8}, opset_import: ["": {opset}]> g {signature} {between} {{ {body} }}'
    return parser.parse_model(text)


def inputs_for(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    found = {}
    for spec in graph.info.inputs:
        shape = [batch if d is None else d for d in spec.shape]
        if spec.dtype.is_floating_point:
            found[spec.name] = torch.randn(shape, generator=generator)
        else:
            found[spec.name] = torch.randint(0, 3, shape, generator=generator).to(spec.dtype)
    return found


def run_reference(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})


def assert_same(ours: object, theirs: np.ndarray) -> None:
    assert isinstance(ours, torch.Tensor)
    assert tuple(ours.shape) == theirs.shape
    assert ours.detach().numpy().dtype == theirs.dtype
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, opset", [(name, o) for name, case in CASES.items() for o in case[0]])
def test_loaded_operator_equals_onnx_runtime(name: str, opset: int) -> None:
    model = build(name, opset)
    onnx.checker.check_model(model)
    graph = load_onnx(model, check=False)
    for batch in (1, 3) if graph.info.dynamic_batch else (1,):
        inputs = inputs_for(graph, batch)
        env = Replay(graph).run(inputs)
        for output, theirs in zip(model.graph.output, run_reference(model, inputs), strict=True):
            assert_same(env[output.name], theirs)


@pytest.mark.parametrize("name", CASES)
def test_operator_written_anew_equals_the_original(name: str) -> None:
    model = build(name, CASES[name][0][-1])
    graph = load_onnx(model, check=False)
    graph.info = replace(graph.info, onnx_model=None)
    written = export_float(graph)
    onnx.checker.check_model(written, full_check=True)
    for batch in (1, 3) if graph.info.dynamic_batch else (1,):
        inputs = inputs_for(graph, batch)
        for a, b in zip(run_reference(model, inputs), run_reference(written, inputs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_upgraded_model_computes_the_same(name: str) -> None:
    """What the QDQ export starts from: the user's model at opset 21 or later."""
    model = build(name, CASES[name][0][0])
    graph = load_onnx(model, check=False)
    onnx.checker.check_model(graph.info.onnx_model, full_check=True)
    inputs = inputs_for(graph, 3 if graph.info.dynamic_batch else 1)
    for a, b in zip(run_reference(model, inputs), run_reference(graph.info.onnx_model, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


#: Files of operators whose ONNX spellings are tested here.
FAMILIES = {
    "shape", "expand", "depth", "length", "slicing", "indexing", "pad", "cast", "concat", "einsum", "pool", "reduce",
    "constants", "order", "resize", "recurrent",
}  # fmt: skip
#: Always refused; see the tests of `load_onnx`.
OF_OTHER_TESTS = {"EyeLike"}


def test_every_shape_operator_has_a_case() -> None:
    mine = {kind for kind in ONNX if ONNX.get(kind, where="test").__module__.rpartition(".")[2] in FAMILIES}
    covered = {n.op_type for name in CASES for n in build(name, CASES[name][0][-1]).graph.node}
    assert mine - covered - OF_OTHER_TESTS == set()
