"""Many fits of one law at once: damped Newton on the Huber, absolute or squared error of its residuals.

A bootstrap solves a thousand problems that differ in their weights or their y alone, so every step works on all of
them. The Hessian is exact where the law's terms are affine in theta, and it has to be: most residuals of a Huber loss
of 1e-3 lie on its straight arms, where Gauss-Newton sees no curvature. It is made positive by its eigenvalues'
magnitudes, a step that does not lower the objective is damped more. Absolute errors are Huber losses of falling width
down to 1e-8 of the residuals, whose optimum differs from theirs by as little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from scaling.joint.laws import Model
from scaling.table import FloatArray, IntArray

Loss = Literal["huber", "lad", "lsq"]
_STEPS = 200
_ROWS = 512  # problems worked on together: keeps the arrays within the caches and tens of megabytes


@dataclass(frozen=True)
class Estimator:
    """What a fit minimises: the sum over runs of a loss of ln y - ln fit (``log``), or of y - fit.

    huber: r^2 / 2 within ``delta``, delta (|r| - delta / 2) beyond; lad: |r|; lsq: r^2.
    """

    name: str
    loss: Loss
    log: bool
    delta: float = 1e-3

    @property
    def described(self) -> str:
        """For reports."""
        loss = {"huber": f"Huber loss, delta {self.delta:g}", "lad": "absolute error", "lsq": "squared error"}[
            self.loss
        ]
        return f"{loss}, of {'the logarithm of y' if self.log else 'y'}, summed over runs"

    def total(self, residuals: FloatArray, weights: FloatArray | float = 1.0) -> FloatArray:
        """The objective (R,) at residuals (R, n)."""
        size = np.abs(residuals)
        if self.loss == "huber":
            each = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        else:
            each = size if self.loss == "lad" else size**2
        return np.sum(weights * each, axis=-1)


ESTIMATORS = {
    one.name: one
    for one in (
        Estimator("huber", "huber", log=True),
        Estimator("lad", "lad", log=True),
        Estimator("lsq-log", "lsq", log=True),
        Estimator("huber-linear", "huber", log=False),
        Estimator("lad-linear", "lad", log=False),
        Estimator("lsq", "lsq", log=False),
    )
}


def minimise(
    model: Model,
    y: FloatArray,
    theta: FloatArray,
    estimator: Estimator,
    weights: FloatArray | None = None,
    *,
    widest: float | None = None,
) -> FloatArray:
    """theta (R, P) at the minima that lie downhill of the given ones.

    Args:
        model: the law over n runs.
        y: (R, n) or (n,), positive.
        theta: (R, P), where to start.
        estimator: what is minimised.
        weights: (R, n) how often a run counts; None for once.
        widest: the Huber width to begin with, for starts far off; None for one at the size of the residuals.
    """
    y = np.broadcast_to(y, (len(theta), model.runs))
    w = np.ones_like(y) if weights is None else weights
    parts = []
    for first in range(0, len(theta), _ROWS):
        part = slice(first, first + _ROWS)
        problem = _Problem(model, y[part], w[part], estimator.log)
        own = theta[part]
        for width in _widths(estimator, np.median(np.abs(problem.residuals(own))), widest):
            own = _descend(problem, own, width)
        parts.append(own)
    return np.concatenate(parts)


def _widths(estimator: Estimator, size: float, widest: float | None) -> list[float]:
    """The Huber widths to go through; infinite for squares."""
    if estimator.loss == "lsq":
        return [np.inf]
    last = estimator.delta if estimator.loss == "huber" else max(1e-8 * size, 1e-15)
    first = max(size if widest is None else widest, last)
    # Half decades: with longer strides the set of residuals that end at zero is missed.
    return list(np.geomspace(first, last, 1 + int(np.ceil(2 * np.log10(first / last))))) if first > last else [last]


class _Problem:
    def __init__(self, model: Model, y: FloatArray, w: FloatArray, log: bool) -> None:
        self.model, self.y, self.w, self.log = model, y, w, log

    def rows(self, which: IntArray) -> _Problem:
        return _Problem(self.model, self.y[which], self.w[which], self.log)

    def residuals(self, theta: FloatArray) -> FloatArray:
        """(R, n) fit minus y."""
        return self._from(self.model.terms(theta)[0])[0]

    def value(self, theta: FloatArray, width: float) -> FloatArray:
        """The objective (R,), in units that keep it near the size of 1: of the width, or squares as they are."""
        return np.sum(self.w * _rho(self.residuals(theta), width), axis=1)

    def _from(self, z: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Residuals (R, n) and each term's part in their derivative (R, n, K)."""
        top = z.max(axis=-1, keepdims=True)
        each = np.exp(z - top)
        total = each.sum(axis=-1, keepdims=True)
        if self.log:
            return np.log(total[..., 0]) + top[..., 0] - np.log(self.y), each / total
        each *= np.exp(top)
        return each.sum(axis=-1) - self.y, each

    def newton(self, theta: FloatArray, width: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The objective (R,), its gradient (R, P) and Hessian (R, P, P)."""
        z, design = self.model.terms(theta)
        r, part = self._from(z)
        inside = np.abs(r) <= width
        scale = 1.0 if np.isinf(width) else width
        first = self.w * np.where(inside, r / scale, np.sign(r)) / scale
        second = self.w * inside / scale**2
        value = np.sum(self.w * _rho(r, width), axis=1)
        pull, runs = first[..., None] * part, (len(theta), -1)
        if design.ndim == 3:
            params = design.shape[-1]
            flat = design.reshape(-1, params)
            slope = np.einsum("rnk,nkp->rnp", part, design, optimize=True)
            square = (flat[:, :, None] * flat[:, None, :]).reshape(len(flat), -1)
            bend = (pull.reshape(runs) @ square).reshape(len(theta), params, params)
        else:
            slope = np.einsum("rnk,rnkp->rnp", part, design)
            bend = np.einsum("rnk,rnkp,rnkq->rpq", pull, design, design, optimize=True)
        # The derivative of a term's share of the sum takes the sum's own slope away; a term by itself has none.
        weight = second - first if self.log else second
        hessian = bend + (slope * weight[..., None]).transpose(0, 2, 1) @ slope
        return value, np.einsum("rn,rnp->rp", first, slope), hessian


def _rho(r: FloatArray, width: float) -> FloatArray:
    if np.isinf(width):
        return 0.5 * r * r
    scaled = np.abs(r) / width
    return np.where(scaled <= 1, 0.5 * scaled**2, scaled - 0.5)


def _descend(problem: _Problem, theta: FloatArray, width: float) -> FloatArray:
    """Newton from each row of theta, until its steps gain nothing."""
    theta = theta.copy()
    active = np.arange(len(theta))
    damping = np.full(len(theta), 1e-6)
    value, gradient, hessian = problem.newton(theta, width)
    for _ in range(_STEPS):
        own = problem.rows(active)
        step = _step(gradient, hessian, damping[active])
        trial = theta[active] + step
        with np.errstate(over="ignore", invalid="ignore"):
            reached = own.value(trial, width)
        gain = value - np.where(np.isfinite(reached), reached, np.inf)
        better = gain > 0
        theta[active[better]] = trial[better]
        damping[active] *= np.where(better, 0.1, 8.0)
        np.clip(damping, 1e-12, None, out=damping)
        little = np.abs(step).max(axis=1) <= 1e-11 * (1.0 + np.abs(theta[active]).max(axis=1))
        through = (better & (gain <= 1e-14 * np.abs(value))) | little | (damping[active] > 1e12)
        going = ~through
        if not going.any():
            break
        moved = better[going]
        active = active[going]
        value, gradient, hessian = value[going], gradient[going], hessian[going]
        if moved.any():
            value[moved], gradient[moved], hessian[moved] = problem.rows(active[moved]).newton(
                theta[active[moved]], width
            )
    return theta


def _step(gradient: FloatArray, hessian: FloatArray, damping: FloatArray) -> FloatArray:
    """(R, P): Newton's, in coordinates of equal curvature, downhill along every eigenvector."""
    scale = np.sqrt(np.abs(np.diagonal(hessian, axis1=1, axis2=2)))
    scale = np.maximum(scale, 1e-9 * scale.max(axis=1, keepdims=True) + 1e-300)
    values, vectors = np.linalg.eigh(hessian / scale[:, :, None] / scale[:, None, :])
    along = np.einsum("rpq,rp->rq", vectors, gradient / scale)
    size = np.maximum(np.abs(values), 1e-10) + damping[:, None]
    step = -np.einsum("rpq,rq->rp", vectors, along / size) / scale
    return step * np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
