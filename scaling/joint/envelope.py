"""Chinchilla's approach 1: the least loss over all training curves at each compute, and the size of its run.

Curves must come from a learning rate that suits their every point (a constant one, or one that ends there): in the
middle of a decay a run is worse than one that ended there. N* is one of the sizes trained, no size between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fit import Warn
from scaling.joint.isoflop import Power
from scaling.table import FloatArray, IntArray, TableError

_COLUMNS = 1500  # values of C, as in Hoffmann et al. 2022


@dataclass(frozen=True)
class Envelope:
    """compute, n, loss (m,): where the envelope is, whose size it is and how low. power: ln N* against ln C."""

    compute: FloatArray
    n: FloatArray
    loss: FloatArray
    power: Power
    warnings: tuple[Warn, ...]


def envelope(
    run: Sequence[str],
    n: FloatArray,
    compute: FloatArray,
    y: FloatArray,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> Envelope:
    """Fit N* along the envelope of training curves.

    Args:
        run: which run a checkpoint is of (points,).
        n: its parameters.
        compute: FLOPs so far.
        y: loss there.
        n_boot: draws, each of as many runs as there are, drawn with repeats.
        seed: of the draws.

    Raises:
        TableError: fewer than three sizes have a curve of two points, or none of two sizes is ever best.
    """
    rows = [np.flatnonzero(np.asarray(run) == one) for one in dict.fromkeys(run)]
    curves = [_curve(own, n, compute, y) for own in rows if len(own) > 1]
    if len({size for size, _, _ in curves}) < 3:
        raise TableError("an envelope needs training curves (two points or more) of at least three sizes")
    low, high = min(c[0] for _, c, _ in curves), max(c[-1] for _, c, _ in curves)
    at = np.linspace(low, high, _COLUMNS)
    losses = np.stack([np.interp(at, c, loss, left=np.inf, right=np.inf) for _, c, loss in curves])
    sizes = np.log([size for size, _, _ in curves])
    found = _fit(at, losses, sizes)
    if found is None:
        raise TableError("one size is best at every compute: an envelope needs at least two")
    rng = np.random.default_rng([seed, 0])
    drawn: list[tuple[float, float]] = []
    while len(drawn) < n_boot:
        pick = rng.integers(len(curves), size=len(curves))
        one = _fit(at, losses[pick], sizes[pick])
        if one is not None:
            drawn.append(one[:2])
    slopes, levels = np.array(drawn).T
    slope, level, best = found
    where = np.isfinite(losses[best, np.arange(_COLUMNS)])
    winners = len(np.unique(sizes[best[where]]))
    warnings = [] if winners >= 4 else [Warn("few_sizes", f"only {winners} sizes are ever best")]
    power = Power(float(np.exp(level)), float(slope), {"k": np.exp(levels), "a": slopes})
    return Envelope(
        np.exp(at[where]),
        np.exp(sizes[best[where]]),
        losses[best, np.arange(_COLUMNS)][where],
        power,
        tuple(warnings),
    )


def _curve(rows: IntArray, n: FloatArray, compute: FloatArray, y: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """A run's size, ln C and the least loss so far at each of its points."""
    rows = rows[np.argsort(compute[rows])]
    return float(n[rows[0]]), np.log(compute[rows]), np.minimum.accumulate(y[rows])


def _fit(at: FloatArray, losses: FloatArray, sizes: FloatArray) -> tuple[float, float, IntArray] | None:
    """Slope and level of ln N* against ln C, and the best run at each; None where one size is always best.

    The smallest and the largest size are best below and above what they should be, as there is no other: they are left
    out where that leaves three.
    """
    best = np.argmin(losses, axis=0)
    where = np.isfinite(losses[best, np.arange(len(at))])
    x, z = at[where], sizes[best[where]]
    within = (z > z.min()) & (z < z.max())
    if len(np.unique(z[within])) >= 3:
        x, z = x[within], z[within]
    if len(np.unique(z)) < 2:
        return None
    slope, level = np.polyfit(x, z, 1)
    return float(slope), float(level), best
