"""The results table: one row per trial, read strictly, never guessed.

A table is CSV (UTF-8, a header row), JSON lines (one object per line) or parquet. An empty cell means "missing".
Every refusal is a `TableError` whose message is one sentence naming the file and the row or column,
because a table that is silently half-read gives a law that is silently wrong.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.integer]

# Columns that must hold numbers when they are present: a word in one of them is refused when the table is read.
NUMERIC = frozenset(
    [
        "axis_value",
        "history",
        "candidates",
        "epochs",
        "targets",
        "dense_params",
        "embedding_params",
        "active_params",
        "flops_per_target",
        "flops_per_candidate",
        "train_flops",
        "activation_bytes",
        "learning_rate",
        "embedding_learning_rate",
        "batch_rows",
        "wall_seconds",
        "train_seconds",
        "examples_per_second",
        "eval_impressions",
        "mrr",
        "ne_error",
    ]
)
# What tells two rows of one trial apart: a trial may stand in several studies, families and axes.
_IDENTITY = ("trial", "study", "family", "label", "axis")
METRIC = re.compile(r"(ne|logloss|auc|gauc|base_rate)(/.+)?|(hr|ndcg|recall|mrr)(@\d+)?(/.+)?")
# A trial that failed may leave its metric as NaN or infinity; both mean "no value", neither may enter a fit.
_NOT_A_VALUE = frozenset({"", "nan", "inf", "-inf", "+inf", "infinity", "-infinity", "none", "null"})


class TableError(ValueError):
    """A results table that cannot be used; the message is one sentence naming the file and the row or column."""


class Table:
    """Rows of text cells with where each came from.

    `columns` is the union of the headers in first-seen order; `rows[i][column]` is the cell's text ("" = missing);
    `origins[i]` names the file and line of row i.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[dict[str, str]], origins: Sequence[str]) -> None:
        self.columns = list(columns)
        self.rows = list(rows)
        self.origins = list(origins)

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, column: str) -> bool:
        """True if the column exists and at least one row fills it."""
        return column in self.columns and any(row.get(column, "") != "" for row in self.rows)

    def require(self, *columns: str) -> None:
        """Raise `TableError` for the first of `columns` that no file of this table has."""
        for column in columns:
            if column not in self.columns:
                files = ", ".join(dict.fromkeys(origin.rsplit(", line", 1)[0] for origin in self.origins))
                raise TableError(f"{files or 'the table'}: the column {column!r} is missing")

    def has_value(self, column: str) -> bool:
        """True if at least one row holds a finite number in the column; `TableError` on a word."""
        return bool(np.isfinite(self.numbers(column)).any())

    def text(self, column: str, default: str = "") -> list[str]:
        """The cells of one column as text; `default` where a cell is missing."""
        return [row.get(column, "") or default for row in self.rows]

    def numbers(self, column: str) -> FloatArray:
        """The cells of one column as float64 (rows,), NaN where missing; `TableError` on a word."""
        return np.array(
            [parse_number(row.get(column, ""), column, origin) for row, origin in zip(self.rows, self.origins)],
            dtype=np.float64,
        )

    def where(self, mask: BoolArray) -> Table:
        """The rows at which `mask` (rows,) is true."""
        keep = np.flatnonzero(mask)
        return Table(self.columns, [self.rows[i] for i in keep], [self.origins[i] for i in keep])

    def with_column(self, name: str, value: str) -> Table:
        """The table with one more column, the same in every row."""
        return Table([*self.columns, name], [{**row, name: value} for row in self.rows], self.origins)

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The table with the columns `names` (old to new) under their new names, in place of others of those names.

        Raises:
            TableError: a column is missing, or a word is in one that is now numeric.
        """
        names = {old: new for old, new in names.items() if old != new}
        self.require(*names)
        kept = [c for c in self.columns if c in names or c not in names.values()]
        rows = [{names.get(c, c): row.get(c, "") for c in kept} for row in self.rows]
        table = Table([names.get(c, c) for c in kept], rows, self.origins)
        for old, new in names.items():
            if new in NUMERIC:
                self.numbers(old)
        return table

    def distinct(self, column: str) -> list[str]:
        """The distinct non-empty values of a column, in first-seen order."""
        return [value for value in dict.fromkeys(self.text(column)) if value]

    def metrics(self) -> list[str]:
        """The metric columns that at least one row fills (base rates excluded), in table order."""
        return [c for c in self.columns if METRIC.fullmatch(c) and not c.startswith("base_rate") and self.has(c)]

    def to_csv(self) -> str:
        """The table as CSV text with a header row and `\\n` line ends."""
        return rows_to_csv(self.columns, self.rows)


def rows_to_csv(columns: Sequence[str], rows: Iterable[dict[str, str]] | Iterable[dict[str, object]]) -> str:
    """CSV text of dictionaries; a missing key or None is an empty cell, a float keeps all its digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row.get(c) is None else row.get(c) for c in columns])
    return out.getvalue()


def read_table(paths: Path | str | Sequence[Path | str]) -> Table:
    """Read one or more tables (CSV, JSONL, or a runs folder holding `results.csv`) and join their rows.

    A trial that several tables hold, in the same study, family, label and axis, enters once.

    Raises:
        TableError: missing file, not UTF-8, no header, duplicate header, a row with too few or too many cells, a
            word in a numeric column, no rows at all, or one trial with different metrics in two tables.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise TableError("no results table was named")
    parts = [_read_one(Path(path)) for path in listed]
    columns = list(dict.fromkeys(c for part in parts for c in part.columns))
    table = Table(columns, [r for p in parts for r in p.rows], [o for p in parts for o in p.origins])
    if not table.rows:
        raise TableError(f"{', '.join(str(path) for path in listed)}: the table has a header but no rows")
    for column in columns:
        if column in NUMERIC or METRIC.fullmatch(column):
            table.numbers(column)  # refuses a word here, before any fit has started
    return _without_repeats(table) if len(parts) > 1 and "trial" in columns else table


def _without_repeats(table: Table) -> Table:
    """The table without repeated trials, the first kept; `TableError` where a repeat has other metrics.

    Repeats counted as seeds would narrow every interval, and of two different results neither can be preferred.
    """
    metrics = [c for c in table.columns if METRIC.fullmatch(c)]
    values = np.stack([np.nan_to_num(table.numbers(c), nan=np.inf) for c in metrics] or [np.zeros(len(table))], axis=1)
    first: dict[tuple[str, ...], int] = {}
    keep = np.ones(len(table), dtype=bool)
    for i, row in enumerate(table.rows):
        seen = first.setdefault(tuple(row.get(c, "") for c in _IDENTITY), i) if row.get("trial") else i
        keep[i] = seen == i
        if not np.array_equal(values[i], values[seen]):
            column = metrics[int(np.flatnonzero(values[i] != values[seen])[0])]
            where = f"{table.origins[seen]} and {table.origins[i]}"
            raise TableError(f"{where}: the trial {row['trial']!r} appears twice with different {column!r}")
    return table.where(keep)


def _read_one(path: Path) -> Table:
    if path.is_dir():
        path = path / "results.csv"
    if not path.is_file():
        raise TableError(f"{path}: no such results table")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text (byte {error.start} cannot be decoded)") from None
    return _parse_jsonl(path, text) if path.suffix in {".jsonl", ".ndjson"} else _parse_csv(path, text)


def _parse_csv(path: Path, text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows: list[dict[str, str]] = []
    origins: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = _check_header(path, cells)
                continue
            if len(cells) != len(header):
                raise TableError(
                    f"{path}, line {reader.line_num}: the row has {len(cells)} cells where the header has "
                    f"{len(header)} (is the file truncated?)"
                )
            rows.append({name: cell.strip() for name, cell in zip(header, cells)})
            origins.append(f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    if not header:
        raise TableError(f"{path}: the file is empty, a header row was expected")
    return Table(header, rows, origins)


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table as read
    except ImportError:
        raise TableError(f"{path}: reading parquet needs pyarrow") from None
    try:
        records = read(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise TableError(f"{path}: not a parquet table ({str(error).splitlines()[0]})") from None
    columns = list(records[0]) if records else []
    origins = [f"{path}, line {row + 1}" for row in range(len(records))]
    return Table(_check_header(path, columns), [{k: _cell(v) for k, v in one.items()} for one in records], origins)


def _check_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    for position, name in enumerate(header):
        if not name:
            raise TableError(f"{path}: column {position + 1} of the header has no name")
        if name in header[:position]:
            raise TableError(f"{path}: the column {name!r} appears twice in the header")
    return header


def _parse_jsonl(path: Path, text: str) -> Table:
    rows: list[dict[str, str]] = []
    origins: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TableError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise TableError(f"{path}, line {number}: a JSON object was expected, one per line")
        rows.append({str(key): _cell(value) for key, value in record.items()})
        origins.append(f"{path}, line {number}")
    return Table(list(dict.fromkeys(key for row in rows for key in row)), rows, origins)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parse_number(cell: str, column: str, origin: str) -> float:
    """A cell as a float, NaN for a missing, NaN or infinite one; `TableError` naming the place for a word."""
    if cell.lower() in _NOT_A_VALUE:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        raise TableError(f"{origin}: {cell!r} in the column {column!r} is not a number") from None
    return value if math.isfinite(value) else math.nan
