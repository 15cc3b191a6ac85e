"""How the trials of a table are grouped: which finished, which share a section, which are one configuration."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from scaling.fit import Points
from scaling.table import BoolArray, Table

# What makes two trials the same configuration, the seed apart; every `model.*` column counts too.
_DESIGN = frozenset(
    [
        "study",
        "dataset",
        "family",
        "label",
        "axis",
        "axis_value",
        "history",
        "candidates",
        "epochs",
        "dense_params",
        "learning_rate",
        "embedding_learning_rate",
        "batch_rows",
        "warmup",
        "decay",
        "precision",
        "segments",
        "fraction",
        "stochastic_length",
        "subsequence",
        "rows_per_user",
        "pieces",
        "weight_decay",
        "embedding_weight_decay",
        "beta1",
        "beta2",
        "clip",
        "split",
        "validation",
        "test",
    ]
)
# Seeds of one configuration may train slightly different amounts (an early stop), never this much.
_SAME_X = 1.05


def done(table: Table) -> BoolArray:
    """Mask (rows,) of trials that finished; a table without a status column is all finished trials."""
    return np.array([status == "done" for status in table.text("status", "done")], dtype=bool)


def fittable(table: Table, x: str) -> BoolArray:
    """Mask (rows,) of finished trials whose x is known and positive."""
    values = table.numbers(x)
    return done(table) & np.isfinite(values) & (values > 0)


def sections(table: Table) -> list[tuple[str, str, Table]]:
    """The table split by (study, dataset), in first-seen order."""
    keys = list(zip(table.text("study"), table.text("dataset")))
    return [(*key, table.where(np.array([k == key for k in keys]))) for key in dict.fromkeys(keys)]


def configurations(table: Table, metric: str, x: str) -> Points:
    """Group trials that differ only in their seed; x is averaged, the metric keeps each seed's value."""
    order = configuration_rows(table, x)
    xs, ys, labels = table.numbers(x), table.numbers(metric), table.text("label")
    return Points(
        x=np.array([float(np.mean(xs[rows])) for rows in order]),
        runs=tuple(ys[rows] for rows in order),
        labels=tuple(labels[rows[0]] for rows in order),
    )


def configuration_rows(table: Table, x: str) -> list[list[int]]:
    """The rows of each configuration, in order of x.

    Trials of one recorded design whose x differ by more than `_SAME_X` are told apart by x: the table then does not
    record what distinguishes them, and averaging them would invent a point.
    """
    columns = _design(table)
    xs = table.numbers(x)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(tuple(row.get(c, "") for c in columns), []).append(i)
    split: list[list[int]] = []
    for rows in groups.values():
        same = xs[rows].max() <= xs[rows].min() * _SAME_X
        split += [rows] if same else [[i for i in rows if xs[i] == value] for value in np.unique(xs[rows])]
    return sorted(split, key=lambda rows: float(np.mean(xs[rows])))


def alike(table: Table, x: str, free: Set[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of configurations that differ in the columns `free` alone, as indices into `configurations`."""
    columns = [c for c in _design(table) if c not in free]
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, rows in enumerate(configuration_rows(table, x)):
        groups.setdefault(tuple(table.rows[rows[0]].get(c, "") for c in columns), []).append(i)
    return tuple(tuple(group) for group in groups.values())


def _design(table: Table) -> list[str]:
    return [c for c in table.columns if c in _DESIGN or c.startswith("model.")]
