"""Where accuracy is lost: a network against another state of itself, output by output, layer by layer, switch by switch."""

from bitwright.analysis.profiler import ModelProfiler as ModelProfiler
from bitwright.analysis.quant_analysis import QuantAnalysis as QuantAnalysis

__all__ = ["ModelProfiler", "QuantAnalysis"]
