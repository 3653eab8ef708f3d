"""How alike two networks' outputs are: the mean cosine over samples (docs/numerics.md §6), and the loss that ranks operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import DataError, UnknownName
from bitwright.search.losses import LOSSES, Divergence, Loss

#: A user's post-processing: output name -> array with a batch of one, to a dictionary of the same form.
PostProcess = Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, Any]]

_FIXED_SIZE = "Score outputs of a fixed size (boxes before suppression, not after)."
#: What similarities are made of, whatever loss ranks operators.
COSINE = LOSSES.get("cosine", where="loss")


@dataclass(frozen=True)
class Similarity:
    """Scores outputs against reference outputs, sample by sample.

    *weights*: output name -> weight, normalised to sum 1 (default: all outputs equally). *post_process*: applied to both
    sides before scoring. *half*: report (1 + cosine) / 2, the scale of one vendor's tools. *loss*: what `losses` measures;
    the similarity itself is always the cosine.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    post_process: PostProcess | None = None
    half: bool = False
    loss: Loss = COSINE
    #: Outputs that are probabilities, which only KL divergence asks.
    probabilities: frozenset[str] = frozenset()
    #: Outputs whose classes lie elsewhere than KL divergence expects: output -> axis.
    class_axes: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """Similarity of each sample.

        *reference*: name -> `[n, ...]`; *outputs*: name -> `[k * n, ...]`, k variants stacked. *returns*: `[k, n]` float64.
        """
        return 1 - self.scale * self._measured(COSINE, reference, outputs)

    def losses(self, reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample: 1 - similarity, or what *loss* says. Shapes as above."""
        return self.loss_scale * self._measured(self.loss, reference, outputs)

    @property
    def loss_scale(self) -> float:
        """What the loss of an output is multiplied by."""
        return self.scale if self.loss == COSINE else 1.0

    @property
    def scale(self) -> float:
        """What 1 - cosine is multiplied by."""
        return 0.5 if self.half else 1.0

    def loss_of(self, output: str) -> Loss:
        """The loss that is measured on *output*."""
        return self._of(self.loss, output)

    def _of(self, loss: Loss, output: str) -> Loss:
        if isinstance(loss, Divergence):
            return Divergence(output in self.probabilities, self.class_axes.get(output))
        return loss

    def _measured(self, loss: Loss, reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of *loss* over outputs: `[k, n]` float64 on the CPU."""
        n = next(iter(reference.values())).shape[0]
        k = next(iter(outputs.values())).shape[0] // n
        if self.post_process is not None:
            reference, outputs = self._processed(reference), self._processed(outputs)
        total = torch.zeros(k, n, dtype=torch.float64)
        for name, weight in self.normalised(reference).items():
            ref, out = reference[name], outputs[name]
            if ref[0].numel() != out[0].numel():
                raise DataError(
                    f"output {name}",
                    expected=f"the same number of elements as in the float network ({ref[0].numel()})",
                    found=str(out[0].numel()),
                    remedy=_FIXED_SIZE,
                )
            total += weight * self._of(loss, name).measure(ref, out).cpu()
        return total

    def normalised(self, reference: Iterable[str]) -> dict[str, float]:
        """The weights of the outputs *reference*, sum 1. *raises* `UnknownName`, `DataError`."""
        reference = list(reference)
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
                    remedy=_FIXED_SIZE,
                )
        return {name: torch.cat(r) for name, r in rows.items()}
