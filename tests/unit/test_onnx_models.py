"""Real ONNX models: loaded, and equal to ONNX Runtime at two batch sizes."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx_cases import assert_equals_reference, kinds

from bitwright.errors import ModelError
from bitwright.importers.from_onnx import load_onnx

SHARED = Path(os.environ.get("BITWRIGHT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "models"

# --- real models ---------------------------------------------------------------------------------------------

MODELS = {
    "mobilenetv2_torchvision": 99,
    "cifar10_resnet20": 55,
    "cifar10_cct_small": 148,
    "kwt1_fsdd10": 421,
    "kws_dscnn": 21,
    "yolox_nano_416": 369,
    "dtln_1": 36,
    "dtln_2": 78,
    "ultraface_rfb320": 165,
    "magika_v3_3": 89,
}


def shared(name: str) -> Path:
    path = SHARED / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"needs the development model {name}.onnx (BITWRIGHT_DATA or ../shared/data)")
    return path


@pytest.mark.shared
@pytest.mark.parametrize("name", MODELS)
def test_real_model_equals_onnx_runtime(name: str) -> None:
    path = shared(name)
    torch.set_num_threads(1)
    graph = load_onnx(path)
    assert len(graph.op_names) == MODELS[name]
    model = onnx.load(path)
    nodes = {n.name or n.output[0] for n in model.graph.node}
    assert set(graph.op_names) <= nodes | {
        f"{n}.{part}" for n in nodes for part in ("flat", "shape", "unflat")
    }
    # Differences of large numbers inside magika amplify rounding a thousandfold.
    tolerance = 1e-2 if name == "magika_v3_3" else 1e-4
    for batch in (1, 3) if graph.info.dynamic_batch else (1,):
        assert_equals_reference(graph, model, batch, tolerance)


@pytest.mark.shared
def test_real_model_with_branches_is_loaded_for_given_shapes() -> None:
    path = shared("silero_vad_16k_op15")
    with pytest.raises(ModelError, match="input_shapes"):
        load_onnx(path)
    graph = load_onnx(path, input_shapes={"input": [1, 576], "state": [2, 1, 128]})
    assert {"LSTM", "Conv", "Sigmoid"} <= set(kinds(graph))
    assert "/model/decoder/rnn/LSTM" in graph.op_names
