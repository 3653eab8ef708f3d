"""How alike two networks' outputs are: the mean cosine over samples (docs/numerics.md §6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import DataError, UnknownName
from bitwright.numerics.cosine import cosine

#: A user's post-processing: output name -> array with a batch of one, to a dictionary of the same form.
PostProcess = Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Similarity:
    """Scores outputs against reference outputs, sample by sample.

    *weights*: output name -> weight, normalised to sum 1 (default: all outputs equally). *post_process*: applied to both
    sides before scoring. *half*: report (1 + cosine) / 2, the scale of one vendor's tools.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    post_process: PostProcess | None = None
    half: bool = False

    def __call__(self, reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """Similarity of each sample.

        *reference*: name -> `[n, ...]`; *outputs*: name -> `[k * n, ...]`, k variants stacked. *returns*: `[k, n]` float64.
        """
        n = next(iter(reference.values())).shape[0]
        k = next(iter(outputs.values())).shape[0] // n
        if self.post_process is not None:
            reference, outputs = self._processed(reference), self._processed(outputs)
        weights = self._normalised(reference)
        total = torch.zeros(k, n, dtype=torch.float64)
        for name, weight in weights.items():
            ref = reference[name].reshape(n, -1)
            out = outputs[name].reshape(k * n, -1)
            if ref.shape[1] != out.shape[1]:
                raise DataError(
                    f"output {name}",
                    expected=f"the same number of elements as in the float network ({ref.shape[1]})",
                    found=str(out.shape[1]),
                    remedy="Score outputs of a fixed size (boxes before suppression, not after).",
                )
            ref = ref.repeat(k, 1)
            total += weight * cosine(ref, out).reshape(k, n).cpu()
        return (1 + total) / 2 if self.half else total

    def _normalised(self, reference: Mapping[str, Tensor]) -> dict[str, float]:
        unknown = [w for w in self.weights if w not in reference]
        if unknown:
            raise UnknownName("--output-weights", kind="output", name=unknown[0], known=reference)
        chosen = dict(self.weights) or dict.fromkeys(reference, 1.0)
        total = sum(chosen.values())
        if total <= 0 or min(chosen.values()) < 0:
            raise DataError(
                "output weights",
                expected="non-negative weights with a positive sum",
                found=str(chosen),
                remedy="Give at least one output a weight above 0.",
            )
        return {name: w / total for name, w in chosen.items()}

    def _processed(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.post_process is not None
        n = next(iter(outputs.values())).shape[0]
        rows: dict[str, list[Tensor]] = {}
        for i in range(n):
            sample = {name: x[i : i + 1].cpu().numpy() for name, x in outputs.items()}
            try:
                result = self.post_process(sample)
                processed = {str(k): torch.from_numpy(np.asarray(v, np.float32)) for k, v in result.items()}
            except Exception as e:
                raise DataError(
                    "--post-process",
                    expected="a function of {output: array} that returns {name: array}",
                    found=f"{type(e).__name__}: {e}",
                    remedy="Mend the post-processing function.",
                ) from e
            for name, x in processed.items():
                rows.setdefault(name, []).append(x.reshape(1, -1))
        for name, r in rows.items():
            sizes = sorted({x.shape[1] for x in r})
            if len(r) != n or len(sizes) > 1:
                raise DataError(
                    f"--post-process, result {name}",
                    expected=f"as many numbers for each of {n} samples",
                    found=f"{len(r)} results of {', '.join(map(str, sizes))} numbers",
                    remedy="Score outputs of a fixed size (boxes before suppression, not after).",
                )
        return {name: torch.cat(r) for name, r in rows.items()}
