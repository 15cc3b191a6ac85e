"""Fit one family's curve: points, forms, their comparison by AICc and by rolling held-out error, and warnings.

The unit of a fit is the *configuration* (everything but the seed): its seeds are averaged, and each
configuration counts once. Nothing here resamples; intervals are `scaling.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling import laws
from scaling.broken import break_range, derivatives, width_range
from scaling.laws import Curves
from scaling.table import FloatArray

MIN_CONFIGS, MIN_DECADES, MAX_CONDITION, MAX_EXTRAPOLATION = 5, 1.5, 1e4, 10.0
_MAX_CUTS = 5
# Forms this close in AICc are not told apart by it (Burnham & Anderson); the held-out error then decides.
AICC_TIE = 2.0
# A form this much higher in AICc has no support beside the lowest (the same source).
REJECTED_GAP = 10.0


@dataclass(frozen=True)
class Warn:
    """One caution about a fit: a stable code and one sentence."""

    code: str
    text: str


@dataclass(frozen=True)
class Points:
    """The runs of one family: x (n,) of each configuration, and the metric of each of its seeds."""

    x: FloatArray
    runs: tuple[FloatArray, ...]
    labels: tuple[str, ...] = ()

    @property
    def mean(self) -> FloatArray:
        """The mean over seeds (n,)."""
        return np.array([np.mean(run) for run in self.runs], dtype=np.float64)

    @property
    def spread(self) -> FloatArray:
        """The standard deviation over seeds (n,), NaN for a configuration with one seed."""
        return np.array([np.std(run, ddof=1) if len(run) > 1 else math.nan for run in self.runs])

    @property
    def n_runs(self) -> int:
        """How many runs there are, seeds counted."""
        return sum(len(run) for run in self.runs)

    @property
    def decades(self) -> float:
        """The range of x in powers of ten."""
        return float(np.log10(self.x.max() / self.x.min()))

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class HeldOut:
    """Errors of a form fitted below one cut of x and scored above it (`mape` and `max_error` in per cent)."""

    cut: float
    n_train: int
    n_test: int
    mape: float
    bias: float
    max_error: float
    extrapolation: float


@dataclass(frozen=True)
class CurveFit:
    """One form fitted to one family.

    `params` are those of `laws.EQUATIONS[form]`; `rss` and `aicc` are in the metric's own units (the likelihood
    of a law fitted to ln y carries the logarithm's Jacobian, so the forms' AICc compare); `condition` is that of
    the Jacobian with unit columns; `at_bound` names parameters that stopped at the edge of their range.
    """

    form: str
    curves: Curves
    params: dict[str, float]
    n: int
    rss: float
    r2: float
    mape: float
    aicc: float
    condition: float
    at_bound: tuple[str, ...]
    held_out: tuple[HeldOut, ...] = field(default=())

    def at(self, x: FloatArray | Sequence[float]) -> FloatArray:
        """The curve's values at x (n,)."""
        return self.curves.at(np.asarray(x, dtype=np.float64))[0]

    @property
    def degenerate(self) -> bool:
        """True where the exponent vanished: the curve is the log-linear law, its constant means nothing."""
        return "b=0" in self.at_bound

    @property
    def held_out_mape(self) -> float:
        """The mean held-out error over the cuts in per cent, NaN without cuts."""
        return float(np.mean([cut.mape for cut in self.held_out])) if self.held_out else math.nan


def fit_form(points: Points, form: str, *, loss: bool) -> CurveFit:
    """Fit one form to the configuration means.

    Raises:
        ValueError: fewer than two distinct x, a non-positive x, or a non-positive metric under the power law.
    """
    y = points.mean
    if form in laws.LOGARITHMIC and np.any(y <= 0):
        raise ValueError("a power law needs a positive metric")
    curves = laws.solve(form, points.x, y, loss=loss)
    predicted = curves.at(points.x)[0]
    rss = float(np.sum((y - predicted) ** 2))
    total = float(np.sum((y - y.mean()) ** 2))
    return CurveFit(
        form=form,
        curves=curves,
        params={name: float(value[0]) for name, value in curves.params().items()},
        n=len(y),
        rss=rss,
        r2=1.0 - rss / total if total > 0 else math.nan,
        mape=_mape(predicted, y),
        aicc=_aicc(form, y, predicted),
        condition=condition_number(curves, points.x),
        at_bound=_at_bound(curves, points.x, loss),
        held_out=tuple(_roll(points, form, loss)),
    )


def fit_forms(points: Points, *, loss: bool, forms: Sequence[str] = laws.FORMS) -> dict[str, CurveFit]:
    """Fit every form the points can carry (see `laws.FEWEST`)."""
    distinct = len(np.unique(points.x))
    positive = bool(np.all(points.mean > 0))
    usable = [f for f in forms if distinct >= laws.FEWEST[f] and (positive or f not in laws.LOGARITHMIC)]
    return {form: fit_form(points, form, loss=loss) for form in usable} if distinct > 1 else {}


def choose(fits: dict[str, CurveFit]) -> str:
    """The form to headline: lowest AICc; within 2 of it, the lowest held-out error on the cuts they share; then
    the fewest parameters.

    A degenerate "power + constant" is never chosen over the log-linear law it equals. Without a finite AICc (too few
    configurations) the first two-parameter form wins.
    """
    sound = {name: fit for name, fit in fits.items() if not fit.degenerate} or fits
    finite = {name: fit for name, fit in sound.items() if math.isfinite(fit.aicc)}
    if not finite:
        return min(sound, key=lambda name: laws.N_PARAMS[name])
    best = min(fit.aicc for fit in finite.values())
    tied = {name: fit for name, fit in finite.items() if fit.aicc <= best + AICC_TIE}
    errors = shared_held_out(tied)
    return min(tied, key=lambda name: (errors[name], laws.N_PARAMS[name]))


def shared_held_out(fits: dict[str, CurveFit]) -> dict[str, float]:
    """Each form's mean held-out error (%) over the cuts all of them were scored at; infinite where they share none.

    A form with fewer parameters is also scored at earlier, harder cuts, which would count against it alone.
    """
    shared = set.intersection(*({cut.cut for cut in fit.held_out} for fit in fits.values()))
    errors = {name: [cut.mape for cut in fit.held_out if cut.cut in shared] for name, fit in fits.items()}
    return {name: float(np.mean(own)) if own else math.inf for name, own in errors.items()}


@dataclass(frozen=True)
class Rival:
    """A form beside the chosen one: how much higher its AICc is, and both held-out errors (%) on the cuts they share.

    The errors are infinite where no cut is shared.
    """

    form: str
    aicc_gap: float
    held_out: float
    chosen_held_out: float

    @property
    def rejected(self) -> bool:
        """Whether the chosen form beats it by more than scatter explains, in AICc and, by a factor of two, held out."""
        return REJECTED_GAP < self.aicc_gap < math.inf and self.held_out > 2 * self.chosen_held_out

    @property
    def forecasts_better(self) -> bool:
        """Whether it has less than half the chosen form's held-out error: AICc, or too few runs for it, decided."""
        return 2 * self.held_out < self.chosen_held_out


def rivals(fits: dict[str, CurveFit], chosen: str) -> list[Rival]:
    """Every other form held against the chosen one."""
    best = fits[chosen]
    found = []
    for form, fit in fits.items():
        if form != chosen:
            errors = shared_held_out({chosen: best, form: fit})
            found.append(Rival(form, fit.aicc - best.aicc, errors[form], errors[chosen]))
    return found


def jacobian(curves: Curves, x: FloatArray) -> FloatArray:
    """Derivatives (n, k) of the first curve, on its fitted scale (ln y for the power law), at x.

    Columns: (p, q) of the centred basis, and the exponent b for "power + constant", or what bends a broken law.
    """
    u = np.log(x / curves.x0)
    if curves.breaks:
        return derivatives(u, *(float(curves.breaks[name][0]) for name in "mf"))
    p_column = np.ones_like(u)
    if curves.form != "power_const":
        return np.stack([p_column, u], axis=1)
    b, q = float(curves.b[0]), float(curves.q[0])
    g = laws.basis(u, curves.b[:1])
    # d/db of -expm1(-b u)/b; the first-order term stands in where the two parts cancel.
    slope = np.where(np.abs(b * u) < 1e-5, -0.5 * u**2, (u * np.exp(-b * u) - g) / b)
    return np.stack([p_column, g, (q if q != 0 else 1.0) * slope], axis=1)


def leverage(curves: Curves, x: FloatArray) -> FloatArray:
    """The diagonal (n,) of the hat matrix of the linearised fit: each point's pull on its own prediction."""
    columns = jacobian(curves, x)
    columns = columns / np.linalg.norm(columns, axis=0)
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return np.sum(left[:, singular > 1e-12 * singular[0]] ** 2, axis=1)


def condition_number(curves: Curves, x: FloatArray) -> float:
    """The condition number of the fit's Jacobian in the equation's own parameters, columns scaled to unit length."""
    if curves.form == "power_const":
        b, u = float(curves.b[0]), np.log(x / curves.x0)
        decay = np.exp(-b * u)
        columns = np.stack([np.ones_like(u), decay, u * decay], axis=1)
    else:
        columns = jacobian(curves, x)
    return float(np.linalg.cond(columns / np.linalg.norm(columns, axis=0)))


def seed_warnings(points: Points) -> list[Warn]:
    """The caution that follows from the seeds alone, with a law or without."""
    if any(len(run) > 1 for run in points.runs):
        return []
    return [Warn("one_seed", "one seed per configuration: seed noise is not measured")]


def fit_warnings(points: Points, fit: CurveFit) -> list[Warn]:
    """The cautions that follow from the points and one fit alone."""
    found: list[Warn] = []
    if len(points) < MIN_CONFIGS:
        found.append(Warn("few_configurations", f"only {len(points)} configurations (at least {MIN_CONFIGS})"))
    if points.decades < MIN_DECADES:
        found.append(Warn("short_range", f"x spans {points.decades:.2f} decades (at least {MIN_DECADES} are wanted)"))
    found += seed_warnings(points)
    if fit.at_bound:
        found.append(Warn("at_bound", f"{fit.form}: the fit stopped at the bound {', '.join(fit.at_bound)}"))
    if fit.condition > MAX_CONDITION:
        found.append(Warn("ill_conditioned", f"{fit.form}: condition number {fit.condition:.1e}: parameters trade off"))
    return found


def _at_bound(curves: Curves, x: FloatArray, loss: bool) -> tuple[str, ...]:
    if curves.breaks:
        return _break_at_bound(curves, x)
    if curves.form != "power_const":
        return ()
    low, high = laws.exponent_bounds(x)
    b, p, q = float(curves.b[0]), float(curves.p[0]), float(curves.q[0])
    found = []
    if b < low * 1.01:
        found.append("b=0")
    if b > high * 0.99:
        found.append("b=max")
    if loss and abs(p + q / b) <= 1e-9 * abs(p):
        found.append("c=0")
    if loss and q == 0:
        found.append("a=0")
    return tuple(found)


def _break_at_bound(curves: Curves, x: FloatArray) -> tuple[str, ...]:
    u = np.log(x / curves.x0)
    (low, high), (narrow, wide) = break_range(u), width_range(u)
    m, f = float(curves.breaks["m"][0]), float(curves.breaks["f"][0])
    edge = 1e-6 * (high - low)
    found = () if low + edge < m < high - edge else ("d",)
    if f < narrow * (1 + 1e-6):
        return *found, "f=min"
    return (*found, "f=max") if f > wide * (1 - 1e-6) else found


def _aicc(form: str, y: FloatArray, predicted: FloatArray) -> float:
    """AIC with the small-sample correction; the error variance counts as a parameter. Infinite without freedom."""
    n, k = len(y), laws.N_PARAMS[form] + 1
    if n - k - 1 <= 0:
        return math.inf
    log = form in laws.LOGARITHMIC
    residual = np.log(y) - np.log(predicted) if log else y - predicted
    scale = 1.0 if log else float(np.max(np.abs(y))) or 1.0
    # Noise-free data would give ln 0; a floor at rounding error lets the parameter count decide instead.
    rss = max(float(np.sum(residual**2)), n * (1e-10 * scale) ** 2)
    minus_two_log_likelihood = n * (math.log(2 * math.pi * rss / n) + 1)
    if log:
        minus_two_log_likelihood += 2 * float(np.sum(np.log(y)))
    return minus_two_log_likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _mape(predicted: FloatArray, y: FloatArray) -> float:
    """Mean absolute relative error in per cent."""
    return float(np.mean(np.abs(predicted - y) / np.abs(y)) * 100) if np.all(y != 0) else math.nan


def _roll(points: Points, form: str, loss: bool) -> list[HeldOut]:
    """Fit below each of several cuts and score every point above it."""
    y = points.mean
    if np.any(y == 0):
        return []
    distinct = np.unique(points.x)
    # Every form draws from one list of cuts, so that their errors share cuts to be compared on.
    cuts = distinct[min(laws.N_PARAMS.values()) + 1 :]
    if len(cuts) > _MAX_CUTS:
        cuts = cuts[np.unique(np.linspace(0, len(cuts) - 1, _MAX_CUTS).round().astype(int))]
    # One point more than parameters, or the fit below the cut is an interpolation.
    fewest = max(laws.N_PARAMS[form] + 1, laws.FEWEST[form])
    return [_held_out(points.x, y, form, float(cut), loss) for cut in cuts if np.sum(distinct < cut) >= fewest]


def _held_out(x: FloatArray, y: FloatArray, form: str, cut: float, loss: bool) -> HeldOut:
    train, test = x < cut, x >= cut
    predicted = laws.solve(form, x[train], y[train], loss=loss).at(x[test])[0]
    relative = (predicted - y[test]) / np.abs(y[test]) * 100
    return HeldOut(
        cut=cut,
        n_train=int(train.sum()),
        n_test=int(test.sum()),
        mape=float(np.mean(np.abs(relative))),
        bias=float(np.mean(relative)),
        max_error=float(np.max(np.abs(relative))),
        extrapolation=float(x[test].max() / x[train].max()),
    )
