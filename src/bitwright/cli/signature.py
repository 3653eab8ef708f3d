"""Flags declared once: a verb takes dataclasses of flags, the command line sees their fields."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def flat(verb: Callable[..., int]) -> Callable[..., int]:
    """*verb* with every parameter that is annotated with a dataclass replaced by that dataclass' fields.

    Typer reads the signature of the result; called with the fields as keywords, it builds the dataclasses and calls *verb*.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, Any] = {}
    for p in inspect.signature(verb).parameters.values():
        if is_dataclass(hints[p.name]):
            bundles[p.name] = hints[p.name]
            parameters += _parameters(hints[p.name])
        else:
            parameters.append(p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(verb)
    def run(**flags: Any) -> int:
        made = {
            name: bundle(**{f.name: flags.pop(f.name) for f in fields(bundle)})
            for name, bundle in bundles.items()
        }
        return verb(**flags, **made)

    run.__annotations__ = {p.name: p.annotation for p in parameters}
    # mypy: functions have no declared __signature__, though inspect reads it.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters(bundle: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name]
        )
        for f in fields(bundle)
    ]


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
