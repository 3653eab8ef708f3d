"""What the evaluator claims about shape arithmetic holds for every batch size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bitwright.importers.onnx_vectors import Entry, Symbol, Vector, evaluate

INTS = st.integers(-2, 6)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """Lengths after the batch, and steps: an operator and the constant that is its second operand."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from(["Gather", "Slice", "Concat", "Add", "Sub", "Mul", "Div", "Equal", "ReduceProd"])
        )
        size = draw(st.integers(1, 3)) if kind in ("Gather", "Concat") else 1
        values = draw(st.lists(INTS, min_size=size, max_size=size))
        if kind == "Div":
            values = [abs(values[0]) or 1]  # the reference divides integers like Python, ONNX truncates
        steps.append((kind, values))
    return lengths, steps


def model_of(lengths: list[int], steps: list[tuple[str, list[int]]]) -> tuple[list, dict]:  # type: ignore[type-arg]
    """Nodes of a chain that starts at a shape, and its constants. Indices are wrapped to stay in range."""
    nodes, constants = [helper.make_node("Shape", ["x"], ["v0"])], {}
    count = len(lengths) + 1
    for i, (kind, values) in enumerate(steps):
        source, result, name = f"v{i}", f"v{i + 1}", f"c{i}"
        constants[name] = np.array(values, dtype=np.int64)
        if kind == "Gather":
            constants[name] = constants[name] % count
            nodes.append(helper.make_node("Gather", [source, name], [result]))
            count = len(values)
        elif kind == "Slice":
            constants[name] = np.array([values[0] % count], dtype=np.int64)
            constants[f"{name}_end"] = np.array([99], dtype=np.int64)
            nodes.append(helper.make_node("Slice", [source, name, f"{name}_end"], [result]))
            count -= int(constants[name][0])
        elif kind == "Concat":
            nodes.append(helper.make_node("Concat", [source, name], [result], axis=0))
            count += len(values)
        elif kind == "ReduceProd":
            nodes.append(helper.make_node("ReduceProd", [source], [result]))
            count = 1
        elif kind == "Equal":  # exporters' pattern: replace what equals a constant
            constants[f"{name}_one"] = np.array([1], dtype=np.int64)
            nodes.append(helper.make_node("Equal", [source, name], [f"{result}_hit"]))
            nodes.append(helper.make_node("Where", [f"{result}_hit", f"{name}_one", source], [result]))
        else:
            nodes.append(helper.make_node(kind, [source, name], [result]))
    return nodes, constants


@given(programs())
@settings(max_examples=150, deadline=None)
def test_known_entries_are_true_for_every_batch(
    program: tuple[list[int], list[tuple[str, list[int]]]],
) -> None:
    lengths, steps = program
    nodes, constants = model_of(lengths, steps)
    dims: dict[str, tuple[Entry, ...]] = {"x": (Symbol("N"), *lengths)}
    vectors: dict[str, Vector] = {}
    for node in nodes:
        found = evaluate(node, constants, vectors, dims)
        if found is not None:
            vectors[node.output[0]] = found
    assert "v0" in vectors
    results = [n.output[0] for n in nodes]
    outputs = [
        helper.make_tensor_value_info(r, TensorProto.BOOL if r.endswith("hit") else TensorProto.INT64, None)
        for r in results
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *lengths])],
        outputs,
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    reference = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    for batch in (1, 2, 5):
        answers = reference.run(None, {"x": np.zeros((batch, *lengths), dtype=np.float32)})
        for name, answer in zip(results, answers, strict=True):
            if name not in vectors:
                continue
            assert vectors[name].shape == np.asarray(answer).shape
            for entry, true in zip(vectors[name].reshape(-1), np.asarray(answer).reshape(-1), strict=True):
                if isinstance(entry, Symbol):
                    assert true == batch
                elif isinstance(entry, int):
                    assert entry == true
