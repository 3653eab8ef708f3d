"""What a change of the outputs costs, exactly and to second order (docs/error-sketch.md §2).

A loss is least, and zero, where the outputs equal the float network's. There its second-order form is
`loss(y + e) ~ 1/2 |B^T e|^2` with `B B^T` its Hessian in the outputs; `factor` applies `B`, which is all that a sketch needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.numerics.cosine import cosine
from bitwright.registry import Registry

#: Probabilities below this are raised to it where something is divided by them.
LEAST_PROBABILITY = 1e-6
#: Vectors of the Krylov space in which the square root of a user's Hessian is taken.
_KRYLOV = 24


class Loss(Protocol):
    """The loss of one output, sample by sample. *largest_rank*: more directions than this have no effect, of *m* elements."""

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """*reference*: `[n, ...]`; *outputs*: `[k * n, ...]`, k variants stacked. *returns*: `[k, n]` float64, >= 0."""
        ...

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        """`B z` for each sample. *reference*, *z*: `[n, ...]`. *returns*: the same shape."""
        ...


LOSSES: Registry[Loss] = Registry("loss")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _like(x: Tensor, shape_of: Tensor) -> Tensor:
    return x.reshape(shape_of.shape)


def _squares(reference: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared differences `[k, n]`, and of squares of the reference `[n]`, float64."""
    n = reference.shape[0]
    ref = _rows(reference).double()
    difference = _rows(outputs).double().reshape(-1, n, ref.shape[1]) - ref
    return (difference**2).sum(2), (ref**2).sum(1)


@dataclass(frozen=True)
class Cosine:
    """1 - cosine of the output and the float network's. Hessian: (I - u u^T) / |y|^2, u = y / |y|.

    Of an output that is all zeros the second-order form is taken as 0: its cosine is not differentiable.
    """

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        n = reference.shape[0]
        out = _rows(outputs)
        ref = _rows(reference).repeat(out.shape[0] // n, 1)
        return 1 - cosine(ref, out).reshape(-1, n)

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        y, v = _rows(reference), _rows(z)
        norm = y.norm(dim=1, keepdim=True)
        unit = torch.where(norm > 0, y / norm.clamp_min(1e-30), torch.zeros_like(y))
        across = v - unit * (unit * v).sum(1, keepdim=True)
        return _like(torch.where(norm > 0, across / norm.clamp_min(1e-30), torch.zeros_like(v)), z)


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean squared difference of the output's elements. Hessian: 2 I / m."""

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        noise, _ = _squares(reference, outputs)
        return noise.div(max(1, reference[0].numel()))

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        return z * math.sqrt(2 / max(1, reference[0].numel()))


@dataclass(frozen=True)
class NoiseToSignal:
    """Noise power over signal power, |e|^2 / |y|^2: SQNR = -10 log10 of it, in dB. Hessian: 2 I / |y|^2.

    Of an output that is all zeros the loss is 0, or infinite where anything was added to it.
    """

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        noise, signal = _squares(reference, outputs)
        return torch.where(noise > 0, noise / signal, torch.zeros_like(noise))

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        norm = _rows(reference).norm(dim=1).reshape(-1, *[1] * (z.dim() - 1))
        return torch.where(norm > 0, z * 2**0.5 / norm.clamp_min(1e-30), torch.zeros_like(z))


@dataclass(frozen=True)
class Divergence:
    """KL divergence of softmax(float output) from softmax(output), nats, mean over positions.

    Hessian in the logits: diag(p) - p p^T. *probabilities*: the output went through a softmax already; Hessian then:
    diag(1 / p) - 1 1^T. *axis*: along which classes lie; None: axis 1 of outputs with four dimensions or more
    (`[n, classes, h, w]`), else the last.
    """

    probabilities: bool = False
    axis: int | None = None

    def _axis(self, x: Tensor) -> int:
        if self.axis is not None:
            return self.axis
        return 1 if x.dim() >= 4 else -1

    def _classes_last(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) if x.dim() == 1 else x
        x = x.movedim(self._axis(x), -1)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _log_p(self, x: Tensor) -> Tensor:
        x = self._classes_last(x)
        return x.clamp_min(LEAST_PROBABILITY).log() if self.probabilities else x.log_softmax(-1)

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        n = reference.shape[0]
        p = self._log_p(reference.double())
        q = self._log_p(outputs.double()).reshape(-1, *p.shape)
        q = q - q.logsumexp(-1, keepdim=True)
        p = p - p.logsumexp(-1, keepdim=True)
        divergence: Tensor = (p.exp() * (p - q)).sum(-1).mean(-1)
        return divergence.reshape(-1, n).clamp_min(0)

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        p, v = self._log_p(reference).exp(), self._classes_last(z)
        root = p.sqrt()
        along = (root * v).sum(-1, keepdim=True)
        made = v / root - along if self.probabilities else root * v - p * along
        made = made / math.sqrt(max(1, p.shape[1]))
        if z.dim() > 1:
            moved = z.movedim(self._axis(z), -1)
            made = made.reshape(moved.shape).movedim(-1, self._axis(z))
        return _like(made, z)


LOSSES.add("cosine", Cosine())
LOSSES.add("mse", MeanSquaredError())
LOSSES.add("sqnr", NoiseToSignal())
LOSSES.add("kl", Divergence())

#: A user's differentiable loss: (output `[n, ...]`, the float network's `[n, ...]`) -> `[n]`, least where they are equal.
UserFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class UserLoss:
    """A differentiable *function* of a user in its generalised Gauss-Newton form: the network is linearised, the loss is
    taken to second order, and counts from what it is at the float outputs. The square root of its Hessian comes from Lanczos' method on Hessian-vector products (Golub and
    Van Loan, Matrix Computations, 4th ed., §10.2); negative curvature counts as none.
    """

    function: UserFunction
    name: str = "--loss"

    def measure(self, reference: Tensor, outputs: Tensor) -> Tensor:
        n = reference.shape[0]
        repeated = reference.repeat(outputs.shape[0] // n, *[1] * (reference.dim() - 1))
        least = self._of(reference, reference).double()
        return self._of(outputs, repeated).double().reshape(-1, n) - least

    def factor(self, reference: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            y = reference.detach().clone().requires_grad_()
            total = self._of(y, reference.detach()).sum()
            slope = None
            if total.requires_grad:
                (slope,) = torch.autograd.grad(total, y, create_graph=True, allow_unused=True)
        if slope is None or slope.grad_fn is None:
            raise self._wrong(
                "one that depends on the outputs and can be differentiated twice", "no curvature"
            )

        def curved(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(
                slope, y, u.reshape(y.shape), retain_graph=True, materialize_grads=True
            )
            return _rows(product.detach())

        self._check_least(reference, _rows(slope.detach()), curved)
        return _like(_square_root(curved, _rows(z)), z)

    def _check_least(self, reference: Tensor, slope: Tensor, curved: Callable[[Tensor], Tensor]) -> None:
        """A step against a slope that is not zero must not pay: the float outputs are the least."""
        length = slope.norm(dim=1, keepdim=True)
        step = slope / length.clamp_min(1e-30) * 0.01 * _rows(reference).norm(dim=1, keepdim=True)
        gain, price = (step * slope).sum(1), 0.5 * (step * curved(step)).sum(1)
        if bool((gain > price + 1e-12).any()):
            raise self._wrong("a loss that is least where outputs equal the float network's", "a slope there")

    def _of(self, outputs: Tensor, reference: Tensor) -> Tensor:
        try:
            found = self.function(outputs, reference)
        except Exception as e:
            raise self._wrong("a function of (output, reference)", f"{type(e).__name__}: {e}") from e
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:1]:
            what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise self._wrong(f"a tensor with one number for each of {outputs.shape[0]} samples", what)
        if not bool(torch.isfinite(found.detach()).all()):
            raise self._wrong("finite losses", "NaN or infinity")
        return found

    def _wrong(self, expected: str, found: str) -> DataError:
        return DataError(self.name, expected=expected, found=found, remedy="Mend the loss function.")


def _square_root(matrix: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`H^(1/2) z` of each row, in the Krylov space of *matrix* (symmetric, rows apart) and *z*: `[n, m]`."""
    length = z.norm(dim=1, keepdim=True).clamp_min(1e-30)
    basis, diagonal, beside = [z / length], list[Tensor](), list[Tensor]()
    for _ in range(min(_KRYLOV, z.shape[1])):
        product = matrix(basis[-1])
        diagonal.append((basis[-1] * product).sum(1))
        for known in basis:  # against rounding: twice is enough in exact order, once suffices at these sizes
            product = product - known * (known * product).sum(1, keepdim=True)
        rest = product.norm(dim=1)
        beside.append(rest)
        basis.append(product / rest.unsqueeze(1).clamp_min(1e-30))
    steps = len(diagonal)
    small = torch.diag_embed(torch.stack(diagonal, 1)).double()
    for i in range(steps - 1):
        small[:, i, i + 1] = small[:, i + 1, i] = beside[i].double()
    values, vectors = torch.linalg.eigh(small)
    weights = (vectors * values.clamp_min(0).sqrt().unsqueeze(1) * vectors[:, :1, :]).sum(2)
    made = torch.zeros_like(z)
    for i in range(steps):
        made += weights[:, i : i + 1].to(z.dtype) * basis[i]
    return made.mul(length)
