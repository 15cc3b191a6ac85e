"""Intervals of a joint law: three bootstraps, or delete-one jackknife, over runs or clusters of runs.

*pairs* resamples whole units, and takes its quantiles where Student's t has them. *residual* keeps every run and draws
noise of the size that the residuals have, the same for all runs: with few runs, pairs lose whole sizes. *wild* draws
each unit's own residuals, corrected for leverage, times one of Webb's six weights, for noise that differs. *jackknife*
leaves each unit out in turn. How often each holds the truth: `scaling.coverage`. Draws are kept jointly, for the
parameters of a law are so correlated (alpha with ln A at 0.999) that separate errors mislead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import stats

from scaling.bootstrap import LEVEL, interval, pairs_from, student_level, student_noise
from scaling.joint.fit import JointFit, slopes_of
from scaling.joint.laws import Data
from scaling.joint.solve import minimise
from scaling.table import FloatArray, IntArray, TableError

Method = Literal["pairs", "residual", "wild", "jackknife"]
METHODS = ("pairs", "residual", "wild", "jackknife")
# Webb (2014): mean 0, variance 1, six values, so that few clusters still give many distinct resamples.
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
_DISTINCT = 3


@dataclass(frozen=True)
class JointDraws:
    """Joint draws of a fit. units: how many were resampled, or left out in turn. seed: of the draws."""

    fit: JointFit = field(repr=False)
    method: Method
    unit: str
    units: int
    theta: FloatArray = field(repr=False)
    seed: int

    @property
    def description(self) -> str:
        """One phrase for reports."""
        if self.method == "jackknife":
            return f"delete-one jackknife over {self.units} {self.unit}s, Student's t"
        how = {
            "pairs": "pairs bootstrap (Student's quantiles)",
            "residual": "bootstrap of normal residuals (Student's scale)",
            "wild": "wild bootstrap of residuals (Webb weights, HC3)",
        }[self.method]
        return f"{how} over {self.units} {self.unit}s, {len(self.theta)} draws"

    def params(self) -> dict[str, FloatArray]:
        """Each parameter's draws (R,), and those of a, the exponent of N*(C), where the law has it."""
        found = self.fit.model.natural(self.theta)
        if {"alpha", "beta"} <= found.keys():
            found["a"] = found["beta"] / (found["alpha"] + found["beta"])
        return found

    def errors(self) -> dict[str, float]:
        """Standard errors."""
        return {name: self._error(values) for name, values in self.params().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals; a coefficient's by its logarithm where they come from a standard error."""
        middle = self.fit.params | ({"a": self.fit.optimal_exponent} if self.fit.optimal_exponent is not None else {})
        logs = set(self.fit.law.coefficients) | {"R_N", "R_D"}
        return {name: self.around(middle[name], values, log=name in logs) for name, values in self.params().items()}

    def curve(self, data: Data) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the expected loss of runs."""
        values = self.fit.model.at(self.theta, data)
        pairs = [self.around(float(m), v, log=True) for m, v in zip(self.fit.at(data), values.T)]
        low, high = np.array(pairs).T
        return low, high

    def prediction(self, data: Data) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the loss of ONE new run: uncertainty of the law and scatter of runs."""
        values = self.fit.model.at(self.theta, data)
        freedom = max(len(self.fit) - len(self.fit.law.params), 1)
        noise = self.fit.rmse * np.sqrt(len(self.fit) / freedom)
        if self.method == "jackknife":
            at, t = self.fit.at(data), float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
            own = np.array([self._error(np.log(v) if self.fit.estimator.log else v) for v in values.T])
            half = t * np.sqrt(own**2 + noise**2)
            return (at * np.exp(-half), at * np.exp(half)) if self.fit.estimator.log else (at - half, at + half)
        rng, pairs, shape = np.random.default_rng([self.seed, 1]), self.method == "pairs", values.shape
        drawn = noise * (rng.normal(size=shape) if pairs else rng.standard_t(freedom, size=shape))
        values = values * np.exp(drawn) if self.fit.estimator.log else values + drawn
        low, high = np.array([interval(v, self._level) for v in values.T]).T
        return low, high

    def around(self, middle: float, values: FloatArray, *, log: bool) -> tuple[float, float]:
        """The 95 % interval of a quantity whose value at the fit is ``middle``, from its draws (R,)."""
        if self.method != "jackknife":
            return interval(values, self._level)
        t = float(stats.t.ppf(0.5 + LEVEL / 2, self._freedom))
        if not log:
            half = t * self._error(values)
            return middle - half, middle + half
        half = t * self._error(np.log(values))
        return middle * float(np.exp(-half)), middle * float(np.exp(half))

    @property
    def _freedom(self) -> int:
        return max(self.units - len(self.fit.law.params), 1)

    @property
    def _level(self) -> float:
        """How much of the draws a 95 % interval takes in."""
        return student_level(self._freedom) if self.method == "pairs" else LEVEL

    def _error(self, values: FloatArray) -> float:
        """The standard deviation of a bootstrap's draws; of a jackknife's, times its factor."""
        if self.method != "jackknife":
            return deviation(values, ddof=1)
        return float(np.sqrt(self.units - 1)) * deviation(values)


def deviation(values: FloatArray, *, ddof: int = 0) -> float:
    """The standard deviation, also of numbers whose squares are too large for one: a coefficient whose exponent the
    runs hardly tell may be anything up to 1e300 among its draws."""
    scale = float(np.abs(values).max())
    if not 0 < scale < np.inf:
        return scale
    return scale * float(np.std(values / scale, ddof=ddof))


def resample(
    fit: JointFit,
    *,
    method: Method | None = None,
    clusters: Sequence[str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> JointDraws:
    """Draws of a fit, each from a refit that starts at it.

    Args:
        fit: of `fit.fit_joint`.
        method: None for pairs, or with few units (`bootstrap.pairs_from`) residual (wild where these are clusters).
        clusters: the unit that each run belongs to (checkpoints of one run, seeds of one configuration); None for each
            run by itself.
        n_boot: draws of a bootstrap.
        seed: of the bootstrap; the same seed gives the same draws.

    Raises:
        TableError: fewer than three units.
    """
    unit = "run" if clusters is None else "cluster"
    _, owner = np.unique(np.arange(len(fit)) if clusters is None else np.asarray(clusters), return_inverse=True)
    units = int(owner.max()) + 1
    if units < _DISTINCT:
        raise TableError(f"an interval needs at least {_DISTINCT} {unit}s, got {units}")
    few: Method = "residual" if clusters is None else "wild"
    method = method or ("pairs" if units >= pairs_from(len(fit.law.params)) else few)
    rng = np.random.default_rng([seed, 0])
    if method in ("residual", "wild"):
        wild = method == "wild"
        y = _wild(fit, rng.choice(WEBB, size=(n_boot, units))[:, owner]) if wild else _noisy(fit, n_boot, rng)
        theta = minimise(fit.model, y, np.repeat(fit.theta[None], n_boot, 0), fit.estimator)
        return JointDraws(fit, method, unit, units, theta, seed)
    counts = _left_out(units) if method == "jackknife" else _picked(fit, owner, units, n_boot, rng)
    theta = np.repeat(fit.theta[None], len(counts), 0)
    theta = minimise(fit.model, fit.y, theta, fit.estimator, counts[:, owner])
    return JointDraws(fit, method, unit, units, theta, seed)


def _left_out(units: int) -> FloatArray:
    return 1.0 - np.eye(units)


def _picked(fit: JointFit, owner: IntArray, units: int, n_boot: int, rng: np.random.Generator) -> FloatArray:
    """How often each unit is drawn (n_boot, units); a draw with too few distinct values of a variable is made again."""
    places = [np.unique(fit.data[name], return_inverse=True)[1] for name in fit.law.variables if name != "u"]
    counts = np.zeros((n_boot, units))
    for row in counts:
        for _ in range(100):
            row[:] = np.bincount(rng.integers(units, size=units), minlength=units)
            drawn = row[owner] > 0
            if all(len(np.unique(place[drawn])) >= _DISTINCT for place in places):
                break
    return counts


def _wild(fit: JointFit, weights: FloatArray) -> FloatArray:
    """y (R, n) of the fit and its residuals times weights."""
    slopes = slopes_of(fit)
    left, singular, _ = np.linalg.svd(slopes / np.linalg.norm(slopes, axis=0), full_matrices=False)
    leverage = np.sum(left[:, singular > 1e-12 * singular[0]] ** 2, axis=1)
    return _moved(fit, -weights * fit.residuals / (1.0 - np.minimum(leverage, 0.99)))


def _noisy(fit: JointFit, n_boot: int, rng: np.random.Generator) -> FloatArray:
    """y (R, n) of the fit and normal noise of the residuals' size."""
    return _moved(fit, student_noise(fit.rmse, len(fit), len(fit.law.params), n_boot, rng))


def _moved(fit: JointFit, by: FloatArray) -> FloatArray:
    fitted = fit.model.at(fit.theta[None])
    if fit.estimator.log:
        return fitted * np.exp(by)
    return np.maximum(fitted + by, 1e-3 * fitted)
