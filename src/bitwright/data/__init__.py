"""Calibration and evaluation data: from files, folders and Python objects to checked samples."""

from bitwright.data.arrays import RawOptions
from bitwright.data.dataset import Dataset, InputInfo, Sample
from bitwright.data.images import ImageOptions
from bitwright.data.parse import parse_dtype, parse_floats, parse_shape, parse_size
from bitwright.data.source import open_data

__all__ = [
    "Dataset",
    "ImageOptions",
    "InputInfo",
    "RawOptions",
    "Sample",
    "open_data",
    "parse_dtype",
    "parse_floats",
    "parse_shape",
    "parse_size",
]
