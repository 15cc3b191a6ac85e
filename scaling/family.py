"""One family in one panel: its points, every form fitted to them, the headline form, intervals and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.bootstrap import Bootstrap, bootstrap
from scaling.fit import MAX_EXTRAPOLATION, CurveFit, Points, Warn, choose, fit_forms, fit_warnings, seed_warnings
from scaling.frontier import Family, pareto, slope_per_decade
from scaling.joint.section import Joint, joint_law
from scaling.metrics import higher_is_better
from scaling.table import Table
from scaling.trials import configurations

_CONSISTENT = (
    ("flops_formula", "mixed_flops_formula", "the FLOPs were counted by different formulas"),
    ("eval_set", "mixed_eval_set", "the metric comes from different evaluation sets"),
)


@dataclass(frozen=True)
class Settings:
    """What `study.analyse` was asked for, which says what each means; `metric` and `x` are those of one panel.

    `joint` is True where the law in parameters and targets is fitted too.
    """

    metric: str
    x: str
    group: str
    form: str
    base: str | None
    frontier: bool
    n_boot: int
    seed: int
    predict_at: tuple[float, ...]
    joint: bool

    @property
    def rising(self) -> bool:
        """The direction of the metric."""
        return higher_is_better(self.metric)


@dataclass(frozen=True)
class Prediction:
    """The curve at one x beyond or inside the data: value, curve interval, and interval of one new run.

    `extrapolation` is how many times x lies outside the observed range, 1 inside it.
    """

    x: float
    value: float
    curve: tuple[float, float] | None
    one_run: tuple[float, float] | None
    extrapolation: float


@dataclass(frozen=True)
class FamilyTrials:
    """The usable trials of one family in one panel; `lost` counts those left out, `seed` is of its bootstrap."""

    name: str
    table: Table
    points: Points
    lost: int
    seed: int


@dataclass(frozen=True)
class FamilyResult:
    """One family in one panel: its points, every form fitted, the headline form, its bootstrap and its warnings.

    `chosen` is None (and `boot` too) where the points carry no law; `best` indexes the best configuration; `joint` is
    None where the trials do not vary dense parameters and targets enough, or the panel is not against compute. `lines`
    are the indices of the points to join in a plain panel: points that differ in x alone.
    """

    name: str
    points: Points
    fits: dict[str, CurveFit]
    chosen: str | None
    boot: Bootstrap | None
    boots: dict[str, Bootstrap | None]
    best: int
    slope: tuple[float, tuple[float, float] | None] | None
    warnings: tuple[Warn, ...]
    predictions: tuple[Prediction, ...]
    table: Table
    joint: Joint | None = None
    lines: tuple[tuple[int, ...], ...] = ()

    @property
    def fit(self) -> CurveFit | None:
        """The headline fit."""
        return self.fits[self.chosen] if self.chosen else None

    @property
    def family(self) -> Family | None:
        """The headline fit as the comparisons take it."""
        return Family(self.name, self.points, self.fit, self.boot) if self.fit else None


def family_points(table: Table, s: Settings) -> Points:
    """The configurations of one family, or of its envelope alone where the frontier is asked for."""
    points = configurations(table, s.metric, s.x)
    if not s.frontier:
        return points
    keep = np.flatnonzero(pareto(points.x, points.mean, rising=s.rising))
    return Points(points.x[keep], tuple(points.runs[i] for i in keep), tuple(points.labels[i] for i in keep))


def analyse_family(trials: FamilyTrials, s: Settings, *, law: bool) -> FamilyResult:
    """Fit one family; with `law` False its points are kept and nothing is fitted to them."""
    points = trials.points
    loss = not s.rising and bool(np.all(points.mean > 0))
    fits = fit_forms(points, loss=loss) if law else {}
    if s.form == "auto":
        chosen = choose(fits) if fits else None
    else:
        chosen = s.form if s.form in fits else None
    boots = {f: bootstrap(points, fit, loss=loss, n_boot=s.n_boot, seed=trials.seed) for f, fit in fits.items()}
    boot = boots[chosen] if chosen else None
    fit = fits[chosen] if chosen else None
    predictions = tuple(predict(points, fit, boot, at) for at in s.predict_at) if fit else ()
    about = _law_warnings(points, fits, fit, s) if law else seed_warnings(points)
    joint = law and loss and s.joint
    return FamilyResult(
        name=trials.name,
        points=points,
        fits=fits,
        chosen=chosen,
        boot=boot,
        boots=boots,
        best=int(np.argmax(points.mean) if s.rising else np.argmin(points.mean)),
        slope=slope_per_decade(Family(trials.name, points, fit, boot)) if fit else None,
        warnings=(*about, *_data_warnings(trials), *prediction_warnings(predictions)),
        predictions=predictions,
        table=trials.table,
        joint=joint_law(trials.table, s.metric, s.x, n_boot=s.n_boot, seed=trials.seed) if joint else None,
    )


def predict(points: Points, fit: CurveFit, boot: Bootstrap | None, at: float) -> Prediction:
    """The law at one x, with 95 % intervals of the curve and of one run."""
    x = np.array([at])
    curve = one_run = None
    if boot is not None:
        (low,), (high,) = boot.curve(x)
        curve = float(low), float(high)
        (low,), (high,) = boot.prediction(x)
        one_run = float(low), float(high)
    factor = max(at / float(points.x.max()), float(points.x.min()) / at, 1.0)
    return Prediction(at, float(fit.at(x)[0]), curve, one_run, factor)


def _law_warnings(points: Points, fits: dict[str, CurveFit], fit: CurveFit | None, s: Settings) -> list[Warn]:
    """What is wrong with the headline fit, with its absence, and with an asymptote that is not the headline's."""
    if fit is None:
        asked = f"the form {s.form}" if s.form != "auto" else "any law"
        found = [Warn("no_fit", f"{len(np.unique(points.x))} distinct x are too few for {asked}")]
    else:
        found = fit_warnings(points, fit)
    bent = fits.get("power_const")
    if bent is not None and bent is not fit and bent.degenerate:
        text = "power + constant degenerates (exponent at its bound): its asymptote has no meaning here"
        found.append(Warn("at_bound", text))
    return found


def _data_warnings(trials: FamilyTrials) -> list[Warn]:
    table = trials.table
    found: list[Warn] = []
    if trials.lost:
        found.append(Warn("excluded_trials", f"trials left out of the fit (not done, or no value): {trials.lost}"))
    found += mixed(table)
    if "epochs" in table.columns and np.nanmax(table.numbers("epochs"), initial=0) > 1:
        found.append(Warn("repeated_data", "some trials repeat their data (epochs > 1): the law assumes one pass"))
    return found


def prediction_warnings(predictions: Sequence[Prediction]) -> list[Warn]:
    """That one of them is far from what was observed."""
    far = max((p.extrapolation for p in predictions), default=1.0)
    if far <= MAX_EXTRAPOLATION:
        return []
    return [Warn("far_extrapolation", f"a prediction is {far:.0f}x outside the observed x")]


def mixed(table: Table) -> list[Warn]:
    """What the rows of one table should agree on and do not."""
    kinds = [(code, text, column, len(table.distinct(column))) for column, code, text in _CONSISTENT]
    return [Warn(code, f"{text} ({count} distinct {column})") for code, text, column, count in kinds if count > 1]
