"""Requests as a user writes them, one JSON object or parquet row each (docs/serving.md), checked and made dense."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr  # a message stays a line, however long the value
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_jax.errors import UserError
from genrec_jax.serve.catalogue import Catalogue
from genrec_jax.serve.events import ALONE, Events, Request

SUFFIXES = (".jsonl", ".parquet")
_KEYS = ("user", "time", "context", "history", "append", "candidates")
_EVENT_KEYS = ("item", "time", "labels", "request")
_LAST_SECOND = 2**31 - 1
_BATCH_ROWS = 64  # of a parquet file, held at once


class Row(NamedTuple):
    """Line or row ``number`` (from 1) of a file: a record, or why it is none; ``done``: share of the file behind it."""

    number: int
    record: Any
    fault: str
    done: float


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL or parquet file, a few at a time. Raises UserError for a file that cannot be read."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    return _lines(path) if path.suffix == ".jsonl" else _table_rows(path)


def _lines(path: Path) -> Iterator[Row]:
    size, read = max(path.stat().st_size, 1), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            if not line.strip():
                continue
            try:
                yield Row(number, json.loads(line, parse_constant=_refuse_constant), "", read / size)
            except (ValueError, RecursionError) as error:
                what = str(error) if isinstance(error, _Constant) else "it is not valid JSON"
                yield Row(number, None, what, read / size)


class _Constant(ValueError):
    pass


def _refuse_constant(name: str) -> None:
    raise _Constant(f"it holds {name}, which is no number")


def _table_rows(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
        total, number = file.metadata.num_rows, 0
        for batch in file.iter_batches(_BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield Row(number, record, "", number / total)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def decode(record: Any, catalogue: Catalogue) -> Request:
    """The request that a record says. Raises UserError, one clause without the row, for one that says none."""
    record = _fields(record, _KEYS, "the request")
    if ("history" in record) == ("append" in record):
        raise UserError("the request must have either 'history' or 'append'")
    for key in ("time", "candidates"):
        if key not in record:
            raise UserError(f"the request has no {key!r}")
    candidates = np.array([catalogue.item(key) for key in _list(record, "candidates")], np.int32)
    append = "append" in record
    return Request(
        item=candidates,
        features=catalogue.item_features(candidates),
        time=_time(record["time"], catalogue, "the request's time"),
        context=_context(record.get("context", {}), catalogue),
        events=_events(_list(record, "append" if append else "history"), catalogue),
        append=append,
        user=_key(record["user"], "user") if "user" in record else None,
    )


def _key(value: Any, what: str) -> str:
    """An original id as text; 7 equals "7"."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{what} {repr(value)} is neither a whole number nor a text")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {repr(value)} is no valid text") from None
    return str(value)


def _fields(record: Any, known: tuple[str, ...], whose: str) -> dict[str, Any]:
    """The fields of an object that hold something; a parquet row has every column, if only as null."""
    if not isinstance(record, Mapping):
        raise UserError(f"{whose} is not an object with keys")
    for key in record:
        if key not in known:
            raise UserError(f"{whose} has an unknown key {repr(key)} (known: {', '.join(known)})")
    return {key: value for key, value in record.items() if value is not None}


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise UserError(f"{key!r} is not a list")
    return record[key]


def _time(value: Any, catalogue: Catalogue, whose: str) -> int:
    """Dataset seconds of a time in Unix seconds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{whose} is {repr(value)}, not a whole number of Unix seconds")
    if not 0 <= value - catalogue.origin <= _LAST_SECOND:
        low, high = catalogue.origin, catalogue.origin + _LAST_SECOND
        raise UserError(
            f"{whose} is {value}, outside {low} (the dataset's first event) to {high}: Unix seconds are meant"
        )
    return value - catalogue.origin


def _context(record: Any, catalogue: Catalogue) -> dict[str, np.ndarray]:
    features = catalogue.schema.context_features
    given = _fields(record, tuple(f.name for f in features), "the context")
    return {f.name: catalogue.context(f, given.get(f.name)) for f in features}


def _events(records: list[Any], catalogue: Catalogue) -> Events:
    n, tasks = len(records), catalogue.schema.tasks
    item, time = np.zeros(n, np.int32), np.zeros(n, np.int32)
    labels, request = np.zeros((n, len(tasks)), np.uint8), np.zeros(n, np.int64)
    for i, record in enumerate(records):
        event = f"event {i + 1}"
        given = _fields(record, _EVENT_KEYS, event)
        for key in ("item", "time", "labels"):
            if key not in given:
                raise UserError(f"{event} has no {key!r}")
        try:
            item[i] = catalogue.item(given["item"])
        except UserError as error:
            raise UserError(f"{event}: {error}") from None
        time[i] = _time(given["time"], catalogue, f"{event}: its time")
        labels[i] = _labels(given["labels"], tasks, event)
        request[i] = _request_number(given.get("request"), event)
    if (np.diff(time) < 0).any():
        back = int(np.argmax(np.diff(time) < 0)) + 2
        raise UserError(f"event {back} is earlier than the one before it; events go from old to new")
    return Events(item, time, labels, request, catalogue.item_features(item))


def _labels(record: Any, tasks: tuple[str, ...], event: str) -> list[int]:
    given = _fields(record, tasks, f"{event}: its labels")
    for task in tasks:
        if task not in given:
            raise UserError(f"{event} has no label {task!r}; the tasks are {', '.join(tasks)}")
        if given[task] not in (0, 1):
            raise UserError(f"{event}: label {task!r} is {repr(given[task])}, neither 0 nor 1")
    return [int(given[task]) for task in tasks]


def _request_number(key: Any, event: str) -> int:
    """A number for a request id: the same in every process, so that a restart changes nothing."""
    if key is None:
        return ALONE
    digest = hashlib.blake2b(_key(key, f"{event}: request").encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
