"""Finding guilty tables, on scores that are known."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest

from bitwright.analysis.lut_blame import put_back

LOST = {"exp": 0.001, "rsqrt": 0.08, "log": 0.0, "tanh": 0.02}


def score(floating: Collection[str]) -> float:
    return 0.9 - sum(loss for name, loss in LOST.items() if name not in floating)


def blamed(order: list[str]) -> tuple[str, ...]:
    return put_back(order, score, fixed=score([]), floating=score(LOST)).guilty


def test_the_guilty_ones_are_named_whatever_the_order() -> None:
    assert blamed(["rsqrt", "tanh", "exp", "log"]) == ("rsqrt", "tanh")
    assert blamed(["log", "exp", "tanh", "rsqrt"]) == ("tanh", "rsqrt")


def test_the_walk_stops_when_the_score_is_back() -> None:
    blame = put_back(["rsqrt", "tanh", "exp"], score, fixed=score([]), floating=score(LOST))

    assert [name for name, _ in blame.steps] == ["rsqrt", "tanh"]
    assert blame.recovered
    assert blame.steps[-1][1] == pytest.approx(0.899)


def test_nobody_is_guilty_where_nothing_was_lost() -> None:
    blame = put_back(["a", "b"], lambda _: 0.9, fixed=0.9, floating=0.9)

    assert blame.steps == blame.guilty == ()
    assert blame.recovered


def test_a_score_that_never_recovers_is_said() -> None:
    blame = put_back(["exp", "log"], score, fixed=score([]), floating=0.9)

    assert not blame.recovered
    assert blame.guilty == ("exp", "log")


def test_the_last_to_be_put_back_is_what_it_took_and_is_not_tried_again() -> None:
    tried: list[tuple[str, ...]] = []

    def counted(floating: Collection[str]) -> float:
        tried.append(tuple(floating))
        return score(floating)

    put_back(["log", "rsqrt", "tanh"], counted, fixed=score([]), floating=score(LOST))

    assert ("log", "rsqrt") in tried  # the walk itself
    assert tried.count(("log", "rsqrt")) == 1


def test_a_score_that_is_no_number_is_neither_recovered_nor_acquitted() -> None:
    """Every comparison with NaN is false: nothing seemed lost, and all were acquitted."""
    spoilt = put_back(
        ["exp", "log"], lambda back: 0.9 if "log" in back else math.nan, fixed=math.nan, floating=0.9
    )
    hopeless = put_back(["exp", "log"], lambda _: math.nan, fixed=0.5, floating=0.9)

    assert (spoilt.guilty, spoilt.recovered) == (("log",), True)
    assert (hopeless.guilty, hopeless.recovered) == (("exp", "log"), False)
