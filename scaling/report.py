"""One self-contained HTML page for a results table: headline, figures, fits, warnings, checklist, every trial.

The page needs no network and no server; figures are inline SVG that follow the reader's light or dark theme, and every
figure offers its numbers as CSV. All text that comes from the table is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from scaling.checklist import checklist
from scaling.frontier import Comparison
from scaling.laws import N_PARAMS
from scaling.page import document, esc, figure_html, table_html, theme_colour
from scaling.plots import (
    Reference,
    base_name,
    held_out_figure,
    law_figure,
    metric_name,
    ratio_figure,
    residual_figure,
    x_name,
    x_symbol,
)
from scaling.study import Analysis, FamilyResult, Panel, analyse, done, higher_is_better, sections
from scaling.style import FamilyStyle, Plot, equation, family_styles, number, tick
from scaling.table import Table, TableError, parse_number
from scaling.truth import Verdict, verdicts

_COMPACT_ROOTS = ("ne", "auc", "gauc")
_NAMES = frozenset({"trial", "study", "family", "label", "dataset", "eval_set"})
_FORM_NAMES = {"loglin": "log-linear", "power": "power law", "power_const": "power law + constant"}


def write_report(
    table: Table,
    out_html: Path,
    *,
    title: str,
    summary: str = "",
    references: Sequence[Reference] = (),
    metric: str | None = None,
    x: str = "train_flops",
    group: str = "family",
    form: str = "auto",
    base: str | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    assets_dir: Path | None = None,
) -> Analysis:
    """Analyse a table and write its report.

    Args:
        table: the results.
        out_html: the page to write; written whole or not at all.
        title: the page's heading.
        summary: plain text under the heading; blank lines separate paragraphs.
        references: known values to draw and to compare fitted constants with.
        metric: the headline metric, each section's `default_metric` if None or absent there; the others get compact
            figures.
        x: the column the metric is explained by.
        group: the column whose values are the families.
        form: "auto" or one form for every family.
        base: the family compared against, see `analyse`.
        n_boot: bootstrap draws.
        seed: of the bootstrap.
        assets_dir: also save every figure there as svg and csv, and the trials as `trials.csv`.

    Returns:
        The analysis of the headline metric.

    Raises:
        TableError: the table cannot be analysed; nothing is written.
    """
    analysis = analyse(table, metric, x=x, group=group, form=form, base=base, n_boot=n_boot, seed=seed)
    others = []
    for name in compact_metrics(table, analysis):
        other = analyse(
            table, name, x=x, group=group, form=form, base=base, n_boot=n_boot, seed=seed, axes=False, fallback=False
        )
        others.append(_without_headlines(other, analysis))
    builder = _Builder(analysis, others, table, references)
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
    """What deserves a small figure where it is not the headline: NE, AUC, GAUC (mean, per task), retrieval metrics."""
    shown = {_place(panel) for panel in analysis.panels}
    usable = table.where(done(table) & (table.numbers(analysis.x) > 0))
    found: set[str] = set()
    for study, dataset, part in sections(usable):
        found |= {name for name in part.metrics() if (study, dataset, name) not in shown and _finite(part, name)}
    return [name for name in usable.metrics() if name in found and _is_compact(name)]


def _is_compact(name: str) -> bool:
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
        self, analysis: Analysis, others: Sequence[Analysis], table: Table, references: Sequence[Reference]
    ) -> None:
        self.analysis, self.others, self.table, self.references = analysis, others, table, references
        self.plots: list[Plot] = []
        self.verdicts = verdicts(analysis, references)
        names = dict.fromkeys(f.name for panel in analysis.panels for f in panel.families)
        base = next((b for panel in analysis.panels if (b := base_name(panel))), None)
        self.styles: dict[str, FamilyStyle] = family_styles(list(names), base)

    def body(self, title: str, summary: str) -> str:
        trials = ", ".join(f"{count} {status}" for status, count in self.analysis.counts.items())
        paragraphs = "".join(f"<p>{esc(part)}</p>" for part in summary.split("\n\n") if part.strip())
        parts = [
            f'<header><h1>{esc(title)}</h1>{paragraphs}<p class="lead">Trials: {esc(trials)}. Main metric: '
            f"{esc(_main_metrics(self.analysis))}.</p></header>",
            '<nav aria-label="Sections"><a href="#laws">Laws</a><a href="#fits">Fits</a>'
            '<a href="#checklist">Checklist</a><a href="#trials">Trials</a></nav>',
            '<section id="laws">',
            *(self._panel(i, panel) for i, panel in enumerate(self.analysis.panels)),
            "</section>",
            self._compact(),
            f'<section id="fits"><h2>All fits</h2>{self._fits()}</section>',
            f'<section id="checklist"><h2>Checklist</h2>{self._checklist()}</section>',
            f'<section id="trials"><h2>All trials</h2>{self._trials()}</section>',
        ]
        return "\n".join(parts)

    def _figure(self, plot: Plot | None) -> str:
        if plot is None:
            return ""
        self.plots.append(plot)
        return figure_html(plot, f"fig{len(self.plots)}")

    def _panel(self, index: int, panel: Panel) -> str:
        name = " · ".join(esc(word) for word in (panel.study, panel.dataset) if word) or "Results"
        heading = f"<h2>{name}</h2>" if panel.axis is None else f"<h3>{name}: along {esc(x_name(panel))}</h3>"
        law = self._figure(law_figure(panel, references=self.references, styles=self.styles))
        cards = "".join(self._card(family, panel) for family in panel.families)
        parts = [heading, f'<div class="cards">{cards}</div>' if panel.axis is None else "", law, self._truths(index)]
        if panel.axis is None:
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
        means = [other for other in self.others if "/" not in other.metric]
        tasks = [other for other in self.others if "/" in other.metric]
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
    where = f"at {x} = {number(c.crossing, 3)} {_interval(c.crossing_interval, 3)}{share}"
    return f"the curves cross {where}" if c.crossings == 1 else f"the curves cross {c.crossings} times, first {where}"


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
