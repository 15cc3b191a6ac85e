"""One self-contained HTML page for a results table: headline, figures, fits, warnings, checklist, every trial.

The page needs no network and no server; figures are inline SVG that follow the reader's light or dark theme, and every
figure offers its numbers as CSV. All text that comes from the table is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np

from scaling.checklist import NO_LAW, checklist
from scaling.frontier import Comparison
from scaling.laws import N_PARAMS
from scaling.page import document, esc, figure_html, table_html, theme_colour
from scaling.plots import (
    VALIDATION,
    Reference,
    held_out_figure,
    law_figure,
    metric_name,
    ratio_figure,
    residual_figure,
    x_name,
    x_symbol,
)
from scaling.study import (
    Analysis,
    FamilyResult,
    FitOptions,
    Joint,
    Panel,
    analyse,
    done,
    higher_is_better,
    sections,
)
from scaling.style import FamilyStyle, Plot, equation, family_styles, number, tick
from scaling.table import METRIC, Table, TableError, parse_number
from scaling.truth import Verdict, verdicts

_COMPACT_ROOTS = ("ne", "auc", "gauc")
_NAMES = frozenset({"trial", "study", "family", "label", "dataset", "eval_set"})
_FORM_NAMES = {"loglin": "log-linear", "power": "power law", "power_const": "power law + constant"}


class PageOptions(FitOptions, total=False):
    """What `report_command` passes on to `write_report`, which says what each means."""

    summary: str
    intros: Mapping[str, str] | None
    notes: Mapping[str, Sequence[str]] | None
    references: Sequence[Reference]
    assets_dir: Path | None


def write_report(
    table: Table,
    out_html: Path,
    *,
    title: str,
    summary: str = "",
    intros: Mapping[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    references: Sequence[Reference] = (),
    metric: str | None = None,
    assets_dir: Path | None = None,
    **options: Unpack[FitOptions],
) -> Analysis:
    """Analyse a table and write its report.

    Args:
        table: the results.
        out_html: the page to write; written whole or not at all.
        title: the page's heading.
        summary: plain text under the heading; blank lines separate paragraphs.
        intros: plain text of the same kind under the heading of a study, by the study's name.
        notes: what a reader must know of a dataset, one sentence or more each, by the dataset's name; those of
            datasets that are not in the table are left out.
        references: known values to draw and to compare fitted constants with.
        metric: the headline metric, each section's `default_metric` if None or absent there; the others get compact
            figures, those of the validation split where the headline is of it.
        assets_dir: also save every figure there as svg and csv, and the trials as `trials.csv`.
        options: the arguments of `analyse` of the same names.

    Returns:
        The analysis of the headline metric.

    Raises:
        TableError: the table cannot be analysed; nothing is written.
    """
    analysis = analyse(table, metric, **options)
    others = []
    for name in compact_metrics(table, analysis):
        other = analyse(table, name, axes=False, fallback=False, **options)
        others.append(_without_headlines(other, analysis))
    builder = _Builder(analysis, others, table, references, intros or {}, notes or {})
    page = document(title, builder.body(title, summary))
    _write(out_html, page)
    if assets_dir is not None:
        assets_dir.mkdir(parents=True, exist_ok=True)
        for plot in builder.plots:
            _write(assets_dir / f"{plot.key}.svg", plot.svg)
            _write(assets_dir / f"{plot.key}.csv", plot.csv())
        _write(assets_dir / "trials.csv", table.to_csv())
    return analysis


def compact_metrics(table: Table, analysis: Analysis) -> list[str]:
    """What deserves a small figure where it is not the headline: NE, AUC, GAUC (mean, per task), retrieval metrics.

    Under a headline of the validation split they are those of that split: who asks for it does not want to choose by
    the test rows.
    """
    shown = {_place(panel) for panel in analysis.panels}
    usable = table.where(done(table) & (table.numbers(analysis.x) > 0))
    found: set[str] = set()
    for study, dataset, part in sections(usable):
        names = _metrics(part, analysis.metric)
        found |= {name for name in names if (study, dataset, name) not in shown and _finite(part, name)}
    return [name for name in _metrics(usable, analysis.metric) if name in found and _is_compact(name)]


def _metrics(table: Table, headline: str) -> list[str]:
    """The metrics of the split that the headline is of."""
    if not headline.startswith(VALIDATION):
        return table.metrics()
    names = {c: c.removeprefix(VALIDATION) for c in table.columns if c.startswith(VALIDATION)}
    return [c for c, name in names.items() if METRIC.fullmatch(name) and not name.startswith("base_rate")]


def _is_compact(name: str) -> bool:
    name = name.removeprefix(VALIDATION)
    return name.partition("/")[0] in _COMPACT_ROOTS or "@" in name or name.startswith("mrr")


def _finite(table: Table, name: str) -> bool:
    return bool(np.isfinite(table.numbers(name)).any())


def _place(panel: Panel) -> tuple[str, str, str]:
    return panel.study, panel.dataset, panel.metric


def _without_headlines(other: Analysis, main: Analysis) -> Analysis:
    """The analysis without the panels that the page already shows in full."""
    shown = {_place(panel) for panel in main.panels}
    return replace(other, panels=tuple(panel for panel in other.panels if _place(panel) not in shown))


def _write(path: Path, text: str) -> None:
    """Write through a neighbour and a rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


class _Builder:
    """Collects the page's sections and, on the way, every figure drawn."""

    def __init__(
        self,
        analysis: Analysis,
        others: Sequence[Analysis],
        table: Table,
        references: Sequence[Reference],
        intros: Mapping[str, str],
        notes: Mapping[str, Sequence[str]],
    ) -> None:
        self.analysis, self.others, self.table, self.references = analysis, others, table, references
        self.intros = intros
        self.notes = {name: notes[name] for name in table.distinct("dataset") if notes.get(name)}
        self.plots: list[Plot] = []
        self.verdicts = verdicts(analysis, references)
        names = dict.fromkeys(f.name for panel in analysis.panels for f in panel.families)
        self.styles: dict[str, FamilyStyle] = family_styles(list(names))

    def body(self, title: str, summary: str) -> str:
        trials = ", ".join(f"{count} {status}" for status, count in self.analysis.counts.items())
        about = '<a href="#data">Data</a>' if self.notes else ""
        parts = [
            f'<header><h1>{esc(title)}</h1>{_paragraphs(summary)}<p class="lead">Trials: {esc(trials)}. Main metric: '
            f"{esc(_main_metrics(self.analysis))}.</p></header>",
            f'<nav aria-label="Sections">{about}<a href="#laws">Laws</a><a href="#fits">Fits</a>'
            '<a href="#checklist">Checklist</a><a href="#trials">Trials</a></nav>',
            self._about_data(),
            '<section id="laws">',
            *(self._panel(i, panel) for i, panel in enumerate(self.analysis.panels)),
            "</section>",
            self._compact(),
            f'<section id="fits"><h2>All fits</h2>{self._fits()}</section>',
            f'<section id="checklist"><h2>Checklist</h2>{self._checklist()}</section>',
            f'<section id="trials"><h2>All trials</h2>{self._trials()}</section>',
        ]
        return "\n".join(parts)

    def _about_data(self) -> str:
        """The notes of the datasets on the page."""
        if not self.notes:
            return ""
        items = "".join(
            f"<dt>{esc(name)}</dt>" + "".join(f"<dd>{esc(text)}</dd>" for text in texts)
            for name, texts in self.notes.items()
        )
        return f'<section id="data"><h2>About the data</h2><dl>{items}</dl></section>'

    def _figure(self, plot: Plot | None) -> str:
        if plot is None:
            return ""
        self.plots.append(plot)
        return figure_html(plot, f"fig{len(self.plots)}")

    def _panel(self, index: int, panel: Panel) -> str:
        name = " · ".join(esc(word) for word in (panel.study, panel.dataset) if word) or "Results"
        before = self.analysis.panels[index - 1] if index else None
        # The first panel of a study and dataset opens its section; a study that only tunes has no other.
        opens = before is None or _place(before) != _place(panel)
        along = "" if panel.axis is None else f": along {esc(x_name(panel))}"
        heading = f"<h2>{name}{along}</h2>" if opens else f"<h3>{name}{along}</h3>"
        if opens and (before is None or before.study != panel.study):
            heading += _paragraphs(self.intros.get(panel.study, ""))
        law = self._figure(law_figure(panel, references=self.references, styles=self.styles))
        cards = "".join(self._card(family, panel) for family in panel.families)
        parts = [heading, f'<div class="cards">{cards}</div>' if opens else "", law]
        parts += [f"<p>{esc(panel.plain)}</p>" if panel.plain else "", self._truths(index)]
        if panel.axis is None and not panel.plain:
            parts.append(self._figure(ratio_figure(panel, self.styles)))
            parts += [_comparison_html(c, panel) for c in panel.comparisons]
            small = [residual_figure(panel, self.styles), held_out_figure(panel, self.styles)]
            parts.append('<div class="pair">' + "".join(self._figure(plot) for plot in small) + "</div>")
        return "\n".join([*parts, _warnings_html(panel)])

    def _card(self, family: FamilyResult, panel: Panel) -> str:
        points, best = family.points, family.best
        colour = theme_colour(self.styles[family.name].colour)
        seeds = len(points.runs[best])
        spread = f" ± {number(points.spread[best], 2)}" if seeds > 1 else ""
        label = points.labels[best] if points.labels else ""
        lines = [
            f'<p class="big">{esc(number(points.mean[best]))}</p>',
            f"<p>best {esc(metric_name(panel.metric))}{esc(spread)} ({seeds} seed{'s' * (seeds > 1)}), "
            f"{esc(label)} at {esc(x_symbol(panel))} = {esc(tick(float(f'{points.x[best]:.3g}')))}</p>",
        ]
        if family.fit is not None:
            law = equation(family.fit.form, family.fit.params, metric_name(panel.metric), x_symbol(panel))
            lines.append(f"<p><code>{esc(law)}</code></p>")
        if family.boot is not None:
            pairs = "; ".join(f"{k} {_interval(v)}" for k, v in family.boot.params().items())
            lines.append(f"<p>95 %: {esc(pairs)}</p>")
        if family.slope is not None:
            value, limits = family.slope
            lines.append(
                f"<p>{esc(number(value, 3))} {esc(_interval(limits, 3))} for each tenfold "
                f"{esc(x_symbol(panel))} over the observed range</p>"
            )
        if family.joint is not None:
            lines.append(_joint_html(family.joint, metric_name(panel.metric)))
        lines.append(f"<p>{len(points)} configurations, {points.n_runs} runs</p>")
        return f'<div class="card" style="--c:{colour}"><h3>{esc(family.name)}</h3>{"".join(lines)}</div>'

    def _truths(self, index: int) -> str:
        """Known irreducible values against the fitted constants c of one panel, with a verdict for each family."""
        rows = [("", [(text, "") for text in _truth_row(v)]) for v in self.verdicts if v.panel == index]
        if not rows:
            return ""
        headers = [
            ("known value", False),
            ("value", True),
            ("family", False),
            ("fitted c", True),
            ("95 % interval", True),
            ("verdict", False),
        ]
        return "<h3>Known irreducible value against the fitted constant</h3>" + table_html(
            headers, rows, label="Known values against fitted constants"
        )

    def _compact(self) -> str:
        """Small figures of the other metrics: means in the open, tasks folded away."""
        tasks = [other for other in self.others if "/" in other.metric.removeprefix(VALIDATION)]
        means = [other for other in self.others if other not in tasks]
        parts = [f'<div class="pair">{"".join(self._small(o) for o in means)}</div>'] if means else []
        if tasks:
            inner = "".join(self._small(other) for other in tasks)
            folded = f'<div class="pair">{inner}</div>'
            parts.append(f"<details><summary>Per task ({len(tasks)} metrics)</summary>{folded}</details>")
        body = "\n".join(parts)
        return f'<section id="metrics"><h2>Other metrics</h2>{body}</section>' if parts else ""

    def _small(self, other: Analysis) -> str:
        figures = []
        for panel in other.panels:
            plot = law_figure(panel, references=self.references, styles=self.styles, compact=True)
            words = " · ".join(word for word in (panel.study, panel.dataset) if word)
            if len({_place(main)[:2] for main in self.analysis.panels}) > 1:
                plot = replace(plot, title=f"{metric_name(panel.metric)}: {words}")
            figures.append(self._figure(plot))
        return "".join(figures)

    def _fits(self) -> str:
        headers = [
            ("study", False),
            ("family", False),
            ("form", False),
            ("parameters, 95 % interval", False),
            ("error %", True),
            ("R²", True),
            ("AICc", True),
            ("held-out %", True),
            ("condition", True),
            ("bootstrap", False),
            ("at bound", False),
        ]
        if not any(family.fits for panel in self.analysis.panels for family in panel.families):
            return f"<p>{NO_LAW}</p>"
        rows = []
        for panel in self.analysis.panels:
            for family in panel.families:
                for form, fit in family.fits.items():
                    boot = family.boots[form]
                    limits = boot.params() if boot else {}
                    params = "\n".join(
                        f"{k} = {number(v)} {_interval(limits.get(k))}".strip() for k, v in fit.params.items()
                    )
                    where = " · ".join(w for w in (panel.study, panel.dataset, x_symbol(panel)) if w)
                    cells = [
                        where,
                        family.name,
                        _FORM_NAMES[form],
                        params,
                        f"{fit.mape:.3g}",
                        f"{fit.r2:.4f}",
                        _plain(fit.aicc, ".2f"),
                        _plain(fit.held_out_mape, ".3g"),
                        f"{fit.condition:.3g}",
                        boot.method if boot else "–",
                        ", ".join(fit.at_bound) or "–",
                    ]
                    rows.append(("chosen" if form == family.chosen else "", [(cell, "") for cell in cells]))
        note = (
            "<p>Bold rows are the laws drawn. AICc and held-out error compare forms within one family; a held-out "
            "error is the mean over the form's own cuts, and the choice uses the cuts that forms share. A form with "
            f"{N_PARAMS['power_const']} parameters needs that many distinct x or more.</p>"
        )
        return note + table_html(headers, rows, label="All fits")

    def _checklist(self) -> str:
        items = checklist(self.analysis, self.table)
        inner = "".join(f"<dt>{i}. {esc(q)}</dt><dd>{esc(a)}</dd>" for i, (q, a) in enumerate(items, start=1))
        return f"<dl>{inner}</dl>"

    def _trials(self) -> str:
        columns = [c for c in self.table.columns if self.table.has(c) and not c.startswith("config.")]
        headers = [(c, _is_numeric(self.table, c)) for c in columns]
        statuses = self.table.text("status", "done")
        rows = [
            ("" if status == "done" else "bad", [_trial_cell(row.get(c, ""), c, n, at) for c, n in headers])
            for row, status, at in zip(self.table.rows, statuses, self.table.origins)
        ]
        note = "<p>Trials that diverged or failed are listed in colour; they take no part in fits.</p>"
        return note + table_html(headers, rows, label="All trials", sortable=True)


def _joint_html(joint: Joint, metric: str) -> str:
    """The law in parameters and targets in one line, with what is wrong with it."""
    values = "; ".join(
        f"{name} = {number(joint.fit.params[name], 3)} {_interval(joint.intervals[name], 3)}"
        for name in ("E", "A", "alpha", "B", "beta")
    )
    cautions = "".join(f" ({warn.text})" for warn in joint.fit.warnings)
    law = f"{metric} = E + A·N^−alpha + B·D^−beta"
    return f"<p>In parameters N and targets D: <code>{esc(law)}</code>, 95 %: {esc(values + cautions)}</p>"


def _paragraphs(text: str) -> str:
    """Plain text as HTML: blank lines separate paragraphs, an indented line is a command."""
    parts = [part for part in text.split("\n\n") if part.strip()]
    return "".join(
        f"<p><code>{esc(part.strip())}</code></p>" if part.startswith("    ") else f"<p>{esc(part)}</p>"
        for part in parts
    )


def _interval(pair: tuple[float, float] | None, digits: int = 5) -> str:
    return f"[{number(pair[0], digits)}, {number(pair[1], digits)}]" if pair else ""


def _plain(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "–"


def _is_numeric(table: Table, column: str) -> bool:
    """True where every non-empty cell of the column parses as a number, and at least one is a finite one."""
    try:
        return _finite(table, column)
    except TableError:
        return False


def _trial_cell(cell: str, column: str, numeric: bool, origin: str) -> tuple[str, str]:
    """A cell's shown text and sort value: six significant digits shown, all of them sorted by."""
    if not numeric or not cell:
        return cell, cell
    value = parse_number(cell, column, origin)
    if math.isnan(value):
        return cell, ""
    # Rounding would damage an identifier or a version that happens to look like a number.
    if column in _NAMES or column.startswith("version/"):
        return cell, cell
    whole = value == int(value) and abs(value) < 1e7
    return str(int(value)) if whole else f"{value:.6g}", cell


def _main_metrics(analysis: Analysis) -> str:
    """The headline metrics with their directions; studies of one table may have different ones."""
    names = dict.fromkeys(panel.metric for panel in analysis.panels)
    said = [f"{metric_name(n)}, {'higher' if higher_is_better(n) else 'lower'} is better" for n in names]
    return "; ".join(said)


def _truth_row(verdict: Verdict) -> list[str]:
    reference = verdict.reference
    known = number(reference.value)
    if reference.high > reference.low:
        known += f" [{number(reference.low)}, {number(reference.high)}]"
    # The verdict says where the known value lies; the page says where the constant does.
    said = {
        "inside": "consistent: the intervals overlap",
        "above": "below the known value",
        "below": "above the known value",
    }[verdict.where]
    if verdict.at_bound:
        said = "no usable constant: the fit stopped at its bound"
    fitted = number(verdict.c) + (" (at its bound)" if verdict.at_bound else "")
    return [reference.name, known, verdict.family, fitted, _interval((verdict.low, verdict.high)), said]


# A 95 % interval of a compute ratio wider than this factor says nothing that a reader could use.
_UNDETERMINED = 1e6


def _ratio_text(c: Comparison, panel: Panel) -> str:
    """The compute ratio at both ends of the quality that both families were seen at, the easier end first."""
    quality = c.ratio.quality
    ends = [0, len(quality) - 1] if higher_is_better(panel.metric) else [len(quality) - 1, 0]
    if np.all(c.ratio.high[ends] > _UNDETERMINED * c.ratio.low[ends]):
        return "the compute for equal quality is not determined by these trials: one of the curves is nearly flat"
    said = []
    for i in ends:
        words = times_less(float(c.ratio.ratio[i]), float(c.ratio.low[i]), float(c.ratio.high[i]))
        said.append(f"at {metric_name(panel.metric)} {number(quality[i], 4)} it needs {words} {x_symbol(panel)}")
    return " and ".join(said)


def times_less(ratio: float, low: float, high: float) -> str:
    """A compute ratio with its limits (NaN if unknown) in words: "2.00 [1.50, 3.00] times less", or "... more"."""
    less = ratio >= 1
    values = (ratio, low, high) if less else (_over(ratio), _over(high), _over(low))
    limits = "" if math.isnan(low) else f" {_interval(values[1:], 3)}"
    return f"{number(values[0], 3)}{limits} times {'less' if less else 'more'}"


def _over(value: float) -> float:
    return 1 / value if value else math.inf


def _crossing_text(c: Comparison, x: str) -> str:
    if c.slope_range is None:
        return f"no {x} was observed for both, so no crossing was looked for"
    if c.crossing is None:
        return f"the curves do not cross over the {x} observed for both"
    share = f", in {c.crossing_share:.0%} of draws" if c.crossing_share is not None else ""
    where = f"at {x} = {number(c.crossing, 3)}{_crossing_limits(c.crossing_interval)}{share}"
    return f"the curves cross {where}" if c.crossings == 1 else f"the curves cross {c.crossings} times, first {where}"


def _crossing_limits(pair: tuple[float, float] | None) -> str:
    """The crossing's interval in words: a limit outside the range both families cover is not known."""
    if pair is None:
        return ""
    low, high = pair
    if low > 0 and math.isfinite(high):
        return f" {_interval(pair, 3)}"
    ends = [f"from {number(low, 3)}"] if low > 0 else []
    ends += [f"up to {number(high, 3)}"] if math.isfinite(high) else []
    unknown = "lower" if ends and low == 0 else "upper"
    if not ends:
        return " (95 %: no limit inside the range both cover)"
    return f" (95 %: {ends[0]}, no {unknown} limit inside the range both cover)"


def _comparison_html(c: Comparison, panel: Panel) -> str:
    ratio, x = c.ratio, x_symbol(panel)
    said = [_ratio_text(c, panel) if len(ratio.quality) else ratio.reason]
    if c.slope_difference is not None:
        said.append(
            f"its change per tenfold {x} differs by {number(c.slope_difference, 3)} "
            f"{_interval(c.slope_interval, 3)} over the range both cover"
        )
    said.append(_crossing_text(c, x))
    return f"<p><strong>{esc(ratio.new)} against {esc(ratio.base)}:</strong> {esc('; '.join(said))}.</p>"


def _warnings_html(panel: Panel) -> str:
    """Cautions of a panel, one line per distinct sentence with the families it is about."""
    about: dict[tuple[str, str], list[str]] = {(w.code, w.text): ["all families"] for w in panel.warnings}
    for family in panel.families:
        for warn in family.warnings:
            about.setdefault((warn.code, warn.text), []).append(family.name)
    if not about:
        return ""
    items = "".join(
        f"<li><code>{esc(code)}</code> {esc(', '.join(names))}: {esc(text)}</li>"
        for (code, text), names in about.items()
    )
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>'
