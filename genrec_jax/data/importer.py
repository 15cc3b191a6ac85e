"""Turns log files into a dataset folder: read once in chunks, sort once by (user, time, order, file order).

Columns are spooled to disk as they are read, so memory holds one chunk, the key dictionaries and, while sorting, about
40 bytes per event; features and labels are gathered from disk to disk.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from genrec_jax.data.log import UNITS_PER_SECOND, LogMapping
from genrec_jax.data.log_columns import Vocabulary, check_kinds, keys, labels, times, whole_numbers
from genrec_jax.data.log_files import CHUNK_ROWS, Chunk, LogFile, open_log
from genrec_jax.data.schema import Feature, Level, Schema
from genrec_jax.data.sequences import Sequences, load, write_manifest, writing
from genrec_jax.data.side_tables import Categories, LoadedTable, constant_per_key
from genrec_jax.errors import UserError

_FOLDER: Mapping[Level, str] = {"user": "users", "item": "items", "event": "events"}
_MAX_SPAN = 2**31 - 1


def import_log(
    files: Sequence[str | Path],
    mapping: LogMapping,
    out: str | Path,
    *,
    name: str | None = None,
    notes: Sequence[str] = (),
    quiet: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> Sequences:
    """Imports ``files``, in this order, as one log into the dataset folder ``out`` and opens it.

    ``out`` appears, or replaces the dataset that is there, only once it is complete. ``name`` (default: the folder's)
    is the dataset's name in reports, which also repeat its ``notes``. Raises UserError, one sentence naming file and
    row or column, for a bad log.
    """
    logs = _open_all([Path(file) for file in files], mapping)
    with writing(out) as folder:
        for sub in ("users", "items", "events", "keys/features", "spool"):
            (folder / sub).mkdir(parents=True)
        with _progress(logs, quiet) as advance:
            reader = _Reader(mapping, folder / "spool")
            reader.read(logs, chunk_rows, advance)
        _write(folder, reader, name or Path(out).name, logs, notes)
        shutil.rmtree(folder / "spool")
    return load(out)


def _open_all(paths: list[Path], mapping: LogMapping) -> list[LogFile]:
    """Opens every file before any is read: names, columns and types are cheap to check, rows are not."""
    if not paths:
        raise UserError("no log file was given")
    logs: list[LogFile] = []
    for path in paths:
        log = open_log(path, mapping.columns, header=mapping.header)
        check_kinds(log, mapping.columns)
        for column, kind in log.kinds.items():
            if logs and kind != logs[0].kinds[column]:
                first = logs[0]
                raise UserError(f"{path}: column {column!r} is {kind}, but {first.kinds[column]} in {first.path}")
        logs.append(log)
    return logs


@contextmanager
def _progress(logs: list[LogFile], quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows rows read and their rate on standard error; yields the function that adds rows."""
    rows = [log.rows for log in logs]
    total = None if None in rows else sum(row for row in rows if row is not None)
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("reading", total=total, rate="")

        def advance(count: int) -> None:
            progress.update(task, advance=count)
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed
            if speed:
                progress.update(task, rate=f"{speed:,.0f} rows/s")

        yield advance


class _Spool:
    """Event columns on disk, appended chunk by chunk, all of the same length when complete."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._types: dict[str, np.dtype] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
            self._types[name] = values.dtype
        values.tofile(self._files[name])

    def read(self, name: str) -> np.ndarray:
        """The column [E] as written, in memory; after :meth:`close`."""
        return np.fromfile(self._folder / name, self._types[name])

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Reader:
    """Checks and encodes chunks of the log in file order; what it leaves is the spool and the vocabularies."""

    def __init__(self, mapping: LogMapping, folder: Path):
        self.mapping = mapping
        self.users = Vocabulary(first=0)
        self.items = Vocabulary(first=1)
        self.requests = Vocabulary(first=0)
        self.tables = [LoadedTable(table, self.items) for table in mapping.tables]
        self.categories = [(level, Categories(feature)) for level, feature in mapping.features]
        self.spool = _Spool(folder)
        self.units = UNITS_PER_SECOND[mapping.time_unit]
        self.starts: list[tuple[int, Chunk]] = []
        self.events = 0

    def read(self, logs: list[LogFile], chunk_rows: int, advance: Callable[[int], None]) -> None:
        try:
            for log in logs:
                self._note_kinds(log)
                before = self.events
                for chunk in log.chunks(chunk_rows):
                    self._add(chunk)
                    advance(chunk.rows)
                if self.events == before:
                    raise UserError(f"{log.path} has no rows")
        finally:
            self.spool.close()

    def _note_kinds(self, log: LogFile) -> None:
        self.users.note_kind(log.kinds[self.mapping.user])
        self.items.note_kind(log.kinds[self.mapping.item])
        kind = log.kinds[self.mapping.time]
        if kind.startswith("timestamp"):
            self.units = UNITS_PER_SECOND[kind.removeprefix("timestamp[").removesuffix("]")]

    def _add(self, chunk: Chunk) -> None:
        if not chunk.rows:
            return
        mapping, spool = self.mapping, self.spool
        # Rows are named later from the chunk's number alone; its columns must not be kept.
        self.starts.append((self.events, dataclasses.replace(chunk, columns={})))
        self.events += chunk.rows
        spool.append("user", keys(chunk, mapping.user, "user", self.users))
        spool.append("item", keys(chunk, mapping.item, "item", self.items))
        spool.append("time", times(chunk, mapping.time))
        if mapping.order is not None:
            spool.append("order", whole_numbers(chunk, mapping.order, "order"))
        if mapping.request is not None:
            spool.append("request", keys(chunk, mapping.request, "request", self.requests))
        for label in mapping.labels:
            spool.append(f"label {label.name}", labels(chunk, label))
        for _, categories in self.categories:
            spool.append(f"feature {categories.feature.name}", categories.encode(chunk))

    def where(self, event: int) -> str:
        """Names the file and row of an event given by its number in reading order."""
        start, chunk = next(pair for pair in reversed(self.starts) if pair[0] <= event)
        return chunk.where(event - start)


def _write(folder: Path, reader: _Reader, name: str, logs: list[LogFile], notes: Sequence[str]) -> None:
    """Sorts the spooled events and writes every file of the dataset folder."""
    mapping, spool = reader.mapping, reader.spool
    user, time = spool.read("user"), spool.read("time")
    if mapping.promise_sorted:
        _check_promise(user, time, reader)
    tie_breaks = [spool.read("order")] if mapping.order is not None else []
    order = np.lexsort([*tie_breaks, time, user])  # the last key is the first; stable, so file order breaks ties
    del tie_breaks
    item = spool.read("item")
    if mapping.min_events:
        kept, users, items = _frequent(user, item, mapping.min_events)
        if not len(users):
            raise UserError(f"{logs[0].path}: no user is left with {mapping.min_events} events of such items")
        order = order[kept[order]]
        reader.users.keep(users)
        reader.items.keep(items)
        user, item = np.searchsorted(users, user), np.searchsorted(items, item) + 1
    origin = _write_time(folder, time, order, reader)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user[order], minlength=len(reader.users)))])
    np.save(folder / "offsets.npy", offsets.astype(np.int64))
    if mapping.request is not None:
        np.save(folder / "events/request.npy", _requests(user[order], spool.read("request")[order], order, reader))
    del time, user
    np.save(folder / "events/item.npy", item[order].astype(np.int32))
    _write_labels(folder, spool, mapping, order)
    features = _write_features(folder, reader, order)
    schema = Schema(len(reader.items) + 1, tuple(label.name for label in mapping.labels), features)
    pq.write_table(reader.users.table(), folder / "keys/users.parquet")
    pq.write_table(reader.items.table(), folder / "keys/items.parquet")
    source = {
        "files": [log.path.name for log in logs],
        "mapping": mapping.to_json(),
        "users": len(reader.users),
        "events": len(order),
        "notes": list(notes),
    }
    has_requests = mapping.request is not None
    write_manifest(folder, name=name, schema=schema, origin=origin, has_requests=has_requests, source=source)


def _frequent(user: np.ndarray, item: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See ``LogMapping.min_events``: events that stay [E] bool, and the user and item ids that do, ascending."""
    enough = (np.bincount(user)[user] >= least) & (np.bincount(item)[item] >= least)
    left = np.bincount(user[enough], minlength=int(user.max()) + 1)
    kept = enough & (left[user] >= least)
    return kept, np.flatnonzero(left >= least), np.unique(item[enough])


def _check_promise(user: np.ndarray, time: np.ndarray, reader: _Reader) -> None:
    order = np.argsort(user, kind="stable")
    falls = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
    if falls.any():
        event = int(order[1:][falls].min())
        raise UserError(f"{reader.where(event)}: time is before that of the same user's previous event")


def _write_time(folder: Path, time: np.ndarray, order: np.ndarray, reader: _Reader) -> int:
    """Writes whole seconds since the first event's second, which is returned as the origin."""
    seconds = time[order] // reader.units
    origin, last = int(seconds.min()), int(seconds.max())
    if last - origin > _MAX_SPAN:
        latest = reader.where(int(order[seconds.argmax()]))
        raise UserError(
            f"{latest}: time is {last - origin} s after the first event, over {_MAX_SPAN} s; check the unit"
        )
    np.save(folder / "events/time.npy", (seconds - origin).astype(np.int32))
    return origin


def _requests(user: np.ndarray, request: np.ndarray, order: np.ndarray, reader: _Reader) -> np.ndarray:
    """Request ids [E] int32 counted along the sorted log; refuses a request whose events are not adjacent."""
    key = user.astype(np.int64) * len(reader.requests) + request
    starts = np.concatenate([[True], key[1:] != key[:-1]])
    _, first = np.unique(key, return_index=True)
    resumed = starts.copy()
    resumed[first] = False
    if resumed.any():
        where = reader.where(int(order[np.argmax(resumed)]))
        raise UserError(f"{where}: the request was interrupted by another one of the same user; check times and order")
    return (np.cumsum(starts) - 1).astype(np.int32)


def _write_labels(folder: Path, spool: _Spool, mapping: LogMapping, order: np.ndarray) -> None:
    shape = (len(order), len(mapping.labels))
    table = np.lib.format.open_memmap(folder / "events/labels.npy", mode="w+", dtype=np.uint8, shape=shape)
    for column, label in enumerate(mapping.labels):
        table[:, column] = spool.read(f"label {label.name}")[order]
    table.flush()


def _write_features(folder: Path, reader: _Reader, order: np.ndarray) -> tuple[Feature, ...]:
    """Writes every feature table and its categories; returns their description for the schema."""
    written: list[Feature] = []

    def write(level: Level, categories: Categories, table: np.ndarray) -> None:
        name = categories.feature.name
        np.save(folder / _FOLDER[level] / f"{name}.npy", table)
        pq.write_table(categories.vocabulary.table(), folder / f"keys/features/{name}.parquet")
        width = table.shape[1] if table.ndim == 2 else 1
        written.append(Feature(name, len(categories.vocabulary) + 1, width, level))

    for level, categories in reader.categories:
        column = reader.spool.read(f"feature {categories.feature.name}")
        write(level, categories, column[order] if level == "event" else _fold(level, categories, column, reader))
    for table in reader.tables:
        ids: Any = reader.users if table.spec.level == "user" else reader.items
        for categories, values in zip(table.categories, table.features(ids), strict=True):
            write(table.spec.level, categories, values)
    return tuple(written)


def _fold(level: Level, categories: Categories, column: np.ndarray, reader: _Reader) -> np.ndarray:
    """A log column that describes the user or item as a table by its id."""
    ids = reader.users if level == "user" else reader.items
    table, bad = constant_per_key(reader.spool.read(level), column, ids.first + len(ids))
    if bad is not None:
        name = categories.feature.name
        raise UserError(f"{reader.where(bad)}: {level} feature {name!r} differs from the same {level}'s earlier event")
    return table
