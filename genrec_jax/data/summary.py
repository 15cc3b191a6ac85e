"""What a dataset holds, in a few numbers."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from genrec_jax.data.sequences import Sequences, load

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


def describe(path: str | Path) -> dict[str, Any]:
    """Counts and rates of the dataset folder ``path``, as plain values that go into JSON.

    ``items`` is the catalogue without padding; ``tasks`` maps each task to its base rate over all events; ``first`` and
    ``last`` are UTC times; ``history`` maps quantile (as text) to events per user. Raises UserError as ``load`` does.
    """
    data = load(path)
    lengths = np.diff(data.offsets)
    first, last, labels, seen = _scanned(data)
    rates = labels / data.events
    return {
        "name": data.name,
        "users": data.users,
        "items": data.schema.items - 1,
        "items_seen": int(seen.sum()),
        "events": data.events,
        "requests": _requests(data),
        "tasks": {task: float(rate) for task, rate in zip(data.schema.tasks, rates, strict=True)},
        "features": [
            {"name": f.name, "level": f.level, "categories": f.vocab - 1, "width": f.width}
            for f in data.schema.features
        ],
        "first": _utc(data.origin + first),
        "last": _utc(data.origin + last),
        "days": (last - first) / 86_400,
        "history": {f"{q:g}": float(np.quantile(lengths, q)) for q in _QUANTILES},
    }


def _scanned(data: Sequences) -> tuple[int, int, np.ndarray, np.ndarray]:
    """(first time, last time, events with each label [A], which items have events [items] bool)."""
    first, last, labels = 2**31, -(2**31), np.zeros(len(data.schema.tasks), np.int64)
    seen = np.zeros(data.schema.items, bool)
    for _, (time, label, item) in data.scan("time", "labels", "item"):
        first, last = min(first, int(time.min())), max(last, int(time.max()))
        labels += label.sum(axis=0, dtype=np.int64)
        seen[item] = True
    return first, last, labels, seen


def _requests(data: Sequences) -> int | None:
    """Requests of all users: an id means nothing beyond its user, so runs of equal ids are counted user by user."""
    if data.request is None:
        return None
    count, previous = 0, -1
    users = data.offsets[:-1][np.diff(data.offsets) > 0]
    for first, (request,) in data.scan("request"):
        opens = np.ones(len(request), bool)
        opens[1:] = request[1:] != request[:-1]
        opens[0] = first == 0 or request[0] != previous
        opens[users[slice(*np.searchsorted(users, [first, first + len(request)]))] - first] = True
        count, previous = count + int(opens.sum()), request[-1]
    return count


def _utc(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):  # far beyond the calendar: a log whose time is no Unix time
        return f"{seconds} s"


def summary_table(summary: dict[str, Any]) -> Table:
    """:func:`describe`'s numbers as a table to print."""
    table = Table(title=summary["name"], show_header=False)
    table.add_row("users", f"{summary['users']:,}")
    table.add_row("items", f"{summary['items']:,} ({summary['items_seen']:,} with events)")
    table.add_row("events", f"{summary['events']:,}")
    if summary["requests"] is not None:
        table.add_row("requests", f"{summary['requests']:,}")
    for task, rate in summary["tasks"].items():
        table.add_row(f"task {task}", f"base rate {rate:.4f}")
    if not summary["tasks"]:
        table.add_row("tasks", "none (retrieval only)")
    for feature in summary["features"]:
        width = f", up to {feature['width']} each" if feature["width"] > 1 else ""
        table.add_row(f"{feature['level']} feature {feature['name']}", f"{feature['categories']:,} categories{width}")
    table.add_row("time", f"{summary['first']} to {summary['last']} ({summary['days']:,.1f} days)")
    quantiles = ", ".join(f"{value:g} ({float(q):.0%})" for q, value in summary["history"].items())
    table.add_row("events per user", quantiles)
    return table
