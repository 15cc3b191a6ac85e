"""`genrec recommend`: what to train with a budget, by the laws of a results table, and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.family import FamilyResult, predict, prediction_warnings
from scaling.fit import MAX_EXTRAPOLATION, Points, Warn
from scaling.frontier import pareto
from scaling.joint.allocate import allocate, fit_cost, no_optimum
from scaling.joint.section import COLUMNS, Joint
from scaling.serialise import numbers, pair_of, warnings_of
from scaling.study import Analysis, analyse
from scaling.table import FloatArray, TableError, read_table
from scaling.trials import configuration_rows

Interval = tuple[float, float]
_FEWEST = 3  # configurations of a trend
_CLOSE = 0.2  # root mean square of ln train_flops around what the sizes explain


@dataclass(frozen=True)
class Advice:
    """For one family of one study.

    sizes: dense parameters, targets and history length, by column, with 95 % intervals where the joint law gives them.
    shape: the columns ``model.*`` of a model of that size. metric, interval: of one run with the budget. nearest: the
    label of the configuration trained that spent most nearly as much, or its FLOPs. law: which one says so.
    """

    study: str
    dataset: str
    family: str
    law: str
    sizes: dict[str, tuple[float, Interval | None]]
    shape: dict[str, float]
    metric: float
    interval: Interval | None
    nearest: str
    warnings: tuple[Warn, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "study": self.study,
            "dataset": self.dataset,
            "family": self.family,
            "law": self.law,
            "sizes": {name: {"value": value, "interval": pair_of(pair)} for name, (value, pair) in self.sizes.items()},
            "shape": numbers(self.shape),
            "metric": {"value": self.metric, "interval": pair_of(self.interval)},
            "nearest": self.nearest,
            "warnings": warnings_of(self.warnings),
        }


def recommend(
    tables: Sequence[Path],
    budgets: Sequence[float],
    metric: str | None = None,
    *,
    names: Mapping[str, str] | None = None,
    n_boot: int = 1000,
) -> list[list[Advice]]:
    """For every budget: for every family of every study, the best expected metric of each study first.

    A family whose trials vary dense parameters and targets apart has a joint law, whose best use of the budget is
    recommended. Another has a law in compute alone, and the sizes that its best configurations tend to.

    Args:
        tables: results tables, or folders of studies.
        budgets: training FLOPs of each.
        metric: a column; None for each study's default.
        names: what a table of other origin calls the columns of ours, its name to ours (``family``, ``train_flops``,
            ``dense_params``, ``targets``, ``history``).
        n_boot: draws of each law.

    Raises:
        TableError: a budget that is not positive, a column that is missing, or no family with a law in compute.
    """
    for budget in budgets:
        if not budget > 0:
            raise TableError(f"a budget is a positive number of FLOPs, not {budget:g}")
    table = read_table(list(tables)).renamed(names or {})
    every = analyse(table, metric, n_boot=n_boot)
    panels = [panel for panel in every.panels if panel.axis is None and not panel.plain]
    envelopes: dict[tuple[str, str, str], FamilyResult] = {}
    if any(_spendable(family) is None for panel in panels for family in panel.families):
        best = analyse(table, metric, n_boot=n_boot, axes=False, frontier=True)
        envelopes = {(p.study, p.dataset, f.name): f for p in best.panels if p.axis is None for f in p.families}
    found: list[list[Advice]] = [[] for _ in budgets]
    for panel in panels:
        rising = _rising(every, panel.metric)
        for k, budget in enumerate(budgets):
            own = [_advice(panel.study, panel.dataset, f, envelopes, budget) for f in panel.families]
            known = [one for one in own if one is not None]
            found[k] += sorted(known, key=lambda one: one.metric, reverse=rising)
    if not all(found):
        raise TableError(f"{tables[0]}: no family has enough configurations for a law in compute")
    return found


def _rising(analysis: Analysis, metric: str) -> bool:
    from scaling.metrics import higher_is_better

    return analysis.rising if metric == analysis.metric else higher_is_better(metric)


def _advice(
    study: str, dataset: str, family: FamilyResult, envelopes: dict[tuple[str, str, str], FamilyResult], budget: float
) -> Advice | None:
    """By the joint law, else by the law of the best configurations, else by that of all."""
    at = int(np.argmin(np.abs(np.log(family.points.x / budget))))
    nearest = family.points.labels[at] or f"{family.points.x[at]:.3g} FLOPs"
    joint = _spendable(family)
    if joint is not None:
        return _by_joint_law(study, dataset, family, joint, budget, nearest)
    envelope = envelopes.get((study, dataset, family.name))
    lawful = envelope if envelope is not None and envelope.fit and envelope.boot else family
    if lawful.fit is None:
        return None
    said = predict(lawful.points, lawful.fit, lawful.boot, budget)
    sizes: dict[str, tuple[float, Interval | None]] = {}
    sizes |= {column: (value, None) for column, value in _trends(family, budget, tuple(COLUMNS.values())).items()}
    return Advice(
        study=study,
        dataset=dataset,
        family=family.name,
        law=f"{lawful.chosen} in compute, {'best configurations' if lawful is envelope else 'all configurations'}",
        sizes=sizes,
        shape=_trends(family, budget, _model_columns(family)),
        metric=said.value,
        interval=said.one_run,
        nearest=nearest,
        warnings=(*lawful.warnings, *_why_not(family), *prediction_warnings([said])),
    )


def _spendable(family: FamilyResult) -> Joint | None:
    """The joint law, if it has a best use of a budget."""
    return None if family.joint is None or no_optimum(family.joint.fit) else family.joint


def _why_not(family: FamilyResult) -> list[Warn]:
    return [Warn("no_optimum", no_optimum(family.joint.fit))] if family.joint is not None else []


def _by_joint_law(study: str, dataset: str, family: FamilyResult, joint: Joint, budget: float, nearest: str) -> Advice:
    compute = _means(family, "train_flops")
    data = {name: _means(family, COLUMNS[name]) for name in joint.fit.law.variables}
    cost = fit_cost(data, compute)
    plan = allocate(joint.fit, [budget], cost=cost, draws=joint.draws)
    sizes: dict[str, tuple[float, Interval | None]] = {
        COLUMNS[name]: (float(plan.best[name][0]), (float(plan.limits[name][0][0]), float(plan.limits[name][1][0])))
        for name in joint.fit.law.variables
    }
    warnings = [*joint.fit.warnings, *plan.warnings]
    if cost.misfit > _CLOSE:
        text = f"sizes explain what a run costs to {np.expm1(cost.misfit):.0%} only ({cost.equation})"
        warnings.append(Warn("rough_cost", text))
    for name, values in data.items():
        if not _inside(float(plan.best[name][0]), values):
            trained = f"those trained ({values.min():.3g} to {values.max():.3g})"
            text = f"{COLUMNS[name]} {plan.best[name][0]:.3g} is far outside {trained}"
            warnings.append(Warn("far_extrapolation", text))
    assert plan.one_run is not None
    return Advice(
        study=study,
        dataset=dataset,
        family=family.name,
        law=f"{joint.fit.law.equation}, {cost.equation}",
        sizes=sizes,
        shape=_shape(family, float(plan.best["n"][0])),
        metric=float(plan.loss[0]),
        interval=(float(plan.one_run[0][0]), float(plan.one_run[1][0])),
        nearest=nearest,
        warnings=tuple(warnings),
    )


def _inside(value: float, values: FloatArray) -> bool:
    return bool(values.min() / MAX_EXTRAPOLATION <= value <= values.max() * MAX_EXTRAPOLATION)


def _means(family: FamilyResult, column: str) -> FloatArray:
    """Of each configuration, in the order of its points."""
    values = family.table.numbers(column)
    return np.array([float(np.mean(values[rows])) for rows in configuration_rows(family.table, "train_flops")])


def _model_columns(family: FamilyResult) -> tuple[str, ...]:
    """The ``model.*`` columns of numbers."""
    columns = [c for c in family.table.columns if c.startswith("model.") and family.table.has(c)]
    return tuple(c for c in columns if _numeric(family.table.text(c)))


def _numeric(cells: Sequence[str]) -> bool:
    try:
        return all(float(cell) > 0 for cell in cells if cell)
    except ValueError:
        return False


def _trends(family: FamilyResult, budget: float, columns: Sequence[str]) -> dict[str, float]:
    """What the family's best configurations (no other is better with as little compute) tend to at a budget: a straight
    line of each logarithm in that of compute; nothing of columns that do not vary with fewer than three of them."""
    points: Points = family.points
    falls = family.fit is not None and float(family.fit.at([points.x.max()])[0]) < float(
        family.fit.at([points.x.min()])[0]
    )
    keep = np.flatnonzero(pareto(points.x, points.mean, rising=not falls))
    return {
        c: v
        for c in columns
        if family.table.has(c) and (v := _line_at(points.x[keep], _means(family, c)[keep], budget))
    }


def _shape(family: FamilyResult, params: float) -> dict[str, float]:
    """The ``model.*`` columns at a number of dense parameters, along all configurations."""
    n = _means(family, COLUMNS["n"])
    return {c: v for c in _model_columns(family) if (v := _line_at(n, _means(family, c), params))}


def _line_at(x: FloatArray, y: FloatArray, at: float) -> float | None:
    """A power law of y in x at one x; the value that all share; None for too few."""
    known = np.isfinite(y) & (y > 0)
    x, y = x[known], y[known]
    if len(y) and np.ptp(y) == 0:
        return float(y[0])
    if len(np.unique(x)) < _FEWEST:
        return None
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(level + slope * np.log(at)))
