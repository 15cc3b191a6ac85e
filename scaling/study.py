"""From a results table to fitted laws: the one analysis behind `genrec fit` and `genrec report`.

The table is split into panels, one for each study, dataset and x; each panel holds one `FamilyResult` per
family. Trials that diverged or failed are counted and shown, never fitted and never dropped in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from scaling import laws
from scaling.bootstrap import Bootstrap, bootstrap
from scaling.fit import MAX_EXTRAPOLATION, CurveFit, Points, Warn, choose, fit_forms, fit_warnings
from scaling.frontier import Comparison, Family, compare, pareto, slope_per_decade
from scaling.nd import NDFit, bootstrap_nd, fit_nd, intervals_nd
from scaling.table import BoolArray, FloatArray, Table, TableError

# What makes two trials the same configuration, the seed apart; every `model.*` column counts too.
_DESIGN = frozenset(
    [
        "study",
        "dataset",
        "family",
        "label",
        "axis",
        "axis_value",
        "history",
        "candidates",
        "epochs",
        "dense_params",
        "learning_rate",
        "embedding_learning_rate",
        "batch_rows",
        "warmup",
        "decay",
        "precision",
        "segments",
        "fraction",
        "pieces",
        "weight_decay",
        "embedding_weight_decay",
        "beta1",
        "beta2",
        "clip",
        "validation",
        "test",
    ]
)
# Seeds of one configuration may train slightly different amounts (an early stop), never this much.
_SAME_X = 1.05
_FALLING = re.compile(r"(^|[^a-z])(ne|nll|mse|rmse|mae|bce|error|perplexity)([^a-z]|$)|loss|entropy")
# A classical ranker's whole name, with a version or a remark after it at most: "dcn_v2" is one, "dinner" is not.
_BASELINES = re.compile(r"(dlrm|dcn|deepfm|wukong|din|mlp)(v\d+)?([^a-z0-9].*)?")
_STANDARD_BASELINE = "dlrm"
COMPUTE_AXES = frozenset({"train_flops", "compute"})
# Settings that have a best value rather than a direction of growth: along them there is no law to fit.
_RATES = frozenset({"learning_rate", "embedding_learning_rate"})
_TUNED = _RATES | {"batch_rows"}
_FEWEST_X = 4
# L(N, D) has five parameters. Its exponents are told apart only where N and D vary, and not together.
_JOINT_CONFIGS, _JOINT_SPREAD, _JOINT_CORRELATION, _JOINT_DRAWS = 8, 2.0, 0.95, 200
_CONSISTENT = (
    ("flops_formula", "mixed_flops_formula", "the FLOPs were counted by different formulas"),
    ("eval_set", "mixed_eval_set", "the metric comes from different evaluation sets"),
)


@dataclass(frozen=True)
class Prediction:
    """The curve at one x beyond or inside the data: value, curve interval, and interval of one new run."""

    x: float
    value: float
    curve: tuple[float, float] | None
    one_run: tuple[float, float] | None
    extrapolation: float


@dataclass(frozen=True)
class Joint:
    """The law in parameters and targets of one family, with 95 % intervals of its parameters by name."""

    fit: NDFit
    intervals: dict[str, tuple[float, float]]


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


@dataclass(frozen=True)
class Panel:
    """One study on one dataset against one x: `axis` names a swept axis, or is None for the compute law.

    `warnings` are those about the families taken together; `comparisons` is empty where the metric of the families
    comes from different evaluation sets. `plain` is empty, or the sentence that says why the panel is a plain
    comparison: points, and no law. `axes` and `histories` are the distinct values of the columns `axis` and `history`
    among the trials of the panel.
    """

    study: str
    dataset: str
    metric: str
    x: str
    axis: str | None
    families: tuple[FamilyResult, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[Warn, ...] = ()
    plain: str = ""
    axes: tuple[str, ...] = ()
    histories: tuple[str, ...] = ()


class FitOptions(TypedDict, total=False):
    """What a report passes on to `analyse`, which says what each means."""

    x: str
    group: str
    form: str
    base: str | None
    n_boot: int
    seed: int


@dataclass(frozen=True)
class Analysis:
    """Every panel of a table, with the counts of trials by status.

    `metric` is the main metric and `rising` its direction; a panel of a section without it shows its own.
    """

    metric: str
    x: str
    group: str
    rising: bool
    seed: int
    n_boot: int
    counts: dict[str, int]
    panels: tuple[Panel, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data with full-precision numbers; None stands for a value that does not exist."""
        from scaling.serialise import analysis_to_json

        return analysis_to_json(self)


def higher_is_better(metric: str) -> bool:
    """False for losses, errors and NE, True for every other metric (AUC, hit rate, NDCG, MRR, ...).

    On any split: `validation/ne` falls as `ne` does.
    """
    return _FALLING.search(metric.lower()) is None


def default_metric(table: Table) -> str:
    """The metric a report headlines: NE, else log loss, else HR@10, else the first metric column that has values."""
    present = table.metrics()
    for name in ("ne", "logloss", "hr@10"):
        if name in present:
            return name
    if not present:
        raise TableError("the table has no metric column with values (ne, logloss, auc, hr@10, ...)")
    return present[0]


def done(table: Table) -> BoolArray:
    """Mask (rows,) of trials that finished; a table without a status column is all finished trials."""
    return np.array([status == "done" for status in table.text("status", "done")], dtype=bool)


def analyse(
    table: Table,
    metric: str | None = None,
    *,
    x: str = "train_flops",
    group: str = "family",
    form: str = "auto",
    base: str | None = None,
    frontier: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
    predict_at: Sequence[float] = (),
    axes: bool = True,
    fallback: bool = True,
) -> Analysis:
    """Fit every family of every study and dataset of a table.

    No law is fitted in a panel along a tuned setting (a learning rate), nor, with form "auto", in one whose every
    family has fewer than four distinct x. A study that only tunes has no panel against compute, which does not vary.

    Args:
        table: the results.
        metric: the column to explain; a section without a value of it, and every section if None, takes its own
            `default_metric`.
        x: the column it is explained by, positive.
        group: the column whose values are the families.
        form: "auto" (see `fit.choose`) or one of `laws.FORMS` for every family.
        base: the family the others are compared with, wherever a panel has it; by default the family "dlrm",
            else the best classical ranker there, else the family with the worst best metric.
        frontier: fit only each family's envelope of best configurations at a given x.
        n_boot: bootstrap draws per family.
        seed: of the bootstrap.
        predict_at: values of x at which each law is evaluated, with intervals.
        axes: also fit the metric against `axis_value` for each swept axis (one that tunes is always shown), and the
            joint law in parameters and targets where a family's trials carry it.
        fallback: False leaves a section without the given metric out.

    Raises:
        TableError: a column is missing, or no finished trial has both x and the metric.
        ValueError: an unknown form.
    """
    if form != "auto" and form not in laws.FORMS:
        raise ValueError(f"unknown form {form!r}: use auto, {', '.join(laws.FORMS)}")
    main = metric or _main_metric(table, x)
    table.require(main, x, group)
    joint = axes and x == "train_flops" and not frontier
    settings = _Settings(main, x, group, form, base, frontier, n_boot, seed, tuple(predict_at), joint)
    if base is not None and base not in table.distinct(group):
        raise TableError(f"no trial has {group} = {base!r} (there are: {', '.join(table.distinct(group))})")
    if not _usable(table, settings).any():
        raise TableError(f"{table.origins[0].rsplit(', line', 1)[0]}: no finished trial has both {x!r} and {main!r}")
    panels: list[Panel] = []
    for study, dataset, part in sections(table):
        own = _section_metric(part, metric, x) if metric is None or fallback else metric
        if own is not None:
            panels += _panels(part, study, dataset, replace(settings, metric=own), axes)
    if not panels:
        raise TableError(f"no trial has a positive {x!r}, so {main!r} cannot be fitted against it")
    statuses = table.text("status", "done")
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return Analysis(main, x, group, higher_is_better(main), seed, n_boot, counts, tuple(panels))


def _main_metric(table: Table, x: str) -> str:
    """The default metric of the trials that can be fitted, or of all where none can (the refusal then names it)."""
    table.require(x)
    usable = table.where(_fittable(table, x))
    return default_metric(usable if usable.metrics() else table)


def _section_metric(part: Table, wanted: str | None, x: str) -> str | None:
    """The metric of one section: the wanted one where it has a value, else the section's default, if it has any."""
    present = (usable := part.where(_fittable(part, x))).metrics()
    if wanted is not None and np.isfinite(usable.numbers(wanted)).any():
        return wanted
    return default_metric(usable) if present else None


def sections(table: Table) -> list[tuple[str, str, Table]]:
    """The table split by (study, dataset), in first-seen order."""
    keys = list(zip(table.text("study"), table.text("dataset")))
    return [(*key, table.where(np.array([k == key for k in keys]))) for key in dict.fromkeys(keys)]


@dataclass(frozen=True)
class _Settings:
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
        return higher_is_better(self.metric)


def _fittable(table: Table, x: str) -> BoolArray:
    values = table.numbers(x)
    return done(table) & np.isfinite(values) & (values > 0)


def _usable(table: Table, s: _Settings) -> BoolArray:
    return _fittable(table, s.x) & np.isfinite(table.numbers(s.metric))


def _panels(part: Table, study: str, dataset: str, s: _Settings, axes: bool) -> list[Panel]:
    named = part.distinct("axis") if s.x == "train_flops" and "axis_value" in part.columns else []
    tunes = bool(named) and _TUNED.issuperset(named)
    found = [] if tunes else [_panel(part, study, dataset, s, None)]
    swept = [axis for axis in named if axis not in COMPUTE_AXES]
    if axes or tunes:
        # A prediction is asked for in units of x, never of an axis.
        along = replace(s, x="axis_value", predict_at=(), frontier=False, joint=False)
        found += [
            _panel(part.where(np.array([a == axis for a in part.text("axis")])), study, dataset, along, axis)
            for axis in swept
        ]
    return [panel for panel in found if panel.families]


def _panel(part: Table, study: str, dataset: str, s: _Settings, axis: str | None) -> Panel:
    names = part.text(s.group, "(unnamed)")
    usable = _usable(part, s)
    found: list[tuple[str, Points, Table, int, int]] = []
    for i, name in enumerate(dict.fromkeys(names)):
        own = np.array([n == name for n in names])
        if (own & usable).any():
            table = part.where(own & usable)
            found.append((name, _points(table, s), table, int((own & ~usable).sum()), s.seed + 7919 * i))
    plain = _plain([points for _, points, *_ in found], axis, s)
    families = [_family(*one, s, law=not plain) for one in found]
    if plain:
        families = [replace(f, lines=_lines(f.table, len(f.points), axis, s)) for f in families]
    shown = part.where(usable)
    warnings = _mixed_across(shown, families)
    comparable = axis is None and all(w.code != "mixed_eval_set" for w in warnings)
    comparisons = _comparisons(families, s) if comparable else []
    return Panel(
        study,
        dataset,
        s.metric,
        s.x,
        axis,
        tuple(families),
        tuple(comparisons),
        tuple(warnings),
        plain,
        tuple(shown.distinct("axis")),
        tuple(shown.distinct("history")),
    )


def _lines(own: Table, n: int, axis: str | None, s: _Settings) -> tuple[tuple[int, ...], ...]:
    """The points that differ in nothing but x, where x is a tuned setting; elsewhere all of them are one line."""
    if axis not in _TUNED:
        return (tuple(range(n)),)
    # The embedding's rate follows the other by a rule; labels name the rate too.
    free = {"label", "axis_value", axis, *(_RATES if axis in _RATES else ())}
    columns = [c for c in own.columns if (c in _DESIGN or c.startswith("model.")) and c not in free]
    lines: dict[tuple[str, ...], list[int]] = {}
    for i, rows in enumerate(_configuration_rows(own, s.x)):
        lines.setdefault(tuple(own.rows[rows[0]].get(c, "") for c in columns), []).append(i)
    return tuple(tuple(line) for line in lines.values())


def _plain(points: Sequence[Points], axis: str | None, s: _Settings) -> str:
    """Why a panel of these families carries no law, or nothing."""
    said = "joined by lines, and no law is fitted, extrapolated or compared"
    if axis in _TUNED:
        name = axis.replace("_", " ")
        return f"A plain comparison: the {name} is tuned, not scaled; points that differ in it alone are {said}."
    if s.form == "auto" and all(len(np.unique(p.x)) < _FEWEST_X for p in points):
        return f"A plain comparison: no family has {_FEWEST_X} distinct x; points are {said}."
    return ""


def _mixed(table: Table) -> list[Warn]:
    """What the rows of one table should agree on and do not."""
    kinds = [(code, text, column, len(table.distinct(column))) for column, code, text in _CONSISTENT]
    return [Warn(code, f"{text} ({count} distinct {column})") for code, text, column, count in kinds if count > 1]


def _mixed_across(table: Table, families: list[FamilyResult]) -> list[Warn]:
    """What the families drawn together should agree on and do not: each may be of one kind, and still differ."""
    found = _mixed(table) if len(families) > 1 else []
    silent = "; the families are not compared"
    return [Warn(w.code, w.text + silent) if w.code == "mixed_eval_set" else w for w in found]


def _points(own: Table, s: _Settings) -> Points:
    points = configurations(own, s.metric, s.x)
    if not s.frontier:
        return points
    keep = np.flatnonzero(pareto(points.x, points.mean, rising=s.rising))
    return Points(points.x[keep], tuple(points.runs[i] for i in keep), tuple(points.labels[i] for i in keep))


def _family(name: str, points: Points, own: Table, lost: int, seed: int, s: _Settings, *, law: bool) -> FamilyResult:
    loss = not s.rising and bool(np.all(points.mean > 0))
    fits = fit_forms(points, loss=loss) if law else {}
    chosen = (s.form if s.form in fits else None) if s.form != "auto" else (choose(fits) if fits else None)
    boots = {f: bootstrap(points, fit, loss=loss, n_boot=s.n_boot, seed=seed) for f, fit in fits.items()}
    boot = boots[chosen] if chosen else None
    fit = fits[chosen] if chosen else None
    predictions = tuple(_predict(points, fit, boot, at) for at in s.predict_at) if fit else ()
    best = int(np.argmax(points.mean) if s.rising else np.argmin(points.mean))
    return FamilyResult(
        name=name,
        points=points,
        fits=fits,
        chosen=chosen,
        boot=boot,
        boots=boots,
        best=best,
        slope=slope_per_decade(Family(name, points, fit, boot)) if fit else None,
        warnings=tuple(_warnings(points, fits, fit, own, lost, predictions, s, law=law)),
        predictions=predictions,
        table=own,
        joint=_joint(own, seed, s) if law and loss and s.joint else None,
    )


def _joint(own: Table, seed: int, s: _Settings) -> Joint | None:
    """L(N, D) over configurations, N dense parameters and D targets; None where they do not tell its terms apart."""
    if not (own.has("dense_params") and own.has("targets")):
        return None
    rows = _configuration_rows(own, s.x)
    columns = [own.numbers(name) for name in ("dense_params", "targets", s.metric)]
    n, d, y = (np.array([float(np.mean(column[one])) for one in rows]) for column in columns)
    known = np.isfinite(n) & np.isfinite(d) & (n > 0) & (d > 0)
    n, d, y = n[known], d[known], y[known]
    if len(y) < _JOINT_CONFIGS or min(len(np.unique(n)), len(np.unique(d))) < 3:
        return None
    if min(n.max() / n.min(), d.max() / d.min()) < _JOINT_SPREAD:
        return None
    if abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > _JOINT_CORRELATION:
        return None
    fit = fit_nd(n, d, y)
    draws = bootstrap_nd(n, d, y, fit, n_boot=min(s.n_boot, _JOINT_DRAWS), seed=seed)
    return Joint(fit, intervals_nd(draws))


def configurations(table: Table, metric: str, x: str) -> Points:
    """Group trials that differ only in their seed; x is averaged, the metric keeps each seed's value.

    Trials of one recorded design whose x differ by more than `_SAME_X` are told apart by x: the table then does not
    record what distinguishes them, and averaging them would invent a point.
    """
    order = _configuration_rows(table, x)
    xs, ys, labels = table.numbers(x), table.numbers(metric), table.text("label")
    return Points(
        x=np.array([float(np.mean(xs[rows])) for rows in order]),
        runs=tuple(ys[rows] for rows in order),
        labels=tuple(labels[rows[0]] for rows in order),
    )


def _configuration_rows(table: Table, x: str) -> list[list[int]]:
    """The rows of each configuration, in order of x."""
    columns = [c for c in table.columns if c in _DESIGN or c.startswith("model.")]
    xs = table.numbers(x)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(tuple(row.get(c, "") for c in columns), []).append(i)
    split: list[list[int]] = []
    for rows in groups.values():
        same = xs[rows].max() <= xs[rows].min() * _SAME_X
        split += [rows] if same else [[i for i in rows if xs[i] == value] for value in np.unique(xs[rows])]
    return sorted(split, key=lambda rows: float(np.mean(xs[rows])))


def _predict(points: Points, fit: CurveFit, boot: Bootstrap | None, at: float) -> Prediction:
    x = np.array([at])
    curve = one_run = None
    if boot is not None:
        curve = _pair(boot.curve(x))
        one_run = _pair(boot.prediction(x))
    factor = max(at / float(points.x.max()), float(points.x.min()) / at, 1.0)
    return Prediction(at, float(fit.at(x)[0]), curve, one_run, factor)


def _pair(limits: tuple[FloatArray, FloatArray]) -> tuple[float, float]:
    return float(limits[0][0]), float(limits[1][0])


def _warnings(
    points: Points,
    fits: dict[str, CurveFit],
    fit: CurveFit | None,
    own: Table,
    lost: int,
    predictions: tuple[Prediction, ...],
    s: _Settings,
    *,
    law: bool,
) -> list[Warn]:
    found: list[Warn] = []
    if not law:
        if all(len(run) < 2 for run in points.runs):
            found.append(Warn("one_seed", "one seed per configuration: seed noise is not measured"))
    elif fit is None:
        asked = f"the form {s.form}" if s.form != "auto" else "any law"
        found.append(Warn("no_fit", f"{len(np.unique(points.x))} distinct x are too few for {asked}"))
    else:
        found += fit_warnings(points, fit)
    bent = fits.get("power_const")
    if bent is not None and bent is not fit and bent.degenerate:
        text = "power + constant degenerates (exponent at its bound): its asymptote has no meaning here"
        found.append(Warn("at_bound", text))
    if lost:
        found.append(Warn("excluded_trials", f"trials left out of the fit (not done, or no value): {lost}"))
    found += _mixed(own)
    if "epochs" in own.columns and np.nanmax(own.numbers("epochs"), initial=0) > 1:
        found.append(Warn("repeated_data", "some trials repeat their data (epochs > 1): the law assumes one pass"))
    far = [p.extrapolation for p in predictions if p.extrapolation > MAX_EXTRAPOLATION]
    if far:
        found.append(Warn("far_extrapolation", f"a prediction is {max(far):.0f}x outside the observed x"))
    return found


def _comparisons(families: list[FamilyResult], s: _Settings) -> list[Comparison]:
    fitted = [f for f in families if f.family is not None]
    if len(fitted) < 2:
        return []
    base = _base(fitted, s)
    return [compare(base, f.family) for f in fitted if f.family and f.name != base.name]


def _base(fitted: list[FamilyResult], s: _Settings) -> Family:
    """The family to compare with: the one asked for, else DLRM, else the best classical one, else the worst of all.

    The best classical ranker, because beating a weak baseline would show nothing.
    """
    sign = 1.0 if s.rising else -1.0

    def quality(family: FamilyResult) -> float:
        return sign * float(family.points.mean[family.best])

    named = {f.name: f for f in fitted} | {f.name.lower(): f for f in fitted if f.name.lower() == _STANDARD_BASELINE}
    classical = [f for f in fitted if _BASELINES.fullmatch(f.name.lower())]
    usual = max(classical, key=quality) if classical else min(fitted, key=quality)
    chosen = named.get(s.base or _STANDARD_BASELINE) or named.get(_STANDARD_BASELINE) or usual
    assert chosen.family is not None
    return chosen.family


def finite(value: float | None) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
