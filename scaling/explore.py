"""The explorer of the page: every trial as data for its script, which draws any metric against any size.

Without a script the section stays hidden, and the figures and the table of trials hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scaling.metrics import metric_name, metrics_of_split
from scaling.page import data_html, theme_colour
from scaling.panel import Panel
from scaling.plots import X_NAMES
from scaling.study import COMPUTE_AXES, Analysis, with_families
from scaling.style import FamilyStyle
from scaling.table import Table
from scaling.trials import done, sections

_CURVE_POINTS = 40

_HTML = """<section id="explore" data-live hidden><h2>Explore the trials</h2>
<p>Point at a trial, or tap it, to read it; the arrow keys go from one to the next. A family's button hides and shows
it. Lines are the fitted laws, where one was fitted to what is chosen.</p>
<div class="choices"><label>Section <select data-part="section"></select></label>
<label>Metric <select data-part="metric"></select></label>
<label>Against <select data-part="axis"></select></label></div>
<div class="legend" data-part="legend" role="group" aria-label="Families shown"></div>
<div class="chart"><svg data-part="chart" tabindex="0" role="application" \
aria-label="The trials of the section, one mark each; the table of trials has the same numbers"></svg>
<div class="tip" data-part="tip" role="status" hidden></div></div>
<p class="lead" data-part="count"></p></section>"""


def explore_html(table: Table, analyses: Sequence[Analysis], styles: Mapping[str, FamilyStyle]) -> str:
    """The hidden section and its data; empty where no section of the table has both a metric and a size to show."""
    data = explore_data(table, analyses, styles)
    return f"{_HTML}\n{data_html('explore-data', data)}" if data["sections"] else ""


def explore_data(
    table: Table, analyses: Sequence[Analysis], styles: Mapping[str, FamilyStyle]
) -> dict[str, list[dict[str, object]]]:
    """What the script draws, as plain data.

    Args:
        table: every trial; those of a section with nothing to draw are left out.
        analyses: the main one first; their laws are drawn where metric and size are chosen so.
        styles: of the families that were analysed; others are drawn without a colour of their own.

    Returns:
        `families`, each with name, colour and marker; `sections`, each with its name, its metrics and its sizes as
        (column, name), its trials (`about` in words, the index of the family, numbers by column where there are any)
        and its laws as points.
    """
    main = analyses[0]
    table = with_families(table, main.group)
    names = list(dict.fromkeys([*styles, *table.text(main.group, "(unnamed)")]))
    known = {name: (theme_colour(style.colour), style.marker) for name, style in styles.items()}
    looks = [(name, *known.get(name, ("var(--soft)", "o"))) for name in names]
    families: list[dict[str, object]] = [{"name": n, "colour": colour, "marker": m} for n, colour, m in looks]
    found: list[dict[str, object]] = []
    for study, dataset, part in sections(table):
        panels = [p for one in analyses for p in one.panels if (p.study, p.dataset) == (study, dataset)]
        metrics, axes = _metrics(part, main, panels), _axes(part, main.x)
        if metrics and axes:
            columns = [column for column, _ in (*metrics, *axes)]
            found.append(
                {
                    "name": " · ".join(word for word in (study, dataset) if word) or "All trials",
                    "metrics": metrics,
                    "axes": axes,
                    "trials": _trials(part, columns, main.group, names),
                    "laws": [law for panel in panels for law in _laws(panel, names) if law["x"] in columns],
                }
            )
    return {"families": families, "sections": found}


def _metrics(part: Table, main: Analysis, panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """The metrics to choose from: the headline one, then those that every finished trial has."""
    headline = next((panel.metric for panel in panels), main.metric)
    finished = part.where(done(part))
    complete = [c for c in metrics_of_split(part, headline) if bool(np.isfinite(finished.numbers(c)).all())]
    names = [c for c in dict.fromkeys([headline, *complete]) if part.has(c)]
    return [(c, metric_name(c)) for c in names]


def _axes(part: Table, x: str) -> list[tuple[str, str]]:
    """The sizes to choose from: the x of the laws, then compute, parameters, targets, time and a swept axis.

    But for x only those that every finished trial has and that vary.
    """
    finished = part.where(done(part))
    swept = part.distinct("axis")
    names = {x: X_NAMES.get(x, x)} | X_NAMES
    if len(swept) == 1 and swept[0] not in COMPUTE_AXES:
        names["axis_value"] = swept[0].replace("_", " ")
    kept = []
    for column, name in names.items():
        values = finished.numbers(column)
        if (column == x and np.any(values > 0)) or (np.all(values > 0) and len(np.unique(values)) > 1):
            kept.append((column, name))
    return kept


def _trials(part: Table, columns: Sequence[str], group: str, names: Sequence[str]) -> list[dict[str, object]]:
    """Every trial of a section; one that did not finish has its words and no numbers."""
    numbers = {column: part.numbers(column) for column in columns}
    families, finished = part.text(group, "(unnamed)"), done(part)
    return [
        {
            "about": _about(row, families[i]),
            "family": names.index(families[i]),
            "values": {c: float(f"{v[i]:.6g}") for c, v in numbers.items() if finished[i] and np.isfinite(v[i])},
        }
        for i, row in enumerate(part.rows)
    ]


def _about(row: Mapping[str, str], family: str) -> str:
    """A trial in one line: family, label, seed, its name, and how it ended if it did not finish."""
    words = [" ".join(word for word in (family, row.get("label", "")) if word)]
    words += [f"{name} {row[name]}" for name in ("seed", "trial") if row.get(name)]
    status = row.get("status") or "done"
    return ", ".join(words) + ("" if status == "done" else f" ({status})")


def _laws(panel: Panel, names: Sequence[str]) -> list[dict[str, object]]:
    """The laws of a panel over the sizes they were seen at, as points."""
    found: list[dict[str, object]] = []
    for family in panel.families:
        if family.fit is not None:
            x = np.geomspace(family.points.x.min(), family.points.x.max(), _CURVE_POINTS)
            points = [(float(f"{a:.5g}"), float(f"{b:.6g}")) for a, b in zip(x, family.fit.at(x))]
            law = {"family": names.index(family.name), "metric": panel.metric, "x": panel.x, "points": points}
            found.append(law)
    return found
