"""The integer model: integer operators between QuantizeLinear and DequantizeLinear, made of standard ONNX operators only.

One file per family of operators registers how they are lowered; dropping a file here registers what it contains. What cannot be
lowered, or is float in the plan, is a float *island* between explicit conversions, listed with its reason. Arithmetic: docs/numerics.md §10.
"""

from importlib import import_module
from pkgutil import iter_modules

from bitwright.exporters.integer.export import IntegerModel, export_integer, lower
from bitwright.exporters.integer.lowering import LOWERINGS, Accumulator

__all__ = ["LOWERINGS", "Accumulator", "IntegerModel", "export_integer", "lower"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
