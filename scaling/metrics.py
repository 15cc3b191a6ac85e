"""The names of metrics: which direction is better, which one a report headlines, what people call them."""

from __future__ import annotations

import re

from scaling.table import METRIC, Table, TableError

VALIDATION = "validation/"
_FALLING = re.compile(r"(^|[^a-z])(ne|nll|mse|rmse|mae|bce|error|perplexity)([^a-z]|$)|loss|entropy")
_NAMES = {"ne": "NE", "logloss": "log loss", "auc": "AUC", "gauc": "GAUC", "mrr": "MRR"}
_COMPACT_ROOTS = frozenset({"ne", "auc", "gauc"})


def higher_is_better(metric: str) -> bool:
    """False for losses, errors and NE, True for every other metric (AUC, hit rate, NDCG, MRR, ...).

    On any split: `validation/ne` falls as `ne` does.
    """
    return _FALLING.search(metric.lower()) is None


def has_metric(table: Table) -> bool:
    """Whether any metric of the test or the validation part has a value."""
    return bool(table.metrics() or metrics_of_split(table, VALIDATION))


def default_metric(table: Table) -> str:
    """The metric a report headlines: NE, else log loss, else HR@10, else the first metric column that has values.

    A table without test metrics, such as one of a tuning study, is headlined by its validation metrics alike.

    Raises:
        TableError: no metric column has values.
    """
    test, validation = table.metrics(), metrics_of_split(table, VALIDATION)
    present = test or validation
    for name in ("ne", "logloss", "hr@10"):
        if (name if test else VALIDATION + name) in present:
            return name if test else VALIDATION + name
    if not present:
        raise TableError("the table has no metric column with values (ne, logloss, auc, hr@10, ...)")
    return present[0]


def metric_name(metric: str) -> str:
    """A metric's name for people: `ne/click` is "NE (click)", `validation/ne` "validation NE"."""
    if metric.startswith(VALIDATION):
        return f"validation {metric_name(metric.removeprefix(VALIDATION))}"
    root, _, task = metric.partition("/")
    name = _NAMES.get(root, root.upper() if "@" in root else root)
    return f"{name} ({task})" if task else name


def metrics_of_split(table: Table, headline: str) -> list[str]:
    """The metric columns with values of the split that the headline is of, in table order."""
    if not headline.startswith(VALIDATION):
        return table.metrics()
    names = {c: c.removeprefix(VALIDATION) for c in table.columns if c.startswith(VALIDATION) and table.has(c)}
    return [c for c, name in names.items() if METRIC.fullmatch(name) and not name.startswith("base_rate")]


def is_retrieval(metric: str) -> bool:
    """True for a metric of a ranked list: HR@K, NDCG@K, recall@K, MRR."""
    return "@" in metric or metric.startswith("mrr")


def is_task(metric: str) -> bool:
    """True for a metric of one task (`auc/click`), False for a mean over tasks (`auc`)."""
    return "/" in metric.removeprefix(VALIDATION)


def is_compact(metric: str) -> bool:
    """True for what deserves a small figure beside the headline: NE, AUC, GAUC (mean and per task), retrieval."""
    name = metric.removeprefix(VALIDATION)
    return name.partition("/")[0] in _COMPACT_ROOTS or is_retrieval(name)
