"""Every target that comes with Bitwright speaks of operators that exist."""

from __future__ import annotations

import pytest

import bitwright.ops  # noqa: F401  (registers all operators)
from bitwright.graph.op import Op
from bitwright.ops import elementwise, unary
from bitwright.plan.target import load_target, target_names


def kinds() -> set[str]:
    found = {"Softmax", "LogSoftmax", "LSTM", "GRU", "RNN", *elementwise._FORMS, *unary._FORMS}
    stack = [Op]
    while stack:
        stack += (cls := stack.pop()).__subclasses__()
        found.add(cls.kind if isinstance(cls.kind, str) else cls.__name__)
    return found


@pytest.mark.parametrize("name", target_names())
def test_a_target_names_only_kinds_of_operators_that_exist(name: str) -> None:
    target = load_target(name)
    named = {*target.operators, *(k for rule in target.fuse for k in (*rule.producers, *rule.consumers))}

    assert named <= kinds()
