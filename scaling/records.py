"""What the columns of a results table say of how its trials were made, in words; a gap is said too."""

from __future__ import annotations

import numpy as np

from scaling.metrics import VALIDATION, is_retrieval
from scaling.table import FloatArray, Table
from scaling.trials import done

NOT_RECORDED = "not recorded"


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def values_text(table: Table, name: str) -> str:
    """The distinct values of a column, or its range when there are many."""
    if not table.has(name):
        return NOT_RECORDED
    values = table.distinct(name)
    if len(values) <= 4:
        return ", ".join(map(_short, values))
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return f"{len(values)} distinct values"
    return f"{len(values)} values from {numbers.min():.4g} to {numbers.max():.4g}"


def _short(value: str) -> str:
    """A measured number to six digits; everything else as it is."""
    try:
        return f"{float(value):.6g}" if len(value) > 8 and "." in value else value
    except ValueError:
        return value


def range_text(table: Table, name: str, label: str) -> str:
    """From where to where a positive column goes over the finished trials, and over how many decades."""
    values = _known(table, name)
    values = values[values > 0]
    if not len(values):
        return f"{label}: {NOT_RECORDED}"
    decades = np.log10(values.max() / values.min())
    return f"{label}: {values.min():.3g} to {values.max():.3g} ({decades:.1f} decades)"


def split_text(table: Table) -> str:
    """The rule of the split: ranking is split at global times or by users, by share; retrieval leaves each user's last
    event out."""
    if not (table.has("validation") and table.has("test")):
        return NOT_RECORDED
    rules = {"time": "global time", "users": "users"}
    rule = " and ".join(rules.get(name, name) for name in sorted(set(table.text("split", "time"))))
    shares = f"{rule}, validation share {values_text(table, 'validation')}, test share {values_text(table, 'test')}"
    retrieval = [is_retrieval(metric) for metric in table.metrics()]
    if not any(retrieval):
        return shares
    return "leave-last-out" if all(retrieval) else f"ranking: {shares}; retrieval: leave-last-out"


def evaluation_errors(table: Table, metric: str) -> FloatArray:
    """The standard errors (n,) of a metric that the finite set of evaluation users leaves, of finished trials.

    Empty where the table does not record them: `ne_error` is of `ne`, `ne_error/like` of `ne/like`, on any split.
    """
    split = VALIDATION if metric.startswith(VALIDATION) else ""
    root, slash, task = metric.removeprefix(split).partition("/")
    return _known(table, f"{split}{root}_error{slash}{task}")


def _known(table: Table, name: str) -> FloatArray:
    """The finite values of a column over the finished trials; empty without the column."""
    values = table.where(done(table)).numbers(name)
    return values[np.isfinite(values)]
