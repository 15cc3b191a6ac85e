"""Turns log files into a dataset folder, in memory that does not grow with the log.

1. *read*: files are read in chunks, checked and kept as segments, whose rows are grouped by a hash of the user
   (``segments.py``); several files at a time.
2. *numbers*: the keys of all segments are numbered in order of first appearance, but for users.
3. *sort*: each partition of users is sorted by (user, time, order, file order) into a run (``partitions.py``); several
   at a time.
4. *merge*: runs are put together, users in order of first appearance, shard by shard into their place in the columns;
   several at a time.

The dataset does not depend on the number of segments, partitions, shards or workers. A run that was killed goes on
where it was (``work.py``). Memory: ``memory`` bytes per worker, and for all of the log the keys of items and categories
(about 150 bytes each) and 60 bytes per user.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_jax.data.log import UNITS_PER_SECOND, LogMapping
from genrec_jax.data.log_columns import Vocabulary, are_integers, check_kinds, key_table
from genrec_jax.data.log_files import CHUNK_ROWS, LogFile, open_log
from genrec_jax.data.numbering import number_keys
from genrec_jax.data.partitions import MergePlan, SortPlan, merge_users, shares_of, sort_part
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.segments import ReadPlan, read_file, record_type, varies, where
from genrec_jax.data.sequences import FOLDERS, FORMAT, Sequences, load, write_manifest
from genrec_jax.data.side_tables import LoadedTable
from genrec_jax.data.work import Task, Work, making
from genrec_jax.errors import UserError

#: Bytes of memory that a worker uses beside what Python and its libraries take, by default.
MEMORY = 512 << 20
_MAX_SPAN = 2**31 - 1
_MOST_PARTITIONS = 4096
_KEYS_AT_ONCE = 1 << 20


def import_log(
    files: Sequence[str | Path],
    mapping: LogMapping,
    out: str | Path,
    *,
    name: str | None = None,
    notes: Sequence[str] = (),
    workers: int = 1,
    memory: int = MEMORY,
    quiet: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> Sequences:
    """Imports ``files``, in this order, as one log into the dataset folder ``out`` and opens it.

    ``out`` appears, or replaces the dataset that is there, only once it is complete. ``name`` (default: the folder's)
    is the dataset's name in reports, which also repeat its ``notes``. ``memory``: bytes for each of ``workers``
    processes; only a single user's events must fit. Raises UserError, one sentence naming file and row or column, for a
    bad log.
    """
    logs = _open_all([Path(file) for file in files], mapping)
    stamped = [*(log.path for log in logs), *(table.file for table in mapping.tables)]
    plan = {
        "format": FORMAT,
        "files": [[str(path.resolve()), *_stamp(path)] for path in stamped if path.exists()],
        "mapping": mapping.to_json(),
        "memory": memory,
    }
    with making(out, plan, workers=workers, quiet=quiet) as work:
        _Import(work, mapping, logs, memory).run(name or Path(out).name, notes, chunk_rows)
    return load(out)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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


class _Import:
    """The stages of one import, in order; each leaves what the later ones must know of the log."""

    def __init__(self, work: Work, mapping: LogMapping, logs: list[LogFile], memory: int):
        self._work, self._pieces, self._mapping, self._logs = work, work.pieces, mapping, logs
        catalogue = Vocabulary(first=1)
        self._tables = [LoadedTable(table, catalogue) for table in mapping.tables]
        self._catalogue = catalogue
        self._memory, self._row_bytes = memory, record_type(mapping).itemsize

    def run(self, name: str, notes: Sequence[str], chunk_rows: int) -> None:
        self._read(chunk_rows)
        (numbers,) = self._work.make(
            "numbering keys",
            number_keys,
            [Task("numbers", (self._mapping, self._segments, self._catalogue), len(self._segments))],
            noun="",
        )
        self._sort()
        self._place_users()
        self._merge()
        self._work.close()
        items = self._write_items()
        features = [*self._write_features(numbers["categories"]), *self._write_tables()]
        self._write_users()
        source = {
            "files": [log.path.name for log in self._logs],
            "mapping": self._mapping.to_json(),
            "users": self._users,
            "events": int(self._offsets[-1]),
            "notes": list(notes),
        }
        with self._work.showing("hashing"):
            write_manifest(
                self._work.dataset,
                name=name,
                schema=Schema(items + 1, tuple(label.name for label in self._mapping.labels), tuple(features)),
                origin=self._origin,
                has_requests=self._mapping.request is not None,
                source=source,
            )

    def _read(self, chunk_rows: int) -> None:
        rows = max(1, self._memory // (4 * self._row_bytes + 250))  # a row may bring several new keys
        self._most = max(1, self._memory // (5 * self._row_bytes + 60))  # rows that can be sorted at once
        expected = sum(log.most_rows for log in self._logs)
        partitions = min(-(-expected // self._most), _MOST_PARTITIONS)
        plan = ReadPlan(self._mapping, partitions, rows, min(chunk_rows, rows))
        tasks = [
            Task(f"file-{number:06d}", (plan, log, number), log.path.stat().st_size)
            for number, log in enumerate(self._logs)
        ]
        found = self._work.make("reading", read_file, tasks, noun="rows")
        self._segments = [segment for result in found for segment in result["segments"]]
        rows_each = [segment["rows"] for segment in self._segments]
        self._starts = [0, *np.cumsum(rows_each).tolist()]
        self._partitions = partitions

    def where(self, row: int) -> str:
        """Names the file and row of a row given by its number in reading order."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return where(self._segments[number], row - self._starts[number])

    def _sort(self) -> None:
        mapping, names = self._mapping, tuple(segment["name"] for segment in self._segments)
        kinds = self._logs[0].kinds
        unit = kinds[mapping.time].removeprefix("timestamp[").removesuffix("]")
        self._plan = SortPlan(
            mapping,
            names,
            tuple(self._starts[:-1]),
            UNITS_PER_SECOND[unit if kinds[mapping.time].startswith("timestamp") else mapping.time_unit],
            kinds[mapping.user] == "text",
        )
        starts = np.stack([self._pieces.read(f"{name}.row-starts", np.int64) for name in names])
        events = np.diff(starts, axis=1).sum(axis=0).tolist()
        parts = shares_of(events, self._most)
        tasks = [Task(part.name, (self._plan, part), events[part.number] // part.shares) for part in parts]
        self._runs = [part.name for part in parts]
        self._sorted = self._work.make("sorting", sort_part, tasks)
        self._refuse()

    def _refuse(self) -> None:
        """Refuses what sorting has found wrong, naming the first row of its kind."""

        def first(key: str) -> Any:
            return min((run[key] for run in self._sorted if run[key] is not None), default=None)

        if (row := first("unsorted")) is not None:
            raise UserError(f"{self.where(row)}: time is before that of the same user's previous event")
        if not any(run["users"] for run in self._sorted):
            least = self._mapping.min_events
            raise UserError(f"{self._logs[0].path}: no user is left with {least} events of such items")
        self._origin = min(run["earliest"] for run in self._sorted if run["events"])
        late, _, row = first("latest")
        if -late - self._origin > _MAX_SPAN:
            raise UserError(
                f"{self.where(row)}: time is {-late - self._origin} s after the first event, over {_MAX_SPAN} s; "
                "check the unit"
            )
        if (found := first("interrupted")) is not None:
            raise UserError(
                f"{self.where(found[1])}: the request was interrupted by another one of the same user; check times "
                "and order"
            )
        for name in self._plan.user_features:
            rows = [run["varying"][name] for run in self._sorted if run["varying"][name] is not None]
            if rows:
                raise UserError(f"{self.where(min(rows))}: {varies('user', name)}")

    def _place_users(self) -> None:
        """Numbers users by first appearance, and says where each run's users are."""
        pieces, plan = self._pieces, self._plan
        tables = [pieces.read(f"{run}.users", plan.user_type) for run in self._runs]
        order = np.argsort(np.concatenate([table["first"] for table in tables]))
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order))
        ends = np.cumsum([len(table) for table in tables])[:-1]
        self._places = np.split(place, ends)
        self._users = len(order)
        counts = np.concatenate([table["count"] for table in tables])[order]
        requests = np.concatenate([table["requests"] for table in tables])[order].astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        pieces.save("offsets", self._offsets)
        pieces.save("requests", np.cumsum(requests) - requests)
        for run, places in zip(self._runs, self._places):
            pieces.save(f"{run}.places", places)
        for name in plan.user_features:
            column = np.concatenate([table[f"feature {name}"] for table in tables])[order]
            self._save_array(f"users/{name}", column)
        self._save_array("offsets", self._offsets)

    def _merge(self) -> None:
        """Writes the event columns, shard by shard."""
        pieces, mapping, events = self._pieces, self._mapping, int(self._offsets[-1])
        columns: dict[str, tuple[Any, tuple[int, ...]]] = {
            "item": (np.int32, (events,)),
            "time": (np.int32, (events,)),
            "labels": (np.uint8, (events, len(mapping.labels))),
        }
        if mapping.request is not None:
            columns["request"] = (np.int32, (events,))
        columns |= {f.name: (np.int32, (events,)) for level, f in mapping.features if level == "event"}
        pieces.create({f"dataset/events/{name}": column for name, column in columns.items()})
        bounds = _shards(self._offsets, self._most)
        for run, places in zip(self._runs, self._places):
            pieces.save(f"{run}.bounds", np.searchsorted(places, bounds))
        remap = self._renumber_items()
        plan = MergePlan(self._plan, tuple(self._runs), self._origin, remap)
        tasks = [
            Task(f"shard-{n:06d}", (plan, n, first, stop), int(self._offsets[stop] - self._offsets[first]))
            for n, (first, stop) in enumerate(itertools.pairwise(bounds.tolist()))
        ]
        self._work.make("writing", merge_users, tasks)

    def _renumber_items(self) -> bool:
        """Numbers anew the items that are left after ``min_events``; False if none can have gone."""
        self._left: np.ndarray | None = None
        if not self._mapping.min_events:
            return False
        left = [self._pieces.read(f"{run}.items", np.int64) for run in self._runs]
        self._left = np.unique(np.concatenate(left))
        table = np.zeros(int(self._left.max()) + 1, np.int32)
        table[self._left] = np.arange(1, len(self._left) + 1)
        self._pieces.save("item-renumbered", table)
        return True

    def _write_items(self) -> int:
        """Writes the items' keys; how many there are."""
        keys = self._pieces.keys("items.keys")
        if self._left is not None:
            keys = keys.take(pa.array(self._left - 1))
        typed = self._logs[0].kinds[self._mapping.item] == "text"
        typed |= any(table.text for table in self._tables if table.spec.level == "item")
        self._write_keys("items", keys, not typed and are_integers(keys))
        return len(keys)

    def _write_features(self, categories: dict[str, int]) -> Iterator[Feature]:
        """Writes what is left of the features that are columns of the log; their descriptions."""
        for level, feature in self._mapping.features:
            name = feature.name
            if level == "item":
                self._save_array(f"items/{name}", self._pieces.read(f"items.feature-{name}", np.int32))
            keys = self._pieces.keys(f"feature-{name}.keys")
            self._write_keys(f"features/{name}", keys, are_integers(keys))
            yield Feature(name, categories[name] + 1, 1, level)

    def _write_tables(self) -> Iterator[Feature]:
        """Writes the features of side tables; their descriptions."""
        for table in self._tables:
            folder = FOLDERS[table.spec.level]
            if table.spec.level == "item":
                for categories, column in zip(table.categories, table.columns, strict=True):
                    padding = np.zeros((1, *column.shape[1:]), np.int32)
                    self._save_array(f"{folder}/{categories.feature.name}", np.concatenate([padding, column]))
            for categories, column in zip(table.categories, table.columns, strict=True):
                keys = pa.array(list(categories.vocabulary.ids), pa.string())
                self._write_keys(f"features/{categories.feature.name}", keys, are_integers(keys))
                width = column.shape[1] if column.ndim == 2 else 1
                yield Feature(categories.feature.name, len(keys) + 1, width, table.spec.level)

    def _write_users(self) -> None:
        """Writes the users' keys, and their features from side tables."""
        pieces, tables = self._pieces, [table for table in self._tables if table.spec.level == "user"]
        names = {table: [f"dataset/users/{c.feature.name}" for c in table.categories] for table in tables}
        for table in tables:
            shapes = [(np.int32, (self._users, *column.shape[1:])) for column in table.columns]
            pieces.create(dict(zip(names[table], shapes, strict=True)))
        integers = all(run["integers"] for run in self._sorted if run["users"])
        path = self._work.dataset / "keys/users.parquet"
        with pq.ParquetWriter(path, key_table(pa.array([], pa.string()), 0, integers).schema) as writer:
            for first, keys in self._user_keys():
                writer.write_table(key_table(keys, first, integers))
                for table in tables:
                    for name, values in zip(names[table], table.features(keys.to_pylist()), strict=True):
                        pieces.put(name, first, values)

    def _user_keys(self) -> Iterator[tuple[int, Any]]:
        """(first user, keys of the users from there on), in order."""
        for first in range(0, self._users, _KEYS_AT_ONCE):
            found, at = [], []
            for run, places in zip(self._runs, self._places):
                low, high = np.searchsorted(places, [first, first + _KEYS_AT_ONCE]).tolist()
                found.append(self._pieces.keys(f"{run}.keys", low, high - low))
                at.append(places[low:high])
            yield first, pa.concat_arrays(found).take(pa.array(np.argsort(np.concatenate(at))))

    def _write_keys(self, name: str, keys: Any, integers: bool) -> None:
        path = self._work.dataset / f"keys/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(key_table(keys, 1, integers), path)

    def _save_array(self, name: str, values: np.ndarray) -> None:
        path = self._work.dataset / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)


def _shards(offsets: np.ndarray, most: int) -> np.ndarray:
    """Bounds [shards + 1] of runs of users with at most ``most`` events together, or of one user."""
    bounds = [0]
    while bounds[-1] < len(offsets) - 1:
        first = bounds[-1]
        bounds.append(max(first + 1, int(np.searchsorted(offsets, offsets[first] + most, side="right")) - 1))
    return np.array(bounds)
