"""From a results table to fitted laws: the one analysis behind `genrec fit` and `genrec report`.

The table is split into panels, one for each study, dataset and x; each panel holds one `FamilyResult` per
family. Trials that diverged or failed are counted and shown, never fitted and never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from scaling import laws
from scaling.family import Settings
from scaling.metrics import default_metric, has_metric, higher_is_better
from scaling.panel import TUNED, Panel, analyse_panel, usable
from scaling.table import Table, TableError
from scaling.trials import fittable, sections

COMPUTE_AXES = frozenset({"train_flops", "compute"})


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
        group: the column whose values are the families; a table without the column ``family`` is one family.
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
    table = with_families(table, group)
    table.require(main, x, group)
    joint = axes and x == "train_flops" and not frontier
    settings = Settings(main, x, group, form, base, frontier, n_boot, seed, tuple(predict_at), joint)
    if base is not None and base not in table.distinct(group):
        raise TableError(f"no trial has {group} = {base!r} (there are: {', '.join(table.distinct(group))})")
    if not usable(table, settings).any():
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


def with_families(table: Table, group: str) -> Table:
    """The table; without the default column of families all of it is one, "all runs"."""
    return table.with_column(group, "all runs") if group == "family" and group not in table.columns else table


def _main_metric(table: Table, x: str) -> str:
    """The default metric of the trials that can be fitted, or of all where none can (the refusal then names it)."""
    table.require(x)
    fitted = table.where(fittable(table, x))
    return default_metric(fitted if has_metric(fitted) else table)


def _section_metric(part: Table, wanted: str | None, x: str) -> str | None:
    """The metric of one section: the wanted one where it has a value, else the section's default, if it has any."""
    fitted = part.where(fittable(part, x))
    if wanted is not None and fitted.has_value(wanted):
        return wanted
    return default_metric(fitted) if has_metric(fitted) else None


def _panels(part: Table, study: str, dataset: str, s: Settings, axes: bool) -> list[Panel]:
    """The panels of one section that have families: the one against x, then one along each swept axis."""
    named = part.distinct("axis") if s.x == "train_flops" and "axis_value" in part.columns else []
    tunes = bool(named) and TUNED.issuperset(named)
    found = [] if tunes else [analyse_panel(part, study, dataset, s, None)]
    if axes or tunes:
        # A prediction is asked for in units of x, never of an axis.
        along = replace(s, x="axis_value", predict_at=(), frontier=False, joint=False)
        for axis in named:
            if axis not in COMPUTE_AXES:
                own = part.where(np.array([a == axis for a in part.text("axis")]))
                found.append(analyse_panel(own, study, dataset, along, axis))
    return [panel for panel in found if panel.families]
