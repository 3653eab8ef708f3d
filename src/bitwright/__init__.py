"""Bitwright takes a trained float network to fixed-point hardware and keeps its accuracy.

    import bitwright as bw
    result = bw.tune("model.onnx", "calibration_images/", output="out")

The public names are listed in `__all__`; each is imported when it is first used, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitwright.version import __version__ as __version__

if TYPE_CHECKING:
    from bitwright.calibrate.collect import collect as collect
    from bitwright.calibrate.solve import Solver as Solver
    from bitwright.calibrate.statistics import Statistics as Statistics
    from bitwright.data import Dataset as Dataset
    from bitwright.data import ImageOptions as ImageOptions
    from bitwright.data import open_data as open_data
    from bitwright.errors import BitwrightError as BitwrightError
    from bitwright.exporters.onnx_float import export_float as export_float
    from bitwright.exporters.onnx_qdq import export_qdq as export_qdq
    from bitwright.flow.calibration import run_calibration as run_calibration
    from bitwright.flow.joint import run_joint as run_joint
    from bitwright.flow.search import run_mixed as run_mixed
    from bitwright.flow.search import run_sensitivity as run_sensitivity
    from bitwright.flow.settings import Settings as Settings
    from bitwright.flow.tune import tune as tune
    from bitwright.graph.graph import Graph as Graph
    from bitwright.graph.replay import Replay as Replay
    from bitwright.importers.from_onnx import load_onnx as load_onnx
    from bitwright.importers.from_torch import capture as capture
    from bitwright.plan.assign import assign as assign
    from bitwright.plan.plan import Plan as Plan
    from bitwright.plan.reads import quantized_reads as quantized_reads
    from bitwright.plan.target import Target as Target
    from bitwright.plan.target import load_target as load_target
    from bitwright.rewrite.decompose_attention import decompose_attention as decompose_attention
    from bitwright.rewrite.fold_batchnorm import fold_batchnorm as fold_batchnorm
    from bitwright.runtime.session import Session as Session
    from bitwright.runtime.verify import verify as verify
    from bitwright.search.error_sketch import ErrorSketch as ErrorSketch
    from bitwright.search.evaluator import Evaluator as Evaluator
    from bitwright.search.interactions import explain as explain
    from bitwright.search.mixed_precision import search_mixed_precision as search_mixed_precision
    from bitwright.search.sensitivity import candidate_reads as candidate_reads
    from bitwright.search.sensitivity import measure_sensitivity as measure_sensitivity
    from bitwright.search.similarity import Similarity as Similarity
    from bitwright.search.sketched import sketch_sensitivity as sketch_sensitivity
    from bitwright.search.thresholds import joint_thresholds as joint_thresholds

_HOMES = {
    "BitwrightError": "errors",
    "Dataset": "data",
    "ErrorSketch": "search.error_sketch",
    "Evaluator": "search.evaluator",
    "Graph": "graph.graph",
    "ImageOptions": "data",
    "Plan": "plan.plan",
    "Replay": "graph.replay",
    "Session": "runtime.session",
    "Settings": "flow.settings",
    "Similarity": "search.similarity",
    "Solver": "calibrate.solve",
    "Statistics": "calibrate.statistics",
    "Target": "plan.target",
    "assign": "plan.assign",
    "candidate_reads": "search.sensitivity",
    "capture": "importers.from_torch",
    "collect": "calibrate.collect",
    "decompose_attention": "rewrite.decompose_attention",
    "explain": "search.interactions",
    "export_float": "exporters.onnx_float",
    "export_qdq": "exporters.onnx_qdq",
    "fold_batchnorm": "rewrite.fold_batchnorm",
    "joint_thresholds": "search.thresholds",
    "load_onnx": "importers.from_onnx",
    "load_target": "plan.target",
    "measure_sensitivity": "search.sensitivity",
    "open_data": "data",
    "quantized_reads": "plan.reads",
    "run_calibration": "flow.calibration",
    "run_joint": "flow.joint",
    "run_mixed": "flow.search",
    "run_sensitivity": "flow.search",
    "search_mixed_precision": "search.mixed_precision",
    "sketch_sensitivity": "search.sketched",
    "tune": "flow.tune",
    "verify": "runtime.verify",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    return getattr(import_module(f"bitwright.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
