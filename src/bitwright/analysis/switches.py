"""What single quantizers, or single tables, do to the outputs: one switched on, all others off."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bitwright.analysis.trace import kind_of, operator_at
from bitwright.errors import ModelError
from bitwright.graph.op import Op
from bitwright.ops.table import TableOp
from bitwright.train.fake_quants import Quantizer
from bitwright.train.prepared import PreparedModel
from bitwright.train.states import FakeQuantState

Kind = Literal["activation", "weight", "table"]


@dataclass(frozen=True)
class Switch:
    """Something that costs accuracy and can be turned off. *name*: as reports call it. *path*: the module that then computes
    something else. *op*: the operator it belongs to; None for an input of the model. *dtype*: of its codes.
    """

    name: str
    path: str
    kind: Kind
    op: Op | None
    dtype: str

    @property
    def op_type(self) -> str:
        """The operator's kind."""
        return kind_of(self.op)


def switches_of(model: PreparedModel) -> list[Switch]:
    """The tables of *model* that are in use, if it has any; else its quantizers that quantize. *raises* `ModelError` if neither."""
    called = dict.fromkeys(str(n.target) for n in model.graph.nodes if n.op == "call_module")
    modules = {path: model.get_submodule(path) for path in called}
    found = [s for path, module in modules.items() if (s := _table(path, module))]
    found = found or [s for path, module in modules.items() if (s := _quantizer(model, path, module))]
    if not found:
        raise ModelError(
            "sensitivity",
            expected="quantizers or tables in use",
            found="none",
            remedy="Calibrate the analysed model, and set_fake_quantize(model, FakeQuantState.VALIDATION).",
        )
    return found


def _table(path: str, module: nn.Module) -> Switch | None:
    if not isinstance(module, TableOp) or not module.quantized_forward:
        return None
    dtype = module.table.q_out.spec.dtype.name
    return Switch(f"{path}.{module.table_path}", path, "table", module, dtype)


def _quantizer(model: PreparedModel, path: str, module: nn.Module) -> Switch | None:
    if not isinstance(module, Quantizer) or not (module.state.quantizes and module.has_range):
        return None
    owner = path.rpartition(".")[0]
    kind: Kind = "weight" if module.is_weight else "activation"
    return Switch(owner, path, kind, operator_at(model, owner), module.spec.dtype.name)


@contextmanager
def switched(model: PreparedModel, switches: Collection[Switch], on: bool) -> Iterator[None]:
    """Within, all of *switches* are on, or off; they are as before afterwards."""
    modules = [(model.get_submodule(s.path), _STATES[s.kind][on]) for s in switches]
    before = [(module, _state(module)) for module, _ in modules]
    try:
        for module, state in modules:
            _set(module, state)
        yield
    finally:
        for module, state in before:
            _set(module, state)


_QUANTIZER_STATES = (FakeQuantState.FLOAT, FakeQuantState.VALIDATION)
#: Off, on.
_STATES: Mapping[Kind, tuple[Any, Any]] = {
    "activation": _QUANTIZER_STATES,
    "weight": _QUANTIZER_STATES,
    "table": (False, True),
}


def _state(module: nn.Module) -> Any:
    return module.state if isinstance(module, Quantizer) else module.quantized_forward


def _set(module: nn.Module, state: Any) -> None:
    if isinstance(module, Quantizer):
        module.state = state
    elif isinstance(module, TableOp):
        module.quantized_forward = state
