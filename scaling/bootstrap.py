"""Bootstrap intervals of one-variable laws: pairs over configurations, or wild where configurations are few.

*pairs* resamples whole configurations, each with all its seeds: the scatter of configuration means around
the law already contains the seeds' noise, and resampling the seeds as well would count it twice (Davison
and Hinkley 1997, section 3.8; in simulation such 95 % intervals covered 100 %). With few configurations
pairs lose whole sizes, so below `PAIRS_FROM` configurations the *wild* bootstrap keeps every x and
multiplies each configuration's leverage-corrected residual by one of Webb's six weights. The method used
is always named. Joint draws are kept, because the parameters of a law are so correlated that separate
standard errors mislead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling import laws
from scaling.fit import CurveFit, Points, leverage
from scaling.laws import Curves
from scaling.table import FloatArray

PAIRS_FROM = 13
LEVEL = 0.95
# Webb (2014): mean 0, variance 1, six values, so that few clusters still give many distinct resamples.
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
_MAX_LEVERAGE = 0.99


@dataclass(frozen=True)
class Bootstrap:
    """Joint draws of one fitted curve.

    `method` is "pairs" or "wild"; `draws` are R curves; `noise` is the standard deviation of a single run around the
    curve (seeds included, corrected for leverage, on the fit's scale) with `freedom` degrees of freedom: it widens a
    curve interval into a prediction interval for one new run.
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
            return f"pairs bootstrap over configurations (seeds kept together), {len(self.draws)} draws"
        return f"wild bootstrap of configuration residuals (Webb weights, HC3), {len(self.draws)} draws"

    def params(self) -> dict[str, tuple[float, float]]:
        """The 95 % percentile interval of each parameter."""
        return {name: interval(values) for name, values in self.draws.params().items()}

    def curve(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the expected metric at x."""
        return _limits(self.draws.at(x))

    def prediction(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Lower and upper 95 % limits (n,) of the metric of ONE new run at x: curve uncertainty plus run noise."""
        values = self.draws.at(x)
        # Student's t, not the residuals themselves: a handful of residuals never shows the tail of a new run.
        noise = self.noise * np.random.default_rng([self.seed, 1]).standard_t(self.freedom, size=values.shape)
        if self.draws.form in laws.LOGARITHMIC:
            return _limits(values * np.exp(noise))
        return _limits(values + noise)


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
    pairs = len(points) >= PAIRS_FROM
    draws = (_pairs if pairs else _wild)(points, fit, loss, n_boot, rng)
    freedom = len(points) - laws.N_PARAMS[fit.form]
    return Bootstrap("pairs" if pairs else "wild", draws, _run_noise(points, fit), freedom, seed)


def interval(values: FloatArray, level: float = LEVEL) -> tuple[float, float]:
    """The central percentile interval by order statistics, so that infinities are allowed and never interpolated."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _limits(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    tail = (1 - LEVEL) / 2
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


def _wild(points: Points, fit: CurveFit, loss: bool, n_boot: int, rng: np.random.Generator) -> Curves:
    predicted = _link(fit.form, fit.at(points.x))
    # Dividing by (1 - h), the jackknife-like correction, keeps the intervals honest with 5 to 12 configurations.
    residual = (_link(fit.form, points.mean) - predicted) / _correction(points, fit)
    weights = rng.choice(WEBB, size=(n_boot, len(points)))
    y = _unlink(fit.form, predicted + weights * residual)
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
