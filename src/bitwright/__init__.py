"""Bitwright takes a trained float network to fixed-point hardware and keeps its accuracy."""

__version__ = "0.1.0"
