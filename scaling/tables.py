"""The tables of the page: laws, forms compared, every fit, every trial, known values against fitted constants."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from scaling.checklist import NO_LAW
from scaling.family import FamilyResult
from scaling.fit import AICC_TIE, REJECTED_GAP, CurveFit, Rival, rivals
from scaling.joint.section import Joint
from scaling.laws import EQUATIONS, FEWEST, FORM_NAMES
from scaling.metrics import metric_name
from scaling.page import esc, table_html
from scaling.panel import Panel
from scaling.plots import x_name, x_symbol
from scaling.style import interval_text, number, with_interval
from scaling.table import Table, TableError, parse_number
from scaling.truth import Verdict

_IDENTIFIERS = frozenset({"trial", "study", "family", "label", "dataset", "eval_set"})


def laws_table(panel: Panel) -> str:
    """The laws drawn, with intervals, and the law in parameters and targets where there is one; empty without any."""
    x = x_symbol(panel)
    headers = [
        ("family", False),
        ("law", False),
        ("parameters, 95 % interval", False),
        (f"per tenfold {x}, 95 % interval", False),
        ("error %", True),
        ("held-out %", True),
    ]
    rows = []
    for family in panel.families:
        rows += [("", [(cell, "") for cell in row]) for row in _law_rows(family, panel)]
    if not rows:
        return ""
    note = (
        f"<p>Here y is {esc(metric_name(panel.metric))} and x is {esc(x_name(panel))}. Error is the mean distance of "
        "configurations from the law, held-out error that of configurations from a law fitted to smaller ones alone. "
        "The change per tenfold is the mean over the range a family was seen at.</p>"
    )
    return f"<h3>Laws</h3>{note}" + table_html(headers, rows, label="Laws with intervals")


def _law_rows(family: FamilyResult, panel: Panel) -> list[list[str]]:
    rows = []
    if family.fit is not None:
        law = f"{FORM_NAMES[family.fit.form]}\n{EQUATIONS[family.fit.form]}"
        values = _values(family.fit.params, family.boot.params() if family.boot else {}, 4)
        slope = with_interval(*family.slope, 3) if family.slope else "–"
        errors = [_or_dash(value, ".2g") for value in (family.fit.mape, family.fit.held_out_mape)]
        rows.append([family.name, law, values, slope, *errors])
    if family.joint is not None:
        law, values = _joint_law(family.joint, metric_name(panel.metric))
        rows.append([family.name, law, values, "–", "–", "–"])
    return rows


def _values(params: Mapping[str, float], limits: Mapping[str, tuple[float, float]], digits: int = 5) -> str:
    """One parameter a line, with its interval."""
    return "\n".join(f"{name} = {with_interval(value, limits.get(name), digits)}" for name, value in params.items())


def _joint_law(joint: Joint, metric: str) -> tuple[str, str]:
    """The law in several variables, and its parameters with what is wrong with them."""
    terms = [f"{t.coefficient}·{t.variable.upper()}^−{t.exponent}" for t in joint.fit.law.terms[:-1]]
    variables = {"n": "parameters N", "d": "targets D", "h": "history length H"}
    *most, last = (variables[name] for name in joint.fit.law.variables)
    law = f"In {', '.join(most)} and {last}:\n{metric} = E + {' + '.join(terms)}"
    cautions = "".join(f"\n{textwrap.fill(f'({warn.text})', 64)}" for warn in joint.fit.warnings)
    return law, _values(joint.fit.params, joint.draws.intervals(), 3) + cautions


def forms_table(panel: Panel) -> str:
    """Every form beside the one drawn, folded under a line that says how many are rejected; empty without others."""
    rows, rejected = [], 0
    for family in panel.families:
        if family.fit is None or family.chosen is None:
            continue
        held = family.fit.held_out_mape
        drawn = [family.name, FORM_NAMES[family.chosen], "0", _or_dash(held, ".3g"), "", "drawn"]
        rows.append(("chosen", [(cell, "") for cell in drawn]))
        for rival in rivals(family.fits, family.chosen):
            rejected += rival.rejected
            judged = "rejected" if rival.rejected else _standing(family.fits[rival.form], rival)
            errors = [_or_dash(value, ".3g") for value in (rival.held_out, rival.chosen_held_out)]
            cells = ["", FORM_NAMES[rival.form], _or_dash(rival.aicc_gap, "+.1f"), *errors, judged]
            rows.append(("", [(cell, "") for cell in cells]))
    others = sum(css == "" for css, _ in rows)
    if not others:
        return ""
    headers = [
        ("family", False),
        ("form", False),
        ("AICc above the form drawn", True),
        ("held-out error %", True),
        ("form drawn, same cuts %", True),
        ("verdict", False),
    ]
    note = (
        "<p>A held-out error is that of a form fitted below a cut and scored above it, on the cuts both share. A form "
        f"is rejected where its AICc is more than {REJECTED_GAP:g} higher and this error more than twice that of the "
        "form drawn.</p>"
    )
    summary = f"Forms compared: {rejected} of {others} that are not drawn are rejected"
    table = table_html(headers, rows, label="Forms compared")
    return f"<details><summary>{summary}</summary>{note}{table}</details>"


def _standing(fit: CurveFit, rival: Rival) -> str:
    """What stands against a form that is not rejected."""
    if fit.degenerate:
        return "degenerate: its exponent vanished"
    if rival.forecasts_better:
        few = "" if math.isfinite(rival.aicc_gap) else "; too few configurations for its AICc"
        return f"forecasts better{few}"
    if not math.isfinite(rival.aicc_gap):
        return "too few configurations for its AICc"
    return "not told apart" if rival.aicc_gap <= AICC_TIE else "less likely"


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
        _values(fit.params, limits),
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
