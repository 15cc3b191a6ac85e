"""One self-contained HTML page for a results table: question, protocol, laws, what would change them, every trial.

The page needs no network and no server; figures are inline SVG that follow the reader's light or dark theme, and every
figure offers its numbers as CSV. All text that comes from the table is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from scaling.body import Body
from scaling.latex import laws_tex
from scaling.metrics import is_compact, metrics_of_split
from scaling.page import document
from scaling.plots import Reference
from scaling.study import Analysis, FitOptions, analyse
from scaling.table import Table
from scaling.trials import done, sections


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
        assets_dir: also save every figure there as svg and csv, those of the headline metric as pdf, too, the laws as
            `laws.tex`, a LaTeX table, and the trials as `trials.csv`.
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
    body = Body(analysis, others, table, references, intros or {}, notes or {})
    page = document(title, body.html(title, summary))
    write_whole(out_html, page)
    if assets_dir is not None:
        _write_assets(assets_dir, body, table)
    return analysis


def _write_assets(folder: Path, body: Body, table: Table) -> None:
    """The figures of a page and its tables as files of their own, for a paper."""
    for plot in body.plots:
        write_whole(folder / f"{plot.key}.svg", plot.svg)
        write_whole(folder / f"{plot.key}.csv", plot.csv())
    for plot in body.main_plots:
        write_whole(folder / f"{plot.key}.pdf", plot.pdf())
    if laws := laws_tex(body.analysis):
        write_whole(folder / "laws.tex", laws)
    write_whole(folder / "trials.csv", table.to_csv())


def compact_metrics(table: Table, analysis: Analysis) -> list[str]:
    """The metrics that get a small figure (see `metrics.is_compact`) in a section where they are not the headline.

    Under a headline of the validation split they are those of that split: who asks for it does not want to choose by
    the test rows.
    """
    shown = {panel.place for panel in analysis.panels}
    usable = table.where(done(table) & (table.numbers(analysis.x) > 0))
    found: set[str] = set()
    for study, dataset, part in sections(usable):
        names = metrics_of_split(part, analysis.metric)
        found |= {name for name in names if (study, dataset, name) not in shown and part.has_value(name)}
    return [name for name in metrics_of_split(usable, analysis.metric) if name in found and is_compact(name)]


def _without_headlines(other: Analysis, main: Analysis) -> Analysis:
    """The analysis without the panels that the page already shows in full."""
    shown = {panel.place for panel in main.panels}
    return replace(other, panels=tuple(panel for panel in other.panels if panel.place not in shown))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write through a neighbour and a rename, so that a reader never sees half a file; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)
