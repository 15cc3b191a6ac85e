"""Compare two families on one compute axis: frontier, equal-quality compute ratio, slopes, crossing.

Every number comes from two fitted curves and their joint bootstrap draws (independent between families,
so draw i of one is paired with draw i of the other). Nothing is extrapolated: a ratio is given only for a
quality inside BOTH observed ranges, a slope only over the compute both families cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling.bootstrap import Bootstrap, interval
from scaling.fit import CurveFit, Points
from scaling.laws import Curves
from scaling.table import BoolArray, FloatArray

Interval = tuple[float, float]


@dataclass(frozen=True)
class Family:
    """One family's points, its headline curve, and the curve's bootstrap (None without residual freedom)."""

    name: str
    points: Points
    fit: CurveFit
    boot: Bootstrap | None


@dataclass(frozen=True)
class Ratio:
    """R(q) = C_base(q) / C_new(q): how many times less compute `new` needs for the quality q.

    `quality`, `ratio`, `low`, `high` are (m,), the limits NaN without a bootstrap and infinite where draws of the base
    never reach q; `reason` says why the arrays are empty. `mean`, `mean_interval`: the geometric mean over the
    qualities (the "bending" of a curve against another's), None without any.
    """

    base: str
    new: str
    quality: FloatArray
    ratio: FloatArray
    low: FloatArray
    high: FloatArray
    reason: str = ""
    mean: float | None = None
    mean_interval: Interval | None = None


@dataclass(frozen=True)
class Exponents:
    """How steep two families' laws are: the parameter b of one form fitted to both, and new minus base.

    `differ` is True where the 95 % interval of the difference leaves out zero: then not the offsets alone differ.
    """

    form: str
    base: float
    new: float
    difference: float
    interval: Interval

    @property
    def differ(self) -> bool:
        """Whether zero is outside the interval."""
        return not self.interval[0] <= 0.0 <= self.interval[1]


@dataclass(frozen=True)
class Comparison:
    """Base against new: ratio over quality, difference in metric per decade of x, and where the curves cross.

    `slope_range` is the x range both cover; `slopes` are (base, new) per decade over it. `crossings` counts how often
    the curves cross inside that range; `crossing` is the x of the first and `crossing_share` the share of draws that
    cross there at all.

    `crossing_interval` holds the x around the first crossing at which a zero gap between the curves is not rejected at
    5 %: the test of each x inverted (Fieller 1954), with a symmetric bootstrap interval of the gap (Hall 1988). It
    always holds the crossing, and draws that never cross widen it; quantiles of the draws' own crossings do neither,
    bias-corrected or not. A limit of 0 or infinity means that the range both cover holds none. `exponents`: of the form
    that describes both.
    """

    ratio: Ratio
    slope_range: Interval | None
    slopes: Interval | None
    slope_difference: float | None
    slope_interval: Interval | None
    crossings: int
    crossing: float | None
    crossing_interval: Interval | None
    crossing_share: float | None
    exponents: Exponents | None = None


def pareto(x: FloatArray, y: FloatArray, *, rising: bool) -> BoolArray:
    """Mask (n,) of the points no other point beats with as little x: the lower (or upper) envelope."""
    y = -y if rising else y
    order = np.lexsort((y, x))
    best = np.minimum.accumulate(y[order])
    keep = np.zeros(len(x), dtype=bool)
    keep[order] = np.concatenate([[True], y[order][1:] < best[:-1]])
    return keep


def observed_quality(family: Family) -> Interval:
    """The metric range a family's curve takes inside its observed x, cut to the metric it was seen to reach."""
    ends = family.fit.at(np.array([family.points.x.min(), family.points.x.max()]))
    mean = family.points.mean
    return float(max(ends.min(), mean.min())), float(min(ends.max(), mean.max()))


def compute_ratio(base: Family, new: Family, n: int = 41) -> Ratio:
    """R(q) on n qualities inside both observed ranges; empty with a reason where those do not overlap."""
    (low_a, high_a), (low_b, high_b) = observed_quality(base), observed_quality(new)
    low, high = max(low_a, low_b), min(high_a, high_b)
    if not low < high:
        empty = np.empty(0)
        reason = f"no quality is inside both observed ranges ({base.name} and {new.name} do not overlap)"
        return Ratio(base.name, new.name, empty, empty, empty, empty, reason)
    q = np.linspace(low, high, n)
    # The inverse of a near-flat curve may fall outside the observed compute by rounding: the ends are clipped.
    log_base = _inside(base, base.fit.curves.inverse(q)[0])
    log_new = _inside(new, new.fit.curves.inverse(q)[0])
    lows, highs = np.full(n, np.nan), np.full(n, np.nan)
    mean_interval = None
    if base.boot is not None and new.boot is not None:
        draws = _difference(base.boot.draws.inverse(q), new.boot.draws.inverse(q))
        low, high = interval(_mean(draws), _level(base, new))
        mean_interval = _exp(low), _exp(high)
        for j in range(n):
            low_log, high_log = interval(draws[:, j], _level(base, new))
            lows[j], highs[j] = _exp(low_log), _exp(high_log)
    mean = _exp(float(np.mean(log_base - log_new)))
    return Ratio(
        base.name, new.name, q, np.exp(log_base - log_new), lows, highs, mean=mean, mean_interval=mean_interval
    )


def _mean(logs: FloatArray) -> FloatArray:
    """Of each row (R, n): infinite where one family never gets there and the other always does."""
    up, down = np.any(logs == np.inf, axis=1), np.any(logs == -np.inf, axis=1)
    finite = np.mean(np.where(np.isfinite(logs), logs, 0.0), axis=1)
    return np.where(up & down, 0.0, np.where(up, np.inf, np.where(down, -np.inf, finite)))


Fitted = Mapping[str, tuple[CurveFit, Bootstrap | None]]


def compare_exponents(base: Fitted, new: Fitted) -> Exponents | None:
    """Of the form that describes both families best: the one with one exponent and the lowest AICc of both together.

    `base` and `new`: every form fitted, with its draws. None where no such form was fitted to both.
    """
    shared: list[tuple[float, str]] = []
    for form in ("loglin", "power", "power_const"):
        both = [fits.get(form) for fits in (base, new)]
        if all(one and one[1] and np.isfinite(one[0].aicc) and not one[0].degenerate for one in both):
            shared.append((sum(one[0].aicc for one in both if one), form))
    if not shared:
        return None
    form = min(shared)[1]
    (fit_a, boot_a), (fit_b, boot_b) = base[form], new[form]
    assert boot_a is not None
    assert boot_b is not None
    draws = boot_b.draws.params()["b"] - boot_a.draws.params()["b"]
    a, b = fit_a.params["b"], fit_b.params["b"]
    return Exponents(form, a, b, b - a, interval(draws, max(boot_a.level, boot_b.level)))


def compare(base: Family, new: Family) -> Comparison:
    """All comparisons of two families fitted to the same metric on the same x."""
    slope_range = common_x(base, new)
    slopes = difference = slope_interval = None
    crossings, crossing, crossing_interval, share = 0, None, None, None
    if slope_range is not None:
        slopes = _steepness(base, slope_range), _steepness(new, slope_range)
        difference = slopes[1] - slopes[0]
        if base.boot is not None and new.boot is not None:
            slope_interval = interval(
                _slope(new.boot.draws, slope_range) - _slope(base.boot.draws, slope_range), _level(base, new)
            )
        crossings, crossing, crossing_interval, share = _crossing(base, new, slope_range)
    return Comparison(
        ratio=compute_ratio(base, new),
        slope_range=slope_range,
        slopes=slopes,
        slope_difference=difference,
        slope_interval=slope_interval,
        crossings=crossings,
        crossing=crossing,
        crossing_interval=crossing_interval,
        crossing_share=share,
    )


def lead(first: Family, second: Family, x: float, *, rising: bool) -> tuple[float, Interval | None]:
    """How much better the first family's curve is than the second's at one x, with the interval of the difference."""
    at, sign = np.array([x]), 1.0 if rising else -1.0
    value = sign * float(first.fit.at(at)[0] - second.fit.at(at)[0])
    if first.boot is None or second.boot is None:
        return value, None
    draws = sign * (first.boot.draws.at(at) - second.boot.draws.at(at))[:, 0]
    return value, interval(draws, _level(first, second))


def slope_per_decade(family: Family) -> tuple[float, Interval | None]:
    """The mean change of the metric per tenfold x over the family's own range, with its interval."""
    ends = float(family.points.x.min()), float(family.points.x.max())
    value = _steepness(family, ends)
    return value, interval(_slope(family.boot.draws, ends), family.boot.level) if family.boot else None


def _level(*families: Family) -> float:
    """How much of the draws of several families' difference a 95 % interval takes in: as of the one that needs most."""
    return max(family.boot.level for family in families if family.boot is not None)


def _steepness(family: Family, ends: Interval) -> float:
    return float(_slope(family.fit.curves, ends)[0])


def _exp(log: float) -> float:
    """e^log, infinite where float64 would overflow."""
    return math.inf if log > 700 else math.exp(log)


def _slope(curves: Curves, ends: Interval) -> FloatArray:
    values = curves.at(np.array(ends))
    return (values[:, 1] - values[:, 0]) / np.log10(ends[1] / ends[0])


def common_x(*families: Family) -> Interval | None:
    """The range of x that all the families cover, None where there is none."""
    low = max(float(family.points.x.min()) for family in families)
    high = min(float(family.points.x.max()) for family in families)
    return (low, high) if low < high else None


def ranked(families: Iterable[Family], x: float, *, rising: bool) -> list[Family]:
    """The families by what their laws say at x, the best first."""
    return sorted(families, key=lambda family: float(family.fit.at([x])[0]), reverse=rising)


def _inside(family: Family, log_x: FloatArray) -> FloatArray:
    return np.clip(log_x, np.log(family.points.x.min()), np.log(family.points.x.max()))


def _difference(base: FloatArray, new: FloatArray) -> FloatArray:
    """ln R of each draw; +inf where only the base never gets there, -inf where only the new one, 0 where neither."""
    base, new = np.nan_to_num(base, nan=np.inf, posinf=np.inf), np.nan_to_num(new, nan=np.inf, posinf=np.inf)
    never = np.isinf(base) & np.isinf(new)
    return np.where(never, 0.0, np.where(never, 0.0, base) - np.where(never, 0.0, new))


def _crossing(base: Family, new: Family, ends: Interval) -> tuple[int, float | None, Interval | None, float | None]:
    """How often the curves cross inside `ends`, the first crossing, its interval and the share of draws that cross."""
    grid = np.geomspace(*ends, 400)
    level = new.fit.curves.at(grid)[0]
    gap = level - base.fit.curves.at(grid)[0]
    # Curves that coincide differ by rounding alone, whose signs are no crossings.
    apart = np.abs(gap) > 1e-12 * np.abs(level).max()
    count = int(np.count_nonzero(np.diff(np.signbit(gap[apart]))))
    crossing = float(_first_zero(gap[None, apart], grid[apart])[0]) if count else None
    if base.boot is None or new.boot is None:
        return count, crossing, None, None
    draws = new.boot.draws.at(grid) - base.boot.draws.at(grid)
    share = float(np.isfinite(_first_zero(draws, grid)).mean())
    limits = _crossing_limits(grid, gap, draws, crossing, _level(base, new)) if crossing is not None else None
    return count, crossing, limits, share


def _crossing_limits(grid: FloatArray, gap: FloatArray, draws: FloatArray, crossing: float, level: float) -> Interval:
    """Every x around the crossing at which "the gap is zero" is not rejected at 5 %; see `Comparison`.

    The test at one x compares |gap| (m,) with the 95 % quantile of |draw - gap| over the draws (R, m).
    """
    reach = np.quantile(np.abs(draws - gap), level, axis=0)
    at = int(np.searchsorted(grid, crossing))
    # How far each gap is beyond its reach; at the crossing the gap is zero, so it is never rejected itself.
    x, beyond = np.insert(np.log(grid), at, np.log(crossing)), np.insert(np.abs(gap) - reach, at, -reach[at - 1])
    low, high = _edge(x[at::-1], beyond[at::-1]), _edge(x[at:], beyond[at:])
    return (
        0.0 if low is None else min(float(np.exp(low)), crossing),
        math.inf if high is None else max(float(np.exp(high)), crossing),
    )


def _edge(x: FloatArray, beyond: FloatArray) -> float | None:
    """Where `beyond` (m,) first turns positive along x, linear between points; None if it never does."""
    outside = np.flatnonzero(beyond > 0)
    if not len(outside):
        return None
    j = int(outside[0])
    return float(x[j - 1] + (x[j] - x[j - 1]) * beyond[j - 1] / (beyond[j - 1] - beyond[j]))


def _first_zero(gap: FloatArray, grid: FloatArray) -> FloatArray:
    """The x (R,) of the first sign change of each row of gap (R, m), log-linear between grid points; NaN if none."""
    change = np.signbit(gap[:, 1:]) != np.signbit(gap[:, :-1])
    first = np.argmax(change, axis=1)
    each = np.arange(len(gap))
    left, right = gap[each, first], gap[each, first + 1]
    width = np.where(left == right, 1.0, left - right)
    share = np.clip(left / width, 0.0, 1.0)  # rows without a sign change are dropped below
    log_x = np.log(grid[first]) + share * np.log(grid[first + 1] / grid[first])
    return np.where(change.any(axis=1), np.exp(log_x), np.nan)
