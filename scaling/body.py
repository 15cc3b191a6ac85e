"""The body of the report page, in the order of its story: question, protocol, laws by panel, trials, checklist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scaling.cards import card_html
from scaling.checklist import checklist
from scaling.doubts import doubts_of_laws, doubts_of_records
from scaling.explore import explore_html
from scaling.metrics import higher_is_better, is_task, metric_name
from scaling.page import esc, figure_html, paragraphs
from scaling.panel import Panel
from scaling.plots import Reference, held_out_figure, law_figure, ratio_figure, residual_figure, x_name
from scaling.protocol import protocol, question
from scaling.study import Analysis
from scaling.style import Plot, family_styles
from scaling.table import Table
from scaling.tables import fits_table, forms_table, laws_table, trials_table, truths_table
from scaling.trials import sections
from scaling.truth import verdicts
from scaling.words import HELD_OUT_NOTE, RESIDUALS_NOTE, answer_html, comparison_html, warnings_html


class Body:
    """Collects the page's sections and, on the way, every figure drawn (`plots`; `main_plots` are not the small ones).

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
        self.main_plots: list[Plot] = []
        self.sections = {(study, dataset): part for study, dataset, part in sections(table)}
        self.verdicts = verdicts(analysis, references)
        names = dict.fromkeys(f.name for panel in analysis.panels for f in panel.families)
        self.styles = family_styles(list(names))

    def html(self, title: str, summary: str) -> str:
        """All of the page inside `main`; call it once, since it draws every figure."""
        asked = paragraphs(summary) if summary or self.intros else f"<p>{esc(question(self.analysis))}</p>"
        about = '<a href="#data">Data</a>' if self.notes else ""
        explore = explore_html(self.table, [self.analysis, *self.others], self.styles)
        explorer = '<a href="#explore" data-live hidden>Explore</a>' if explore else ""
        parts = [
            f'<header><h1>{esc(title)}</h1>{asked}<p class="lead">Main metric: {esc(_main_metrics(self.analysis))}.</p>'
            "</header>",
            f'<nav aria-label="Sections">{about}<a href="#protocol">Protocol</a><a href="#laws">Laws</a>{explorer}'
            '<a href="#fits">Fits</a><a href="#checklist">Checklist</a><a href="#trials">Trials</a></nav>',
            self._about_data(),
            f'<section id="protocol"><h2>Protocol</h2>{_list(protocol(self.analysis, self.table))}</section>',
            '<section id="laws">',
            *(self._panel(i, panel) for i, panel in enumerate(self.analysis.panels)),
            "</section>",
            explore,
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

    def _figure(self, plot: Plot | None, note: str = "") -> str:
        """The figure under the next free id, kept in `plots`, with how to read it; empty where there is none."""
        if plot is None:
            return ""
        self.plots.append(plot)
        return figure_html(plot, f"fig{len(self.plots)}", note)

    def _main(self, plot: Plot | None, note: str = "") -> str:
        """A figure of the headline metric, kept in `main_plots` too."""
        self.main_plots += [plot] if plot is not None else []
        return self._figure(plot, note)

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
        cards = "".join(card_html(family, panel, self.styles[family.name].colour) for family in panel.families)
        law = self._main(law_figure(panel, references=self.references, styles=self.styles))
        parts = [heading, answer_html(panel), law, f'<div class="cards">{cards}</div>' if opens else ""]
        parts += [f"<p>{esc(panel.plain)}</p>" if panel.plain else "", laws_table(panel), truths_table(known)]
        if not panel.plain:
            parts.append(self._main(ratio_figure(panel, self.styles)))
            parts += [comparison_html(c, panel) for c in panel.comparisons]
            parts += [self._checks(panel), forms_table(panel)]
        return "\n".join([*parts, self._doubts(panel, opens), warnings_html(panel)])

    def _checks(self, panel: Panel) -> str:
        """Residuals and held-out errors side by side, each with how to read it."""
        residuals = self._main(residual_figure(panel, self.styles), RESIDUALS_NOTE)
        held_out = self._main(held_out_figure(panel, self.styles), HELD_OUT_NOTE)
        return f'<div class="pair">{residuals}{held_out}</div>'

    def _doubts(self, panel: Panel, opens: bool) -> str:
        """What would change the conclusion of a panel; what follows from the records is said once in a section."""
        found = doubts_of_laws(panel)
        if opens:
            found += doubts_of_records(panel, self.sections[panel.study, panel.dataset])
        items = "".join(f"<li><strong>{esc(what)}:</strong> {esc(text)}</li>" for what, text in found)
        return f"<h3>What would change this conclusion</h3><ul>{items}</ul>" if found else ""

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
        return _list([(f"{i}. {question}", answer) for i, (question, answer) in enumerate(items, start=1)])


def _list(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{esc(name)}</dt><dd>{esc(text)}</dd>" for name, text in items) + "</dl>"


def _main_metrics(analysis: Analysis) -> str:
    """The headline metrics with their directions; studies of one table may have different ones."""
    names = dict.fromkeys(panel.metric for panel in analysis.panels)
    said = [f"{metric_name(n)}, {'higher' if higher_is_better(n) else 'lower'} is better" for n in names]
    return "; ".join(said)
