"""`Session`: one ONNX model in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from bitwright.errors import ModelError

#: `disabled`: the nodes of the file, one by one. `default`: what ONNX Runtime makes of it unless told otherwise.
Optimisation = Literal["disabled", "default"]

_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "default": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
#: ONNX Runtime's log stays silent: what goes wrong is raised.
_FATAL_ONLY = 4


class Session:
    """A model that is loaded and ready to run.

    *model*: a `ModelProto`, its bytes, or a path. *threads*: for one operator; 0 lets ONNX Runtime choose.
    *raises* `ModelError` if ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes | Path,
        *,
        optimisation: Optimisation = "default",
        threads: int = 0,
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = _LEVELS[optimisation]
        options.intra_op_num_threads = threads
        options.log_severity_level = _FATAL_ONLY
        # Planning which buffers to share takes ONNX Runtime half a minute for a graph of 6000 nodes; freed ones are used again anyway.
        options.enable_mem_reuse = False
        # Without this, x86 processors that lack VNNI may saturate sums of two 8-bit products at 16 bits.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self.where = str(model) if isinstance(model, Path) else "the exported model"
        self.optimisation = optimisation
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        try:
            self._session = ort.InferenceSession(
                str(source) if isinstance(source, Path) else source,
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as e:  # ONNX Runtime's exceptions have no common base of their own
            raise ModelError(
                self.where,
                expected=f"a model that ONNX Runtime {ort.__version__} loads",
                found=_first_line(e),
                remedy="Check the model with onnx.checker, or update onnxruntime.",
            ) from e
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    def run(
        self, inputs: Mapping[str, Tensor | npt.NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Execute once. *inputs*: by name; further names are ignored. *outputs*: which ones to return (default: all).

        *raises* `ModelError` for a missing input or one that the model refuses.
        """
        if missing := [name for name in self.inputs if name not in inputs]:
            raise ModelError(
                self.where,
                expected=f"the inputs {', '.join(self.inputs)}",
                found=f"no {', '.join(missing)}",
                remedy="Name the data after the model's inputs.",
            )
        wanted = list(self.outputs if outputs is None else outputs)
        try:
            found = self._session.run(wanted, {name: _array(inputs[name]) for name in self.inputs})
        except Exception as e:  # as above
            raise ModelError(
                self.where,
                expected="inputs that the model runs on",
                found=_first_line(e),
                remedy="Check the shapes and types of the data.",
            ) from e
        return {name: np.asarray(x) for name, x in zip(wanted, found, strict=True)}

    def tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `run`, with all outputs as tensors on the device of the inputs."""
        device = next(iter(inputs.values())).device
        return {name: torch.from_numpy(x).to(device) for name, x in self.run(inputs).items()}


def _array(x: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
