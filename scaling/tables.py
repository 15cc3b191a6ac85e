"""The tables of the page: every fit, every trial, and known values against fitted constants."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaling.checklist import NO_LAW
from scaling.family import FamilyResult
from scaling.laws import FEWEST, FORM_NAMES
from scaling.page import table_html
from scaling.panel import Panel
from scaling.plots import x_symbol
from scaling.style import interval_text, number
from scaling.table import Table, TableError, parse_number
from scaling.truth import Verdict

_IDENTIFIERS = frozenset({"trial", "study", "family", "label", "dataset", "eval_set"})


def fits_table(panels: Sequence[Panel]) -> str:
    """Every form of every family with its parameters and errors."""
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
    if not any(family.fits for panel in panels for family in panel.families):
        return f"<p>{NO_LAW}</p>"
    rows = [
        ("chosen" if form == family.chosen else "", [(cell, "") for cell in _fit_row(panel, family, form)])
        for panel in panels
        for family in panel.families
        for form in family.fits
    ]
    note = (
        "<p>Bold rows are the laws drawn. AICc and held-out error compare forms within one family; a held-out "
        "error is the mean over the form's own cuts, and the choice uses the cuts that forms share. A power law with a "
        f"constant needs {FEWEST['power_const']} distinct x, one with a break {FEWEST['broken']}.</p>"
    )
    return note + table_html(headers, rows, label="All fits")


def _fit_row(panel: Panel, family: FamilyResult, form: str) -> list[str]:
    fit, boot = family.fits[form], family.boots[form]
    limits = boot.params() if boot else {}
    return [
        " · ".join(w for w in (panel.study, panel.dataset, x_symbol(panel)) if w),
        family.name,
        FORM_NAMES[form],
        "\n".join(f"{k} = {number(v)} {interval_text(limits.get(k))}".strip() for k, v in fit.params.items()),
        f"{fit.mape:.3g}",
        f"{fit.r2:.4f}",
        _or_dash(fit.aicc, ".2f"),
        _or_dash(fit.held_out_mape, ".3g"),
        f"{fit.condition:.3g}",
        boot.method if boot else "–",
        ", ".join(fit.at_bound) or "–",
    ]


def _or_dash(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "–"


def trials_table(table: Table) -> str:
    """Every row of the results, whatever its status, in the columns that any row fills."""
    columns = [c for c in table.columns if table.has(c) and not c.startswith("config.")]
    headers = [(c, _is_numeric(table, c)) for c in columns]
    statuses = table.text("status", "done")
    rows = [
        ("" if status == "done" else "bad", [_trial_cell(row.get(c, ""), c, n, at) for c, n in headers])
        for row, status, at in zip(table.rows, statuses, table.origins)
    ]
    note = "<p>Trials that diverged or failed are listed in colour; they take no part in fits.</p>"
    return note + table_html(headers, rows, label="All trials", sortable=True)


def _is_numeric(table: Table, column: str) -> bool:
    """True where every non-empty cell of the column parses as a number, and at least one is a finite one."""
    try:
        return table.has_value(column)
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
    if column in _IDENTIFIERS or column.startswith("version/"):
        return cell, cell
    whole = value == int(value) and abs(value) < 1e7
    return str(int(value)) if whole else f"{value:.6g}", cell


def truths_table(verdicts: Sequence[Verdict]) -> str:
    """Known irreducible values against the fitted constants c of one panel; empty where none is known."""
    rows = [("", [(text, "") for text in _truth_row(v)]) for v in verdicts]
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


def _truth_row(verdict: Verdict) -> list[str]:
    reference = verdict.reference
    known = number(reference.value)
    if reference.high > reference.low:
        known += f" {interval_text((reference.low, reference.high))}"
    # The verdict says where the known value lies; the page says where the constant does.
    said = {
        "inside": "consistent: the intervals overlap",
        "above": "below the known value",
        "below": "above the known value",
    }[verdict.where]
    if verdict.at_bound:
        said = "no usable constant: the fit stopped at its bound"
    fitted = number(verdict.c) + (" (at its bound)" if verdict.at_bound else "")
    return [reference.name, known, verdict.family, fitted, interval_text((verdict.low, verdict.high)), said]
