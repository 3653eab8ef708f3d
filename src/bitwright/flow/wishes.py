"""Who asked for what: one wish per operator, from attributes and setters, and what its group gets."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bitwright.errors import PlanError, UnknownName, explained
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op
from bitwright.plan.plan import Plan
from bitwright.plan.qconfig import (
    FakeQuantConfig,
    ModuleNameQconfigSetter,
    QConfig,
    QconfigSetter,
    SensitiveOpsQconfigSetter,
    Unset,
    is_inside,
)
from bitwright.table import Column, Table

#: An attribute beats every setter, however long the names are.
_ATTRIBUTE = 10_000


@dataclass(frozen=True)
class Choice:
    """The wish for one operator, and who made it. *closeness*: the larger, the more closely it names the operator."""

    qconfig: QConfig | None
    rule: str
    closeness: int = 0


def attributes_of(model: object) -> dict[str, QConfig | None]:
    """Module path -> its `qconfig` attribute, where it has one. *raises* `PlanError` for one of another kind."""
    if not isinstance(model, nn.Module):
        return {}
    found = {path: vars(m)["qconfig"] for path, m in model.named_modules() if "qconfig" in vars(m)}
    for path, qconfig in found.items():
        if not isinstance(qconfig, (QConfig, type(None))):
            raise PlanError(
                f"{path or type(model).__name__}.qconfig",
                expected="a bitwright QConfig (get_default_qconfig(...)), or None for float",
                found=f"{type(qconfig).__module__}.{type(qconfig).__name__}",
                remedy="Set one made by bitwright.get_default_qconfig.",
            )
    return found


def choose(
    folded: Graph,
    attributes: Mapping[str, QConfig | None],
    setters: Sequence[QconfigSetter],
    only_training: Collection[str] = (),
) -> dict[str, Choice]:
    """The wish for every operator of *folded*. *only_training*: operators that only training computes, which are float in any case.

    *raises* `UnknownName`, `PlanError` for names of setters without effect.
    """
    _check_names(folded, setters, only_training)
    idle = [path for path in attributes if not any(is_inside(name, path) for name in folded.op_names)]
    idle = [p for p in idle if attributes[p] or not any(is_inside(name, p) for name in only_training)]
    if idle:
        warnings.warn(
            f"prepare: the qconfig of {', '.join(idle)} has no effect: no operator of its own is computed there"
            " (a batch normalisation is part of the operator before it)",
            stacklevel=3,
        )
    return {op.name: _choice(op, attributes, setters) for op in folded.ops}


def _choice(op: Op, attributes: Mapping[str, QConfig | None], setters: Sequence[QconfigSetter]) -> Choice:
    around = [path for path in attributes if is_inside(op.name, path)]
    if around:
        path = max(around, key=len)
        return Choice(attributes[path], f"{path or 'model'}.qconfig", _ATTRIBUTE + len(path))
    for setter in setters:
        name = _listed(op, setter)
        answer = _answer(setter, name, op.author_kind)
        if not isinstance(answer, Unset):
            named = isinstance(setter, (ModuleNameQconfigSetter, SensitiveOpsQconfigSetter))
            return Choice(answer, str(setter), setter.closeness(name) if named else 0)  # type: ignore[attr-defined]
    return Choice(None, "no setter and no qconfig attribute")


def _answer(setter: QconfigSetter, name: str, kind: str) -> QConfig | Unset | None:
    """What *setter*, which may be the user's, says. *raises* `PlanError` for whatever it raises or else returns."""
    with explained(
        PlanError,
        f"setter {setter}, operator {name}",
        expected="a function of (name, kind)",
        remedy="Mend it; it returns a QConfig, None for float, or bitwright.UNSET to leave it to the next setter.",
    ):
        answer = setter(name, kind)
    if not isinstance(answer, (QConfig, Unset, type(None))):
        raise PlanError(
            f"setter {setter}, operator {name}",
            expected="a QConfig (get_default_qconfig(...)), None for float, or bitwright.UNSET",
            found=repr(answer)[:60],
            remedy="Return one of these.",
        )
    return answer


def _listed(op: Op, setter: QconfigSetter) -> str:
    """The name by which *setter* knows *op*: where that is not its own, of the whole operator that it is a part of."""
    if isinstance(setter, SensitiveOpsQconfigSetter) and op.composite is not None:
        return next((n for n in (op.name, op.composite.name) if n in setter.names), op.name)
    return op.name


def _check_names(folded: Graph, setters: Sequence[QconfigSetter], only_training: Collection[str]) -> None:
    norms = {pair.batchnorm: pair.conv for pair in folded.info.folded}
    for setter in setters:
        if isinstance(setter, SensitiveOpsQconfigSetter):
            _check_listed(
                setter, [*folded.op_names, *(op.composite.name for op in folded.ops if op.composite)]
            )
        if not isinstance(setter, ModuleNameQconfigSetter):
            continue
        for name in setter.unmatched(folded.op_names):
            if any(is_inside(op, name) for op in only_training):
                if setter.qconfigs[name] is not None:
                    warnings.warn(
                        f"prepare: {name} is computed in training alone, and stays float", stacklevel=4
                    )
                continue
            if name in norms:
                raise PlanError(
                    f"ModuleNameQconfigSetter, {name!r}",
                    expected="an operator with quantized values of its own",
                    found=f"a batch normalisation that the chip computes as part of {norms[name]!r}",
                    remedy=f"Name {norms[name]!r} instead.",
                )
            modules = {
                ".".join(n.split(".")[: i + 1]) for n in folded.op_names for i in range(n.count(".") + 1)
            }
            raise UnknownName("ModuleNameQconfigSetter", kind="operator or module", name=name, known=modules)


def _check_listed(setter: SensitiveOpsQconfigSetter, known: Sequence[str]) -> None:
    strange = sorted(setter.names - set(known))
    if strange:
        raise UnknownName(f"sensitivity table of {setter}", kind="operator", name=strange[0], known=known)


def granted(plan: Plan, choices: Mapping[str, Choice]) -> dict[str, QConfig]:
    """What every quantized operator gets: in a group, the wish that names a member most closely, else that of its first operator
    with weights.
    """
    members: dict[str, list[str]] = {}
    for name, entry in plan.ops.items():
        members.setdefault(entry.group, []).append(name)
    found: dict[str, QConfig] = {}
    for group, names in members.items():
        first = [group, *(n for n in names if n != group)]
        wished = [(choices[n].closeness, choices[n].qconfig) for n in first if n in choices]
        asked = [(closeness, q) for closeness, q in wished if q is not None]
        if asked:
            best = max(asked, key=lambda pair: pair[0])[1]
            found.update({n: best for n in names if plan.ops[n].precision != "float"})
    return found


_COLUMNS = (
    Column("name", "operator"),
    Column("kind", "kind"),
    Column("asked", "asked"),
    Column("precision", "got"),
    Column("activation", "activation"),
    Column("weight", "weight"),
    Column("rule", "rule"),
    Column("why", "reason"),
)


def report_of(folded: Graph, plan: Plan, choices: Mapping[str, Choice], got: Mapping[str, QConfig]) -> Table:
    """What each operator asked for, what it *got* (`granted`), by which rule, and why it differs."""
    weighted = {
        r.op for v in folded.values.values() if v.is_constant for r in v.readers if r.role == "weight"
    }
    rows = []
    for name, entry in plan.ops.items():
        choice, qconfig = choices[name], got.get(name)
        rows.append(
            {
                "name": name,
                "kind": entry.kind,
                "asked": "float" if choice.qconfig is None else choice.qconfig.precision,
                "precision": entry.precision,
                "activation": None if qconfig is None else _described(qconfig.activation),
                "weight": _described(qconfig.weight) if qconfig is not None and name in weighted else None,
                "rule": choice.rule,
                "why": entry.why,
            }
        )
    return Table("What each operator got", _COLUMNS, tuple(rows))


def _described(config: FakeQuantConfig) -> str:
    options = ", ".join(f"{k}={v}" for k, v in config.options.items())
    return f"{config.fake_quant}, {config.observer}" + (f" ({options})" if options else "")
