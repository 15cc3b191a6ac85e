"""What `genrec fit` and `genrec report` call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from scaling.report import PageOptions, write_report, write_whole
from scaling.study import analyse
from scaling.table import read_table


def fit_command(
    tables: Sequence[Path],
    y: str | None = None,
    x: str = "train_flops",
    group: str = "family",
    out: Path | None = None,
) -> dict[str, object]:
    """Fit the laws of one or more results tables and return them as plain data, also written to `out` if given.

    `y` is the metric (None: each section's default one); `x` and `group` are those of `scaling.study.analyse`.

    Raises:
        TableError: a table cannot be used; nothing is written.
    """
    result = analyse(read_table(list(tables)), y, x=x, group=group).to_json()
    if out is not None:
        write_json(out, result)
    return result


def write_json(out: Path, result: object) -> None:
    """Whole or not at all."""
    write_whole(out, json.dumps(result, indent=1, allow_nan=False) + "\n")


def report_command(
    runs: Path | Sequence[Path],
    out: Path,
    *,
    title: str = "Scaling report",
    y: str | None = None,
    **options: Unpack[PageOptions],
) -> dict[str, object]:
    """Write the report of one or more tables or runs folders to the page `out`; returns the analysis as plain data.

    `y` is the metric of `scaling.report.write_report`, and `options` are its other arguments.

    Raises:
        TableError: a table cannot be used; nothing is written.
        ValueError: an unknown form.
    """
    return write_report(read_table(runs), out, title=title, metric=y, **options).to_json()
