"""Comparing the outputs of whole networks, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bitwright.graph.graph import Graph
from bitwright.numerics.affine import quantize
from bitwright.numerics.cosine import cosine
from bitwright.numerics.spec import QParams
from bitwright.runtime.proof import Agreement


class AgreementMeter:
    """Collects an `Agreement`. *codes*: parameters of the outputs that are quantized."""

    def __init__(self, graph: Graph, codes: Mapping[str, QParams], optimisation: str) -> None:
        self.graph, self.codes, self.optimisation = graph, codes, optimisation
        names = dict.fromkeys(graph.info.outputs)
        real = [n for n in names if graph.value(n).info.is_float]
        self.outputs = real or list(names)
        self.samples = 0
        self.failure = ""
        self._cosines: list[float] = []
        self._float_cosines: list[float] = []
        self._same_place: list[bool] = []
        self._steps = 0

    def add(
        self,
        network: Mapping[str, Tensor],
        simulation: Mapping[str, Tensor],
        engine: Mapping[str, Tensor],
        *,
        samples: int,
    ) -> None:
        """One batch: output name -> `[n, ...]` of the float network, its simulation, and the engine."""
        self.samples += samples
        for name in self.outputs:
            ours, theirs = self._rows(name, simulation[name]), self._rows(name, engine[name])
            self._cosines += cosine(ours, theirs).tolist()
            self._float_cosines += cosine(self._rows(name, network[name]), ours).tolist()
            if ours.shape[1] > 1:
                # numpy takes the first of equal maxima, which quantized outputs have many of.
                self._same_place += list(np.argmax(ours.numpy(), 1) == np.argmax(theirs.numpy(), 1))
            if name in self.codes:
                q = self.codes[name]
                difference = quantize(simulation[name].cpu(), q).int() - quantize(engine[name].cpu(), q).int()
                self._steps = max(self._steps, int(difference.abs().max()) if difference.numel() else 0)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """One row for each sample. *returns*: `[n, m]` float64."""
        axis = self.graph.value(name).info.batch_axis
        x = torch.as_tensor(x).detach().cpu().double()
        if axis is None or x.dim() == 0:
            return x.reshape(1, -1)
        moved = x.movedim(axis, 0)
        return moved.reshape(moved.shape[0], -1)

    def result(self) -> Agreement:
        """What was found; without a sample (or with a failure) nothing agrees."""
        if not self._cosines:
            return Agreement(self.optimisation, 0, 0.0, 0.0, 0.0, None, self.failure)
        return Agreement(
            self.optimisation,
            self.samples,
            float(np.mean(self._cosines)),
            float(np.mean(self._float_cosines)),
            float(np.mean(self._same_place)) if self._same_place else 1.0,
            self._steps if self.codes else None,
            self.failure,
            {n: float(np.percentile(self._cosines, p)) for n, p in (("min", 0), ("p10", 10), ("median", 50))},
        )
