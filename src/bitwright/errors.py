"""Every error that a user can meet, on one screen.

    BitwrightError
     ├─ ModelError      a model cannot be read, captured, checked or exported
     ├─ DataError       calibration or evaluation data is missing, unreadable or unusable
     ├─ PlanError       a plan cannot be decided, read or applied
     ├─ TargetError     a target file is wrong, or a target does not allow what was asked
     ├─ NumericsError   a range, scale, table or overflow rule is violated
     ├─ ProofError      simulation and engine disagree by more than the rule of docs/numerics.md
     ├─ JobError        work in another process or on a cluster was lost, or could not begin
     ├─ OutputError     results cannot be written
     ├─ UnknownName     a name (operator, method, target, …) that does not exist
     └─ MissingExtra    an optional dependency is not installed

A message has four parts: where, what was expected, what was found, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class BitwrightError(Exception):
    """Base of all errors raised for bad input; the command line prints it on one line and exits with status 2."""

    def __init__(self, where: str, *, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"{where}: expected {expected}; found {found}. {remedy}")
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy


@contextmanager
def explained(kind: type[BitwrightError], where: str, *, expected: str, remedy: str) -> Iterator[None]:
    """Turns whatever code that is not ours raises inside into *kind*, its message being what was found.

    Our own errors stay, and so does want of memory.
    """
    try:
        yield
    except BitwrightError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        found = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise kind(where, expected=expected, found=found, remedy=remedy) from e


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of which torch on a CPU says so only in words."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


class ModelError(BitwrightError):
    """A model cannot be read, captured, checked or exported."""


class DataError(BitwrightError):
    """Calibration or evaluation data is missing, unreadable or unusable."""


class PlanError(BitwrightError):
    """A plan cannot be decided, read or applied."""


class TargetError(BitwrightError):
    """A target file is wrong, or a target does not allow what was asked."""


class NumericsError(BitwrightError):
    """A range, scale, table or overflow rule is violated."""


class ProofError(BitwrightError):
    """Simulation and engine disagree by more than docs/numerics.md allows."""


class JobError(BitwrightError):
    """Work in another process or on a cluster was lost, or could not begin."""


class OutputError(BitwrightError):
    """Results cannot be written."""


class UnknownName(BitwrightError):
    """A name that does not exist; the message lists the nearest or all valid ones."""

    def __init__(self, where: str, *, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        listed = names if len(names) <= 12 else (near or names[:12])
        remedy = f"Did you mean {near[0]!r}?" if near else "Choose one of the names listed."
        more = "" if len(listed) == len(names) else f" … ({len(names)} in all)"
        super().__init__(
            where, expected=f"a known {kind} ({', '.join(listed)}{more})", found=repr(name), remedy=remedy
        )


class MissingExtra(BitwrightError):
    """An optional dependency is not installed."""

    def __init__(self, where: str, *, package: str, extra: str) -> None:
        super().__init__(
            where,
            expected=f"the package {package!r}",
            found="it is not installed",
            remedy=f"Install it with: pip install 'bitwright[{extra}]'.",
        )
