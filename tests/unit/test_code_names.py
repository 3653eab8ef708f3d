"""How files name the codes of a value."""

from __future__ import annotations

from onnx import ModelProto, helper

from bitwright.plan.code_names import codes_in, move_codes, say_whose_codes


def model(*nodes: object) -> ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "test", [], []))


def test_the_name_says_whose_codes_and_needs_no_metadata() -> None:
    node = helper.make_node("QuantizeLinear", ["a", "s", "z"], ["a_quantized"])
    say_whose_codes(node, "a_quantized", "a")

    assert not node.metadata_props
    assert codes_in(model(node)) == {"a": ("a_quantized", "QuantizeLinear")}


def test_a_value_that_is_called_like_codes_is_not_taken_for_them() -> None:
    """A network may have values `a` and `a_quantized` of its own."""
    own = helper.make_node("Relu", ["x"], ["a_quantized"])
    node = helper.make_node("Split", ["x"], ["first", "a_quantized_2"])
    say_whose_codes(node, "a_quantized_2", "a")

    assert codes_in(model(own, node))["a"] == ("a_quantized_2", "Split")
    assert codes_in(model(node, own))["a"] == ("a_quantized_2", "Split")


def test_a_call_says_what_its_nodes_said() -> None:
    first = helper.make_node("Split", ["x"], ["p", "q"])
    say_whose_codes(first, "q", "of q")
    second = helper.make_node("Relu", ["p"], ["r"])
    say_whose_codes(second, "r", "of r")
    call = helper.make_node("Both", ["x"], ["r", "q"])
    move_codes([first, second], call)

    assert codes_in(model(call)) == {"of q": ("q", "Both"), "of r": ("r", "Both")}
