"""The integer model: integer operators between QuantizeLinear and DequantizeLinear, made of standard ONNX operators only.

One file per family of operators registers how they are lowered. What cannot be lowered, or is float in the plan, is a float
*island* between explicit conversions, listed with its reason. Arithmetic: docs/numerics.md §10.
"""

from bitwright.exporters.integer import conv, elementwise, linear, move, pool, rectify
from bitwright.exporters.integer.export import IntegerModel, export_integer, lower
from bitwright.exporters.integer.lowering import LOWERINGS, Accumulator

__all__ = ["LOWERINGS", "Accumulator", "IntegerModel", "export_integer", "lower"]
