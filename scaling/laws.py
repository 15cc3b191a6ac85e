"""The one-variable laws, solved exactly and in batches.

    loglin       y = a + b ln x            least squares in y
    power        y = a x^-b                least squares in ln y
    power_const  y = c + a x^-b            least squares in y, variable projection
    broken       see `scaling.broken`      least squares in ln y, variable projection

Every curve is stored in a centred form that stays well conditioned: with u = ln(x/x0), x0 the geometric
mean of x,

    loglin       y = p + q u
    power        ln y = p + q u
    power_const  y = p + q g_b(u),  g_b(u) = -expm1(-b u)/b
    broken       ln y = p + q u - c g(u)

g_b tends to u as b tends to 0, so a "power + constant" whose exponent vanishes *is* the log-linear law,
without the cancelling of two huge numbers that c + a x^-b would suffer. All arrays are float64 and carry
a leading axis R of curves, so that the bootstrap refits a thousand resamples in a few matrix operations.
Source of the projection: Golub and Pereyra (1973).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scaling.broken import bend, solve_broken
from scaling.table import BoolArray, FloatArray

FORMS = ("loglin", "power", "power_const", "broken")
N_PARAMS = {"loglin": 2, "power": 2, "power_const": 3, "broken": 5}
# Distinct x that a form is fitted to: a break is told from noise by six on either side.
FEWEST = {"loglin": 2, "power": 2, "power_const": 3, "broken": 12}
LOGARITHMIC = frozenset({"power", "broken"})  # forms whose residuals are those of ln y
EQUATIONS = {
    "loglin": "y = a + b ln x",
    "power": "y = a x^-b",
    "power_const": "y = c + a x^-b",
    "broken": "y = a x^-b (1 + (x / d)^(1 / f))^(-c f)",
}
FORM_NAMES = {
    "loglin": "log-linear",
    "power": "power law",
    "power_const": "power law + constant",
    "broken": "broken power law",
}
ESTIMATORS = {
    "loglin": "least squares in y, closed form",
    "power": "least squares in ln y, closed form",
    "power_const": "least squares in y by variable projection: exponent by grid and zoom, (c, a) exactly",
    "broken": "least squares in ln y by variable projection: break and width by grid and zoom, (a, b, c) exactly",
}

# The exponent is searched where b * (range of ln x) lies in these bounds. Below the first the curve differs from a
# log-linear one by less than 1e-4 of its own span; above the second the law only describes the smallest run.
_SPAN_LOW, _SPAN_HIGH, _EXPONENT_MAX = 1e-3, 40.0, 8.0
_GRID, _ZOOM_POINTS, _ZOOMS = 257, 17, 11
_BLOCK = 2_000_000  # elements of one work array: keeps a thousand draws within tens of megabytes


@dataclass(frozen=True)
class Curves:
    """R curves of one form on the centred basis of this module; `p`, `q`, `b` are (R,), `x0` is in units of x.

    `breaks`: of broken curves c, m and f (R,), see `scaling.broken`.
    """

    form: str
    x0: float
    p: FloatArray
    q: FloatArray
    b: FloatArray
    breaks: dict[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.p)

    def at(self, x: FloatArray) -> FloatArray:
        """The curves' values (R, len(x)) at x > 0."""
        u = np.log(x / self.x0)
        z = self.p[:, None] + self.q[:, None] * basis(u, self.b[:, None])
        if self.breaks:
            c, m, f = (self.breaks[name][:, None] for name in "cmf")
            z -= c * bend(u, m, f)
        return np.exp(z) if self.form in LOGARITHMIC else z

    def inverse(self, y: FloatArray) -> FloatArray:
        """ln x (R, len(y)) at which each curve takes the value y; +inf beyond an asymptote, NaN for a flat curve."""
        if self.breaks:
            return self._searched(np.log(y))
        z = np.log(y) if self.form == "power" else y
        with np.errstate(divide="ignore", invalid="ignore"):
            g = (z[None, :] - self.p[:, None]) / self.q[:, None]
            b = self.b[:, None]
            inside = 1.0 - b * g
            bent = np.where(inside > 0, -np.log(np.where(inside > 0, inside, 1.0)) / b, np.inf)
            u = np.where(b > 0, bent, g)
        return np.where(np.isfinite(u), u + np.log(self.x0), np.where(np.isnan(u), np.nan, np.inf))

    def _searched(self, z: FloatArray) -> FloatArray:
        """As `inverse`, of ln y = z, by bisection; NaN for curves that turn round at the break."""
        reach = np.full((len(self), len(z)), 60.0)
        low, high = -reach, reach.copy()
        rising = np.where(self.q - self.breaks["c"] == 0, self.q, self.q - self.breaks["c"])
        monotone = (self.q * rising >= 0) & (rising != 0)
        c, m, f = (self.breaks[name][:, None] for name in "cmf")
        for _ in range(60):
            middle = 0.5 * (low + high)
            value = self.p[:, None] + self.q[:, None] * middle - c * bend(middle, m, f)
            beyond = (value > z) == (rising > 0)[:, None]
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        found = np.where(np.abs(low) < 59.9, low, np.inf)
        return np.where(monotone[:, None], found + np.log(self.x0), np.nan)

    def params(self) -> dict[str, FloatArray]:
        """The parameters (R,) of the equation as written in `EQUATIONS`."""
        shift = np.log(self.x0)
        if self.form == "loglin":
            return {"a": self.p - self.q * shift, "b": self.q}
        if self.form == "power":
            return {"a": np.exp(self.p - self.q * shift), "b": -self.q}
        if self.form == "broken":
            own = self.breaks
            with np.errstate(over="ignore"):
                a, d = np.exp(self.p - self.q * shift), np.exp(own["m"] + shift)
            return {"a": a, "b": -self.q, "c": own["c"], "d": d, "f": own["f"]}
        scale = -self.q / self.b
        constant = self.p - scale
        # At the bound c = 0 the difference of two equal numbers leaves rounding: it is the zero it stands for.
        constant = np.where(np.abs(constant) <= 1e-12 * np.abs(self.p), 0.0, constant)
        with np.errstate(over="ignore"):  # a steep exponent at a large x0: the coefficient is infinite in float64
            coefficient = scale * np.exp(self.b * shift)
        return {"c": constant, "a": coefficient, "b": self.b}


def basis(u: FloatArray, b: FloatArray) -> FloatArray:
    """g_b(u) = -expm1(-b u)/b, and u itself where b is 0; broadcasts."""
    b = np.asarray(b, dtype=np.float64)
    safe = np.where(b > 0, b, 1.0)
    return np.where(b > 0, -np.expm1(-safe * u) / safe, u)


def exponent_bounds(x: FloatArray) -> tuple[float, float]:
    """The interval searched for the exponent of `power_const`, given all x (any shape)."""
    span = float(np.log(np.max(x)) - np.log(np.min(x)))
    high = min(_SPAN_HIGH / span, _EXPONENT_MAX)
    return min(_SPAN_LOW / span, 0.1 * high), high


def solve(form: str, x: FloatArray, y: FloatArray, w: FloatArray | None = None, *, loss: bool) -> Curves:
    """Fit R data sets that share x.

    Args:
        form: one of `FORMS`.
        x: (n,), positive, at least two distinct values.
        y: (R, n) or (n,); positive for the forms `power` and `broken`.
        w: (R, n) non-negative weights, or None for equal ones.
        loss: the metric falls and is positive: `power_const` then obeys a >= 0 and c >= 0. Otherwise signs are free.

    Raises:
        ValueError: an unknown form, fewer than two distinct x, or a non-positive x.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: use one of {', '.join(FORMS)}")
    if np.any(x <= 0) or len(np.unique(x)) < 2:
        raise ValueError("a law needs at least two distinct positive values of x")
    y = np.atleast_2d(y)
    w = np.ones_like(y) if w is None else np.broadcast_to(w, y.shape)
    x0 = float(np.exp(np.mean(np.log(x))))
    u = np.log(x / x0)
    if form == "power_const":
        p, q, b = _solve_power_const(u, y, w, exponent_bounds(x), loss)
        return Curves(form, x0, p, q, b)
    if form == "broken":
        own = solve_broken(u, np.log(y), w)
        breaks = {name: own[name] for name in "cmf"}
        return Curves(form, x0, own["p"], -own["b"], np.zeros(len(y)), breaks)
    z = np.log(y) if form == "power" else y
    zero = np.zeros((1, 1))
    p, q, _ = _project(u, z, w, zero, nonnegative=False)
    return Curves(form, x0, p[:, 0], q[:, 0], np.zeros(len(y)))


def _solve_power_const(
    u: FloatArray, y: FloatArray, w: FloatArray, bounds: tuple[float, float], loss: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Global search over the exponent: a dense geometric grid brackets the best cell, repeated zooms refine it."""
    grid = np.geomspace(*bounds, _GRID)
    rows = max(1, _BLOCK // (_GRID * len(u)))
    parts = [_search(u, y[i : i + rows], w[i : i + rows], grid, loss) for i in range(0, len(y), rows)]
    p, q, b = (np.concatenate(column) for column in zip(*parts))
    return p, q, b


def _search(
    u: FloatArray, y: FloatArray, w: FloatArray, grid: FloatArray, loss: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    b = np.broadcast_to(grid, (len(y), len(grid)))
    each = np.arange(len(y))
    steps = np.linspace(0.0, 1.0, _ZOOM_POINTS)
    for _ in range(_ZOOMS):
        p, q, rss = _project(u, y, w, b, nonnegative=loss)
        best = np.argmin(rss, axis=1)
        low = b[each, np.maximum(best - 1, 0)]
        high = b[each, np.minimum(best + 1, b.shape[1] - 1)]
        chosen = p[each, best], q[each, best], b[each, best]
        b = low[:, None] * (high / low)[:, None] ** steps
    return chosen


def _project(
    u: FloatArray, y: FloatArray, w: FloatArray, b: FloatArray, *, nonnegative: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """For each exponent the exact weighted least-squares (p, q) and its residual sum of squares, all (R, G).

    With `nonnegative`, c = p + q/b and a = -q/b must not be negative. Two unknowns leave three active sets (both free,
    c = 0, a = 0), so trying them all is the exact solution of the constrained problem.
    """
    g = basis(u, b[:, :, None])  # (R or 1, G, n)
    total = w.sum(axis=1)[:, None]
    y_mean = (w * y).sum(axis=1)[:, None] / total
    g = np.broadcast_to(g, (len(y), *g.shape[1:]))
    g_mean = np.einsum("rn,rgn->rg", w, g) / total
    centred = g - g_mean[:, :, None]
    spread = np.einsum("rn,rgn->rg", w, centred**2)
    slope = np.einsum("rn,rgn->rg", w * (y - y_mean), centred) / np.where(spread > 0, spread, 1.0)
    p, q = y_mean - slope * g_mean, slope
    if nonnegative:
        p, q = _nonnegative(u, y, w, b, g, p, q)
    residual = y[:, None, :] - p[:, :, None] - q[:, :, None] * g
    return p, q, np.einsum("rn,rgn->rg", w, residual**2)


def _nonnegative(
    u: FloatArray,
    y: FloatArray,
    w: FloatArray,
    b: FloatArray,
    g: FloatArray,
    p: FloatArray,
    q: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    flat = (w * y).sum(axis=1)[:, None] / w.sum(axis=1)[:, None]  # a = 0: the weighted mean
    decay = 1.0 - b[:, :, None] * g  # exp(-b u)
    scale = np.einsum("rn,rgn->rg", w * y, decay) / np.einsum("rn,rgn->rg", w, decay**2)  # c = 0
    squares = np.einsum("rn,rgn->rg", w, (y[:, None, :] - scale[:, :, None] * decay) ** 2)
    flat_squares = (w * (y - flat) ** 2).sum(axis=1)[:, None]
    feasible: BoolArray = (q <= 0) & (p * b + q >= 0)
    proportional = squares < flat_squares
    edge_p = np.where(proportional, scale, flat)
    edge_q = np.where(proportional, -scale * b, 0.0)
    return np.where(feasible, p, edge_p), np.where(feasible, q, edge_q)
