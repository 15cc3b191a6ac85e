"""How the trials of a page were made, scored and fitted: what a reader who was not there must know first."""

from __future__ import annotations

from scaling.laws import FORM_NAMES
from scaling.metrics import higher_is_better, metric_name
from scaling.plots import X_NAMES
from scaling.records import range_text, sentence, split_text, values_text
from scaling.study import Analysis
from scaling.table import Table
from scaling.trials import done


def question(analysis: Analysis) -> str:
    """What a page without a question of its own asks."""
    metrics = " and ".join(dict.fromkeys(metric_name(panel.metric) for panel in analysis.panels))
    names = list(dict.fromkeys(family.name for panel in analysis.panels for family in panel.families))
    whom = f", for each {analysis.group}: {', '.join(names)}" if len(names) > 1 else ""
    return f"How does {metrics} change with {X_NAMES.get(analysis.x, analysis.x)}{whom}?"


def protocol(analysis: Analysis, table: Table) -> list[tuple[str, str]]:
    """(Step, what was done) pairs; what the table does not record is left to the checklist, which says so."""
    steps = [
        ("Trials", _trials(analysis, table)),
        ("Training", _training(analysis, table)),
        ("Scoring", _scoring(analysis, table)),
        ("Fitting", _fitting(analysis)),
    ]
    return [(name, text) for name, text in steps if text]


def _trials(analysis: Analysis, table: Table) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in analysis.counts.items())
    families = [family for panel in analysis.panels for family in panel.families]
    names = list(dict.fromkeys(family.name for family in families))
    per = sorted({len(family.points) for family in families})
    seeds = sorted({len(run) for family in families for run in family.points.runs})
    return (
        f"{len(table)} trials ({counts}) of {_count(len(names), 'family', 'families')}: {', '.join(names)}. "
        f"Configurations of a family: {_span(per)}; seeds of a configuration: {_span(seeds)}."
    )


def _count(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"


def _span(values: list[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _training(analysis: Analysis, table: Table) -> str:
    sizes = {analysis.x: X_NAMES.get(analysis.x, analysis.x), "targets": "targets", "dense_params": "dense parameters"}
    said = [range_text(table, column, name) for column, name in sizes.items() if table.has(column)]
    named = {"recipe": "recipe", "epochs": "epochs", "history": "history length", "flops_formula": "FLOPs counted as"}
    said += [f"{name}: {values_text(table, column)}" for column, name in named.items() if table.has(column)]
    return sentence("; ".join(said)) + "."


def _scoring(analysis: Analysis, table: Table) -> str:
    metrics = dict.fromkeys(panel.metric for panel in analysis.panels)
    said = [f"{metric_name(m)}, {'higher' if higher_is_better(m) else 'lower'} is better" for m in metrics]
    finished = table.where(done(table))
    if finished.has("impressions"):
        said.append(f"impressions scored: {values_text(finished, 'impressions')}")
    if table.has("validation") and table.has("test"):
        said.append(f"split: {split_text(table)}")
    if table.has("candidates"):
        said.append(f"candidates per request: {values_text(table, 'candidates')}")
    return "; ".join(said) + "."


def _fitting(analysis: Analysis) -> str:
    families = [family for panel in analysis.panels for family in panel.families]
    tried = dict.fromkeys(form for family in families for form in family.fits)
    if not tried:
        return ""
    how = dict.fromkeys(family.boot.description for family in families if family.boot)
    intervals = f" Intervals are 95 %: {'; '.join(how)}." if how else ""
    return (
        f"Seeds of a configuration are averaged. To each family {', '.join(FORM_NAMES[form] for form in tried)} were "
        "fitted; the law drawn has the lowest AICc, or of those within 2 of it the lowest error on larger, held-out "
        f"sizes. Trials that did not finish take no part.{intervals}"
    )
