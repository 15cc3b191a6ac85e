"""The body of the report page, section by section: the data, the laws panel by panel, other metrics, the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scaling.cards import card_html
from scaling.checklist import checklist
from scaling.metrics import higher_is_better, is_task, metric_name
from scaling.page import esc, figure_html, paragraphs
from scaling.panel import Panel
from scaling.plots import Reference, held_out_figure, law_figure, ratio_figure, residual_figure, x_name
from scaling.study import Analysis
from scaling.style import Plot, family_styles
from scaling.table import Table
from scaling.tables import fits_table, trials_table, truths_table
from scaling.truth import verdicts
from scaling.words import comparison_html, warnings_html


class Body:
    """Collects the page's sections and, on the way, every figure drawn (`plots`).

    `others` are the analyses of the metrics that get small figures; the other arguments are those of
    `report.write_report`.
    """

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
        self.styles = family_styles(list(names))

    def html(self, title: str, summary: str) -> str:
        """All of the page inside `main`; call it once, since it draws every figure."""
        trials = ", ".join(f"{count} {status}" for status, count in self.analysis.counts.items())
        about = '<a href="#data">Data</a>' if self.notes else ""
        parts = [
            f'<header><h1>{esc(title)}</h1>{paragraphs(summary)}<p class="lead">Trials: {esc(trials)}. Main metric: '
            f"{esc(_main_metrics(self.analysis))}.</p></header>",
            f'<nav aria-label="Sections">{about}<a href="#laws">Laws</a><a href="#fits">Fits</a>'
            '<a href="#checklist">Checklist</a><a href="#trials">Trials</a></nav>',
            self._about_data(),
            '<section id="laws">',
            *(self._panel(i, panel) for i, panel in enumerate(self.analysis.panels)),
            "</section>",
            self._compact(),
            f'<section id="fits"><h2>All fits</h2>{fits_table(self.analysis.panels)}</section>',
            f'<section id="checklist"><h2>Checklist</h2>{self._checklist()}</section>',
            f'<section id="trials"><h2>All trials</h2>{trials_table(self.table)}</section>',
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
        """The figure under the next free id, kept in `plots`; empty where there is none."""
        if plot is None:
            return ""
        self.plots.append(plot)
        return figure_html(plot, f"fig{len(self.plots)}")

    def _panel(self, index: int, panel: Panel) -> str:
        name = " · ".join(esc(word) for word in (panel.study, panel.dataset) if word) or "Results"
        before = self.analysis.panels[index - 1] if index else None
        # The first panel of a study and dataset opens its section; a study that only tunes has no other.
        opens = before is None or before.place != panel.place
        along = "" if panel.axis is None else f": along {esc(x_name(panel))}"
        heading = f"<h2>{name}{along}</h2>" if opens else f"<h3>{name}{along}</h3>"
        if opens and (before is None or before.study != panel.study):
            heading += paragraphs(self.intros.get(panel.study, ""))
        known = [verdict for verdict in self.verdicts if verdict.panel == index]
        law = self._figure(law_figure(panel, references=self.references, styles=self.styles))
        cards = "".join(card_html(family, panel, self.styles[family.name].colour) for family in panel.families)
        parts = [heading, f'<div class="cards">{cards}</div>' if opens else "", law]
        parts += [f"<p>{esc(panel.plain)}</p>" if panel.plain else "", truths_table(known)]
        if panel.axis is None and not panel.plain:
            parts.append(self._figure(ratio_figure(panel, self.styles)))
            parts += [comparison_html(c, panel) for c in panel.comparisons]
            small = [residual_figure(panel, self.styles), held_out_figure(panel, self.styles)]
            parts.append('<div class="pair">' + "".join(self._figure(plot) for plot in small) + "</div>")
        return "\n".join([*parts, warnings_html(panel)])

    def _compact(self) -> str:
        """Small figures of the other metrics: means in the open, tasks folded away."""
        tasks = [other for other in self.others if is_task(other.metric)]
        means = [other for other in self.others if not is_task(other.metric)]
        parts = [self._small(means)] if means else []
        if tasks:
            parts.append(f"<details><summary>Per task ({len(tasks)} metrics)</summary>{self._small(tasks)}</details>")
        body = "\n".join(parts)
        return f'<section id="metrics"><h2>Other metrics</h2>{body}</section>' if parts else ""

    def _small(self, others: Sequence[Analysis]) -> str:
        several = len({(main.study, main.dataset) for main in self.analysis.panels}) > 1
        figures = []
        for panel in (panel for other in others for panel in other.panels):
            plot = law_figure(panel, references=self.references, styles=self.styles, compact=True)
            if several:
                words = " · ".join(word for word in (panel.study, panel.dataset) if word)
                plot = replace(plot, title=f"{metric_name(panel.metric)}: {words}")
            figures.append(self._figure(plot))
        return f'<div class="pair">{"".join(figures)}</div>'

    def _checklist(self) -> str:
        items = checklist(self.analysis, self.table)
        inner = "".join(f"<dt>{i}. {esc(q)}</dt><dd>{esc(a)}</dd>" for i, (q, a) in enumerate(items, start=1))
        return f"<dl>{inner}</dl>"


def _main_metrics(analysis: Analysis) -> str:
    """The headline metrics with their directions; studies of one table may have different ones."""
    names = dict.fromkeys(panel.metric for panel in analysis.panels)
    said = [f"{metric_name(n)}, {'higher' if higher_is_better(n) else 'lower'} is better" for n in names]
    return "; ".join(said)
