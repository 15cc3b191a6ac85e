"""A panel: the families of one study on one dataset against one x, what they share and how they compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling.family import FamilyResult, FamilyTrials, Settings, analyse_family, family_points, mixed
from scaling.fit import Points, Warn
from scaling.frontier import Comparison, Family, compare, compare_exponents
from scaling.table import BoolArray, Table
from scaling.trials import alike, fittable

# A classical ranker's whole name, with a version or a remark after it at most: "dcn_v2" is one, "dinner" is not.
_BASELINES = re.compile(r"(dlrm|dcn|deepfm|wukong|din|mlp)(v\d+)?([^a-z0-9].*)?")
_STANDARD_BASELINE = "dlrm"
# Settings that have a best value rather than a direction of growth: along them there is no law to fit.
_RATES = frozenset({"learning_rate", "embedding_learning_rate", "learning_rate_factor"})
TUNED = _RATES | {"batch_rows"}
_FEWEST_X = 4
# Each family's bootstrap has a seed of its own: comparisons take the draws of two families as independent.
_SEED_STEP = 7919


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

    @property
    def place(self) -> tuple[str, str, str]:
        """Study, dataset and metric: the panels that share them make one section of a page."""
        return self.study, self.dataset, self.metric

    @property
    def comparable(self) -> bool:
        """Whether the families were scored on the same evaluation set, as far as the table says."""
        return all(warn.code != "mixed_eval_set" for warn in self.warnings)

    @property
    def fitted(self) -> list[Family]:
        """The families that have a law."""
        return [family for one in self.families if (family := one.family) is not None]


def usable(table: Table, s: Settings) -> BoolArray:
    """Mask (rows,) of finished trials with a positive x and a value of the metric."""
    return fittable(table, s.x) & np.isfinite(table.numbers(s.metric))


def analyse_panel(part: Table, study: str, dataset: str, s: Settings, axis: str | None) -> Panel:
    """Fit and compare the families of one section; the panel has no families where none has a usable trial."""
    trials = _by_family(part, s)
    plain = _why_plain([one.points for one in trials], axis, s)
    families = [analyse_family(one, s, law=not plain) for one in trials]
    if plain:
        families = [replace(f, lines=_lines(f, axis, s.x)) for f in families]
    shown = part.where(usable(part, s))
    warnings = _shared_warnings(shown) if len(families) > 1 else []
    comparable = axis is None and all(w.code != "mixed_eval_set" for w in warnings)
    return Panel(
        study=study,
        dataset=dataset,
        metric=s.metric,
        x=s.x,
        axis=axis,
        families=tuple(families),
        comparisons=tuple(_comparisons(families, s)) if comparable else (),
        warnings=tuple(warnings),
        plain=plain,
        axes=tuple(shown.distinct("axis")),
        histories=tuple(shown.distinct("history")),
    )


def _by_family(part: Table, s: Settings) -> list[FamilyTrials]:
    """The families that have a usable trial, in first-seen order."""
    names = part.text(s.group, "(unnamed)")
    kept = usable(part, s)
    found = []
    for i, name in enumerate(dict.fromkeys(names)):
        own = np.array([n == name for n in names])
        table = part.where(own & kept)
        if len(table):
            lost = int((own & ~kept).sum())
            found.append(FamilyTrials(name, table, family_points(table, s), lost, s.seed + _SEED_STEP * i))
    return found


def _why_plain(points: Sequence[Points], axis: str | None, s: Settings) -> str:
    """Why a panel of these families carries no law, or nothing."""
    said = "joined by lines, and no law is fitted, extrapolated or compared"
    if axis in TUNED:
        name = axis.replace("_", " ")
        return f"A plain comparison: the {name} is tuned, not scaled; points that differ in it alone are {said}."
    if s.form == "auto" and all(len(np.unique(p.x)) < _FEWEST_X for p in points):
        return f"A plain comparison: no family has {_FEWEST_X} distinct x; points are {said}."
    return ""


def _lines(family: FamilyResult, axis: str | None, x: str) -> tuple[tuple[int, ...], ...]:
    """The points that differ in nothing but x, where x is a tuned setting; elsewhere all of them are one line."""
    if axis not in TUNED:
        return (tuple(range(len(family.points))),)
    # The embedding's rate follows the other by a rule; labels name the rate too.
    return alike(family.table, x, {"label", "axis_value", axis, *(_RATES if axis in _RATES else ())})


def _shared_warnings(table: Table) -> list[Warn]:
    """What families drawn together should agree on and do not: each may be of one kind, and still differ."""
    silent = "; the families are not compared"
    return [Warn(w.code, w.text + silent) if w.code == "mixed_eval_set" else w for w in mixed(table)]


def _comparisons(families: Sequence[FamilyResult], s: Settings) -> list[Comparison]:
    fitted = [family for f in families if (family := f.family) is not None]
    if len(fitted) < 2:
        return []
    base = _base(fitted, s)
    every = {f.name: {form: (fit, f.boots[form]) for form, fit in f.fits.items()} for f in families}
    return [
        replace(compare(base, family), exponents=compare_exponents(every[base.name], every[family.name]))
        for family in fitted
        if family.name != base.name
    ]


def _base(fitted: Sequence[Family], s: Settings) -> Family:
    """The family to compare with: the one asked for, else DLRM, else the best classical one, else the worst of all.

    The best classical ranker, because beating a weak baseline would show nothing.
    """
    sign = 1.0 if s.rising else -1.0

    def quality(family: Family) -> float:
        return float(np.max(sign * family.points.mean))

    asked = [f for f in fitted if f.name == s.base]
    standard = [f for f in fitted if f.name.lower() == _STANDARD_BASELINE]
    if asked or standard:
        return (asked or standard)[0]
    classical = [f for f in fitted if _BASELINES.fullmatch(f.name.lower())]
    return max(classical, key=quality) if classical else min(fitted, key=quality)
