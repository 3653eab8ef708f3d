"""Reading a PyTorch model given as `file.py:function` or `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitwright.errors import ModelError, explained
from bitwright.train.checkpoint import EXTRA


def import_object(spec: str, flag: str) -> Any:
    """The object named by `file.py:name` or `module:name`. *raises* `ModelError`, naming *flag*, with the cause."""
    place, _, name = spec.rpartition(":")
    with explained(
        ModelError,
        f"{flag} {spec}",
        expected="file.py:name or module:name that can be imported",
        remedy="Check the path and the name.",
    ):
        module = _load_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        return getattr(module, name)


def source_text(spec: str) -> str:
    """*spec*, and the text of its file if it names one: what a saved search depends on."""
    path = Path(spec.rpartition(":")[0])
    return f"{spec}\n{path.read_text(encoding='utf-8', errors='replace') if path.suffix == '.py' else ''}"


def import_model(spec: str) -> tuple[str, nn.Module, Any]:
    """Calls the function *spec*: a name for files, the module, and its example inputs."""
    function = import_object(spec, "model")
    expected = "a function that returns (module, example inputs)"
    with explained(ModelError, f"model {spec}", expected=expected, remedy="Mend the function."):
        result = function()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise ModelError(
            f"model {spec}",
            expected="a function that returns (torch.nn.Module, example inputs)",
            found=type(result).__name__,
            remedy="Return the module in eval mode together with one batch that it accepts.",
        )
    return spec.rpartition(":")[2], result[0], result[1]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in *path*: .safetensors, or .pt/.pth, also inside `state_dict` or `model`. *raises* `ModelError`."""
    from_safetensors = path.suffix == ".safetensors"
    try:
        state = (
            load_file(path) if from_safetensors else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as e:  # neither reader has an exception of its own for all it may meet
        raise ModelError(
            str(path),
            expected="weights in .safetensors, or a state dict in .pt/.pth",
            found=" ".join(str(e).split())[:200],
            remedy="Save model.state_dict().",
        ) from e
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    odd = next((x for x in state.items() if not _is_entry(*x)), None) if isinstance(state, dict) else state
    if odd is not None:
        raise ModelError(
            str(path),
            expected="a state dict: a tensor for each name",
            found=f"{odd[0]!r}: {type(odd[1]).__name__}" if isinstance(odd, tuple) else type(odd).__name__,
            remedy="Save model.state_dict().",
        )
    _allow_missing_counters(state)
    return state


def _allow_missing_counters(state: dict[str, Tensor]) -> None:
    """Batch norms without a counter are taken, as from before torch counted batches."""
    for path, facts in getattr(state, "_metadata", {}).items():
        prefix = f"{path}." if path else ""
        if f"{prefix}running_mean" in state and f"{prefix}num_batches_tracked" not in state:
            facts["version"] = None


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith(EXTRA))


def _load_module(path: Path) -> ModuleType:
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()) and path.exists():
        return known  # what is sent to other processes is found there by the module's name
    path = path.resolve()
    loader = importlib.util.spec_from_file_location(path.stem, path)
    if loader is None or loader.loader is None or not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(loader)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    loader.loader.exec_module(module)
    return module
