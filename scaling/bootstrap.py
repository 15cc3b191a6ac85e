"""Bootstrap intervals of one-variable laws: pairs over configurations, or residuals where configurations are few.

*pairs* resamples whole configurations, each with all its seeds: the scatter of configuration means around
the law already contains the seeds' noise, and resampling the seeds as well would count it twice (Davison
and Hinkley 1997, section 3.8; in simulation such 95 % intervals covered 100 %). Its quantiles are taken
where Student's t has them. With few configurations pairs lose whole sizes, so below `pairs_from`
configurations *residual* keeps every x and draws noise of the residuals' size, the same for all; multiplying
each configuration's own residual (the wild bootstrap) leaves six of them too little to vary, and such intervals
held the truth in 87 to 93 of 100 simulated studies (`scaling.coverage` has the present ones). The method
used is always named. Joint draws are kept, because the parameters of a law are so correlated that separate
standard errors mislead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from scaling import laws
from scaling.fit import CurveFit, Points, leverage
from scaling.laws import Curves
from scaling.table import FloatArray

_PAIRS_FROM, _PAIRS_A_PARAMETER = 13, 4
LEVEL = 0.95
_MAX_LEVERAGE = 0.99


@dataclass(frozen=True)
class Bootstrap:
    """Joint draws of one fitted curve.

    `method` is "pairs" or "residual"; `draws` are R curves; `noise` is the standard deviation of a single run around
    the curve (seeds included, corrected for leverage, on the fit's scale) with `freedom` degrees of freedom: it widens
    a curve interval into a prediction interval for one new run.
    """

    method: str
    draws: Curves
    noise: float
    freedom: int
    seed: int

    @property
    def description(self) -> str:
        """One phrase for reports: what was resampled and how often."""
        if self.method == "pairs":
            kept = "seeds kept together, Student's quantiles"
            return f"pairs bootstrap over configurations ({kept}), {len(self.draws)} draws"
        return f"bootstrap of normal residuals of configurations (Student's scale), {len(self.draws)} draws"

    @property
    def level(self) -> float:
        """How much of the draws a 95 % interval takes in."""
        return student_level(self.freedom) if self.method == "pairs" else LEVEL

    def params(self) -> dict[str, tuple[float, float]]:
        """The 95 % percentile interval of each parameter."""
        return {name: interval(values, self.level) for name, values in self.draws.params().items()}

    def curve(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the expected metric at x."""
        return _limits(self.draws.at(x), self.level)

    def prediction(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the metric of ONE new run at x: curve uncertainty plus run noise."""
        values = self.draws.at(x)
        rng = np.random.default_rng([self.seed, 1])
        # Not the residuals themselves: a handful of residuals never shows the tail of a new run. Student's t, or where
        # the draws have normal tails and their quantiles Student's, normal as they are.
        pairs, shape = self.method == "pairs", values.shape
        noise = self.noise * (rng.normal(size=shape) if pairs else rng.standard_t(self.freedom, size=shape))
        if self.draws.form in laws.LOGARITHMIC:
            return _limits(values * np.exp(noise), self.level)
        return _limits(values + noise, self.level)


def bootstrap(points: Points, fit: CurveFit, *, loss: bool, n_boot: int = 1000, seed: int = 0) -> Bootstrap | None:
    """Resample and refit; None where the fit leaves no residual freedom, so that no interval exists.

    Args:
        points: the family's configurations.
        fit: the curve fitted to them.
        loss: the sign rule the fit used.
        n_boot: draws, at least 1000 for the intervals of a report.
        seed: makes the draws reproducible; the same seed gives the same intervals to the bit.
    """
    if len(points) <= laws.N_PARAMS[fit.form] or len(np.unique(points.x)) <= laws.N_PARAMS[fit.form]:
        return None
    rng = np.random.default_rng([seed, 0])
    pairs = len(points) >= pairs_from(laws.N_PARAMS[fit.form])
    draws = (_pairs if pairs else _residual)(points, fit, loss, n_boot, rng)
    freedom = len(points) - laws.N_PARAMS[fit.form]
    return Bootstrap("pairs" if pairs else "residual", draws, _run_noise(points, fit), freedom, seed)


def pairs_from(params: int) -> int:
    """The number of runs from which a law of so many parameters is resampled by pairs.

    Fewer leave draws that hardly determine the law, whose intervals are too wide (of seven parameters from 16 runs,
    they held the truth in more than 99 of 100 simulated studies).
    """
    return max(_PAIRS_FROM, _PAIRS_A_PARAMETER * params)


def interval(values: FloatArray, level: float = LEVEL) -> tuple[float, float]:
    """The central percentile interval by order statistics, so that infinities are allowed and never interpolated."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def student_level(freedom: int) -> float:
    """The share of normal draws that Student's 95 % interval takes in (Hesterberg 2015, the expanded percentile)."""
    return float(2 * stats.norm.cdf(stats.t.ppf(0.5 + LEVEL / 2, freedom)) - 1)


def student_noise(rms: float, n: int, params: int, n_boot: int, rng: np.random.Generator) -> FloatArray:
    """Normal noise (n_boot, n) of the standard deviation that n residuals of a fit with so many parameters leave open:
    a draw's own is what they say, times a root of an inverse chi-square, so that quantiles are those of Student's t."""
    freedom = n - params
    scale = rms * np.sqrt(n / freedom) * np.sqrt(freedom / rng.chisquare(freedom, size=(n_boot, 1)))
    return scale * rng.normal(size=(n_boot, n))


def _limits(values: FloatArray, level: float = LEVEL) -> tuple[FloatArray, FloatArray]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def _link(form: str, y: FloatArray) -> FloatArray:
    """The scale on which the form's residuals are additive."""
    return np.log(y) if form in laws.LOGARITHMIC else y


def _unlink(form: str, z: FloatArray) -> FloatArray:
    return np.exp(z) if form in laws.LOGARITHMIC else z


def _correction(points: Points, fit: CurveFit) -> FloatArray:
    """1 - leverage (n,), bounded below: what a residual is divided by to undo the fit's pull on its point."""
    return 1.0 - np.minimum(leverage(fit.curves, points.x), _MAX_LEVERAGE)


def _residual(points: Points, fit: CurveFit, loss: bool, n_boot: int, rng: np.random.Generator) -> Curves:
    predicted = _link(fit.form, fit.at(points.x))
    rms = float(np.sqrt(np.mean((_link(fit.form, points.mean) - predicted) ** 2)))
    noise = student_noise(rms, len(points), laws.N_PARAMS[fit.form], n_boot, rng)
    y = _unlink(fit.form, predicted + noise)
    return laws.solve(fit.form, points.x, y, loss=loss)


def _pairs(points: Points, fit: CurveFit, loss: bool, n_boot: int, rng: np.random.Generator) -> Curves:
    """Weights count how often a configuration was drawn; its value stays the mean of its own seeds."""
    n, needed = len(points), laws.N_PARAMS[fit.form] + 1
    _, place = np.unique(points.x, return_inverse=True)
    picks = rng.integers(n, size=(n_boot, n))
    for row in range(n_boot):  # a draw with too few distinct x has no fit: it is drawn again
        while len(np.unique(place[picks[row]])) < needed:
            picks[row] = rng.integers(n, size=n)
    weights = np.zeros((n_boot, n))
    np.add.at(weights, (np.arange(n_boot)[:, None], picks), 1.0)
    y = np.broadcast_to(points.mean, (n_boot, n))
    return laws.solve(fit.form, points.x, y, weights, loss=loss)


def _run_noise(points: Points, fit: CurveFit) -> float:
    """Root mean square of single runs' residuals around the curve on the fit's scale, corrected for leverage."""
    predicted = _link(fit.form, fit.at(points.x))
    shrink = np.sqrt(_correction(points, fit))
    parts = [(_link(fit.form, run) - z) / s for run, z, s in zip(points.runs, predicted, shrink)]
    return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))
