"""Bitwright takes a trained float network to fixed-point hardware and keeps its accuracy.

    import bitwright as bw
    result = bw.tune("model.onnx", "calibration_images/", output="out")

The public names are listed in `__all__`; each is imported when it is first used, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitwright.version import __version__ as __version__

if TYPE_CHECKING:
    from bitwright.analysis.profiler import ModelProfiler as ModelProfiler
    from bitwright.analysis.quant_analysis import QuantAnalysis as QuantAnalysis
    from bitwright.calibrate.collect import collect as collect
    from bitwright.calibrate.solve import Solver as Solver
    from bitwright.calibrate.statistics import Statistics as Statistics
    from bitwright.data import Dataset as Dataset
    from bitwright.data import ImageOptions as ImageOptions
    from bitwright.data import open_data as open_data
    from bitwright.errors import BitwrightError as BitwrightError
    from bitwright.exporters.integer import export_integer as export_integer
    from bitwright.exporters.integer import lower as lower
    from bitwright.exporters.onnx_float import export_float as export_float
    from bitwright.exporters.onnx_qdq import export_qdq as export_qdq
    from bitwright.flow.calibration import run_calibration as run_calibration
    from bitwright.flow.convert import QuantizedModel as QuantizedModel
    from bitwright.flow.convert import convert as convert
    from bitwright.flow.export import export as export
    from bitwright.flow.joint import run_joint as run_joint
    from bitwright.flow.luts import run_luts as run_luts
    from bitwright.flow.prepare import prepare as prepare
    from bitwright.flow.quantize import run_quantize as run_quantize
    from bitwright.flow.search import run_mixed as run_mixed
    from bitwright.flow.search import run_sensitivity as run_sensitivity
    from bitwright.flow.settings import Settings as Settings
    from bitwright.flow.tables import build_tables as build_tables
    from bitwright.flow.tune import tune as tune
    from bitwright.flow.verification import run_verify as run_verify
    from bitwright.graph.graph import Graph as Graph
    from bitwright.graph.replay import Replay as Replay
    from bitwright.importers.from_onnx import load_onnx as load_onnx
    from bitwright.importers.from_torch import capture as capture
    from bitwright.numerics.lut import TableSettings as TableSettings
    from bitwright.ops.table import with_tables as with_tables
    from bitwright.plan.assign import assign as assign
    from bitwright.plan.plan import Plan as Plan
    from bitwright.plan.qconfig import UNSET as UNSET
    from bitwright.plan.qconfig import ModuleNameQconfigSetter as ModuleNameQconfigSetter
    from bitwright.plan.qconfig import QConfig as QConfig
    from bitwright.plan.qconfig import get_default_qconfig as get_default_qconfig
    from bitwright.plan.reads import quantized_reads as quantized_reads
    from bitwright.plan.setters import (
        calibration_4bit_weight_8bit_act_qconfig_setter as calibration_4bit_weight_8bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        calibration_8bit_weight_16bit_act_qconfig_setter as calibration_8bit_weight_16bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        default_calibration_qconfig_setter as default_calibration_qconfig_setter,
    )
    from bitwright.plan.setters import (
        default_qat_fixed_act_qconfig_setter as default_qat_fixed_act_qconfig_setter,
    )
    from bitwright.plan.setters import default_qat_qconfig_setter as default_qat_qconfig_setter
    from bitwright.plan.setters import (
        qat_4bit_weight_8bit_act_qconfig_setter as qat_4bit_weight_8bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        qat_4bit_weight_8bit_fixed_act_qconfig_setter as qat_4bit_weight_8bit_fixed_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        qat_8bit_weight_16bit_act_qconfig_setter as qat_8bit_weight_16bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        qat_8bit_weight_16bit_fixed_act_qconfig_setter as qat_8bit_weight_16bit_fixed_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter as sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter as sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter,
    )
    from bitwright.plan.setters import (
        sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter as sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter,
    )
    from bitwright.plan.target import Target as Target
    from bitwright.plan.target import load_target as load_target
    from bitwright.rewrite.decompose_attention import decompose_attention as decompose_attention
    from bitwright.rewrite.decompose_composites import decompose_composites as decompose_composites
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
    from bitwright.train.batchnorm import freeze_batchnorm as freeze_batchnorm
    from bitwright.train.batchnorm import update_batchnorm as update_batchnorm
    from bitwright.train.check import check_qat_model as check_qat_model
    from bitwright.train.control import load_observer_params as load_observer_params
    from bitwright.train.control import reset_scale as reset_scale
    from bitwright.train.control import set_fake_quantize as set_fake_quantize
    from bitwright.train.prepared import PreparedModel as PreparedModel
    from bitwright.train.states import FakeQuantState as FakeQuantState
    from bitwright.train.tables import convert_segment_lut as convert_segment_lut
    from bitwright.train.tables import set_quantized_forward as set_quantized_forward

_HOMES = {
    "BitwrightError": "errors",
    "Dataset": "data",
    "ErrorSketch": "search.error_sketch",
    "Evaluator": "search.evaluator",
    "FakeQuantState": "train.states",
    "Graph": "graph.graph",
    "ImageOptions": "data",
    "ModelProfiler": "analysis.profiler",
    "ModuleNameQconfigSetter": "plan.qconfig",
    "Plan": "plan.plan",
    "PreparedModel": "train.prepared",
    "QConfig": "plan.qconfig",
    "QuantAnalysis": "analysis.quant_analysis",
    "QuantizedModel": "flow.convert",
    "Replay": "graph.replay",
    "Session": "runtime.session",
    "Settings": "flow.settings",
    "Similarity": "search.similarity",
    "Solver": "calibrate.solve",
    "Statistics": "calibrate.statistics",
    "TableSettings": "numerics.lut",
    "Target": "plan.target",
    "UNSET": "plan.qconfig",
    "assign": "plan.assign",
    "build_tables": "flow.tables",
    "calibration_4bit_weight_8bit_act_qconfig_setter": "plan.setters",
    "calibration_8bit_weight_16bit_act_qconfig_setter": "plan.setters",
    "candidate_reads": "search.sensitivity",
    "capture": "importers.from_torch",
    "check_qat_model": "train.check",
    "collect": "calibrate.collect",
    "convert": "flow.convert",
    "convert_segment_lut": "train.tables",
    "decompose_attention": "rewrite.decompose_attention",
    "decompose_composites": "rewrite.decompose_composites",
    "default_calibration_qconfig_setter": "plan.setters",
    "default_qat_fixed_act_qconfig_setter": "plan.setters",
    "default_qat_qconfig_setter": "plan.setters",
    "explain": "search.interactions",
    "export": "flow.export",
    "export_float": "exporters.onnx_float",
    "export_integer": "exporters.integer",
    "export_qdq": "exporters.onnx_qdq",
    "fold_batchnorm": "rewrite.fold_batchnorm",
    "freeze_batchnorm": "train.batchnorm",
    "get_default_qconfig": "plan.qconfig",
    "joint_thresholds": "search.thresholds",
    "load_observer_params": "train.control",
    "load_onnx": "importers.from_onnx",
    "load_target": "plan.target",
    "lower": "exporters.integer",
    "measure_sensitivity": "search.sensitivity",
    "open_data": "data",
    "prepare": "flow.prepare",
    "qat_4bit_weight_8bit_act_qconfig_setter": "plan.setters",
    "qat_4bit_weight_8bit_fixed_act_qconfig_setter": "plan.setters",
    "qat_8bit_weight_16bit_act_qconfig_setter": "plan.setters",
    "qat_8bit_weight_16bit_fixed_act_qconfig_setter": "plan.setters",
    "quantized_reads": "plan.reads",
    "reset_scale": "train.control",
    "run_calibration": "flow.calibration",
    "run_joint": "flow.joint",
    "run_luts": "flow.luts",
    "run_mixed": "flow.search",
    "run_quantize": "flow.quantize",
    "run_sensitivity": "flow.search",
    "run_verify": "flow.verification",
    "search_mixed_precision": "search.mixed_precision",
    "sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter": "plan.setters",
    "sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter": "plan.setters",
    "sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter": "plan.setters",
    "set_fake_quantize": "train.control",
    "set_quantized_forward": "train.tables",
    "sketch_sensitivity": "search.sketched",
    "tune": "flow.tune",
    "update_batchnorm": "train.batchnorm",
    "verify": "runtime.verify",
    "with_tables": "ops.table",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    return getattr(import_module(f"bitwright.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
