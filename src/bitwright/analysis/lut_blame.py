"""Which look-up tables lose accuracy: put back to float one after another, until the score recovers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

#: The score has recovered when this share of what the tables lost is back.
RECOVERED = 0.9

#: The score (more is better) of the network with these tables put back to float, all others in fixed point.
Score = Callable[[Collection[str]], float]


@dataclass(frozen=True)
class Blame:
    """*steps*: (table, score with it and all before it in float). *guilty*: those of them that it takes to recover.

    *recovered*: whether the score did, with the guilty ones in float.
    """

    steps: tuple[tuple[str, float], ...]
    guilty: tuple[str, ...]
    recovered: bool


def recovered_at(fixed: float, floating: float) -> float:
    """The score at which `RECOVERED` of the way from *fixed* to *floating* is made. From NaN on it takes all of it."""
    return floating if math.isnan(fixed) else fixed + RECOVERED * (floating - fixed)


def put_back(order: Sequence[str], score: Score, *, fixed: float, floating: float) -> Blame:
    """Put tables back in *order*, the most suspicious first, until the score has recovered; then try each of them in fixed point
    again, the last first, and acquit those without which it stays so.

    *fixed*, *floating*: the score with all tables in fixed point and with none.
    """
    enough = recovered_at(fixed, floating)
    steps: list[tuple[str, float]] = []
    found = fixed
    for count in range(1, len(order) + 1):
        if found >= enough:
            break
        found = score(order[:count])
        steps.append((order[count - 1], found))
    suspects = [name for name, _ in steps]
    if not found >= enough:  # as NaN is not
        return Blame(tuple(steps), tuple(suspects), False)
    for name in reversed(suspects[:-1]):
        others = [s for s in suspects if s != name]
        if score(others) >= enough:
            suspects = others
    return Blame(tuple(steps), tuple(suspects), True)
