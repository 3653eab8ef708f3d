"""`Plan`: what was decided for every value and operator, and why. Immutable, diffable, a JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bitwright.errors import PlanError, UnknownName
from bitwright.files import write_text
from bitwright.numerics.spec import QParams
from bitwright.numerics.table_settings import TableSettings
from bitwright.plan.target import PRECISIONS, Precision

FORMAT = "bitwright-plan/1"
#: The method of values whose parameters were learned, or followed by an observer: no statistics give them again.
LEARNED = "observer"
ValueRole = Literal["activation", "weight", "bias", "constant"]


@dataclass(frozen=True)
class ValueEntry:
    """The decision for one value. *same_as*: shares that value's parameters. *qparams* None: not solved yet, or not
    quantized, for the reason in *why*."""

    role: ValueRole
    method: str
    same_as: str | None = None
    qparams: QParams | None = None
    why: str = ""


@dataclass(frozen=True)
class OpEntry:
    """The decision for one operator. *quantizable*: it computes real numbers that a target might quantize.

    *table*: how its look-up table is made, if it is one and not made by default.
    """

    kind: str
    group: str
    precision: Precision
    quantizable: bool = True
    why: str = ""
    table: TableSettings | None = None


@dataclass(frozen=True)
class Plan:
    """Decisions by value name and operator name. A value without an entry stays in the accumulator."""

    target: str
    values: Mapping[str, ValueEntry]
    ops: Mapping[str, OpEntry]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group name -> its operators in execution order, of groups that hold a quantizable operator."""
        found: dict[str, list[str]] = {}
        for name, entry in self.ops.items():
            if entry.quantizable:
                found.setdefault(entry.group, []).append(name)
        return found

    def precision(self, group: str) -> Precision:
        """The precision of a group. *raises* `UnknownName`."""
        groups = self.groups
        if group not in groups:
            raise UnknownName("plan", kind="operator group", name=group, known=groups)
        return self.ops[groups[group][0]].precision

    def with_precision(self, groups: Iterable[str], precision: Precision, why: str) -> Plan:
        """A plan in which the *groups* have *precision*. Parameters must be solved again if widths change."""
        chosen = set(groups)
        ops = {
            name: replace(e, precision=precision, why=why) if e.quantizable and e.group in chosen else e
            for name, e in self.ops.items()
        }
        return replace(self, ops=ops)

    def with_tables(self, tables: Mapping[str, TableSettings]) -> Plan:
        """A plan in which the tables of these operators are made so. *raises* `UnknownName`."""
        for name in tables:
            if name not in self.ops:
                raise UnknownName("plan", kind="operator", name=name, known=self.ops)
        return replace(self, ops={n: replace(e, table=tables.get(n, e.table)) for n, e in self.ops.items()})

    def with_methods(self, methods: Mapping[str, str]) -> Plan:
        """A plan in which the given activation values take their thresholds by these methods (not solved yet)."""
        values = {n: replace(e, method=methods.get(n, e.method)) for n, e in self.values.items()}
        return replace(self, values=values)

    def qparams(self, value: str) -> QParams | None:
        """The parameters of *value*, None if it has no entry or none are decided."""
        entry = self.values.get(value)
        return None if entry is None else entry.qparams

    @property
    def float_groups(self) -> list[str]:
        """Groups that are float, in execution order."""
        return [g for g, ops in self.groups.items() if self.ops[ops[0]].precision == "float"]

    @property
    def refusals(self) -> dict[str, str]:
        """Operators that are float because the target does not grant what was asked: name -> reason."""
        return {n: e.why for n, e in self.ops.items() if e.precision == "float" and e.why and e.quantizable}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the plan computes: plans that differ in the reasons of operators alone have the same."""
        data = self.to_json()
        data["ops"] = {n: {k: v for k, v in e.items() if k != "why"} for n, e in data["ops"].items()}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {
            "format": FORMAT,
            "target": self.target,
            "ops": {
                n: {**vars(e), "table": None if e.table is None else e.table.to_json()}
                for n, e in self.ops.items()
            },
            "values": {
                n: {**vars(e), "qparams": None if e.qparams is None else e.qparams.to_json()}
                for n, e in self.values.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "plan") -> Plan:
        """Inverse of `to_json`. *raises* `PlanError` if the data is not a plan of this format."""
        try:
            if data["format"] != FORMAT:
                raise PlanError(
                    where,
                    expected=f"format {FORMAT}",
                    found=repr(data["format"]),
                    remedy="Write the plan again with this version.",
                )
            values = {
                n: ValueEntry(**{**e, "qparams": QParams.from_json(e["qparams"]) if e["qparams"] else None})
                for n, e in data["values"].items()
            }
            ops = {n: _op_entry(e) for n, e in data["ops"].items()}
            return cls(str(data["target"]), values, ops)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise PlanError(
                where,
                expected="a plan written by bitwright",
                found=f"{type(e).__name__}: {e}",
                remedy="Write the plan again.",
            ) from e

    def save(self, path: Path) -> None:
        """Write the plan as JSON. *raises* `OutputError`."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan. *raises* `PlanError` for a file that is missing or no plan."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise PlanError(
                str(path), expected="a plan in JSON", found=str(e), remedy="Check the path."
            ) from e
        return cls.from_json(data, str(path))


def _op_entry(data: Mapping[str, Any]) -> OpEntry:
    table = TableSettings.from_json(data["table"]) if data.get("table") else None
    return OpEntry(**{**data, "precision": _precision(data["precision"]), "table": table})


def _precision(name: str) -> Precision:
    if name not in PRECISIONS:
        raise UnknownName("plan", kind="precision", name=name, known=PRECISIONS)
    return name
