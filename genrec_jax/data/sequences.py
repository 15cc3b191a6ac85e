"""Sequences: a log sorted once by (user, time, file order), kept as memory-mapped columns in a dataset folder.

A dataset folder holds ``dataset.json`` (schema, counts, provenance), ``offsets.npy`` [U+1], one file per event
column under ``events/``, feature tables under ``users/`` and ``items/``, and the original keys under ``keys/``.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genrec_jax.data.schema import Level, Schema
from genrec_jax.errors import UserError

FORMAT = 2
SCAN_EVENTS = 1 << 20
_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Events of U users, user after user, each user's in time order (memory-mapped arrays).

    offsets [U+1] int64: user u owns events ``offsets[u]:offsets[u+1]``; item [E] int32 in ``1..items-1``; time [E]
    int32 seconds since ``origin`` (Unix seconds); labels [E, A] uint8 in {0, 1}; request [E] int32 or None: events of
    one user with equal request ids were shown together. ``features[name]`` is [U], [items] or [E] by the feature's
    level, with a trailing width axis if the feature is multi-valued. digest: see :func:`digest_of`.
    """

    name: str
    digest: str
    schema: Schema
    origin: int
    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    labels: np.ndarray
    request: np.ndarray | None
    features: Mapping[str, np.ndarray]
    path: Path

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def events(self) -> int:
        return len(self.item)

    def scan(self, *names: str) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """:func:`scan` of event columns: ``item``, ``time``, ``labels`` or ``request``."""
        return scan(*(getattr(self, name) for name in names))


def scan(*columns: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Columns of equal length from first to last row, ``SCAN_EVENTS`` rows at a time.

    Yields the number of the first row and the columns from there on. Memory stays small however long mapped columns
    are: pages that were read do not stay resident.
    """
    for first in range(0, len(columns[0]), SCAN_EVENTS):
        yield first, tuple(np.asarray(column[first : first + SCAN_EVENTS]) for column in columns)
        for column in columns:
            if isinstance(column.base, mmap.mmap):
                column.base.madvise(mmap.MADV_DONTNEED)


FOLDERS: Mapping[Level, str] = {"user": "users", "item": "items", "event": "events"}


def load(path: str | Path) -> Sequences:
    """Opens a dataset folder. Raises UserError if it is not one, or if its files do not fit together."""
    path = Path(path)
    record = _manifest(path)
    schema = _schema(record, path)

    def column(name: str) -> np.ndarray:
        file = path / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    sequences = Sequences(
        name=record["name"],
        digest=record["digest"],
        schema=schema,
        origin=record["origin"],
        offsets=np.asarray(column("offsets")),
        item=column("events/item"),
        time=column("events/time"),
        labels=column("events/labels"),
        request=column("events/request") if record["has_requests"] else None,
        features={f.name: column(f"{FOLDERS[f.level]}/{f.name}") for f in schema.features},
        path=path,
    )
    _check(sequences)
    return sequences


def digest_of(path: str | Path) -> str:
    """Twelve hex digits of a dataset folder's content, read from ``dataset.json`` alone.

    Equal digits mean equal arrays under the same schema, wherever the folder lies and whatever its name. Original keys
    and a synthetic world's truth do not count: nothing is trained or evaluated on them. Raises UserError as ``load``.
    """
    return _manifest(Path(path))["digest"]


def verify(path: str | Path) -> None:
    """Reads all of a dataset folder. Raises UserError as ``load``, or if its content is not what was written."""
    data = load(path)
    if (found := _digest(data.path, data.schema, data.origin)) != data.digest:
        raise UserError(f"{path} is damaged: the digest of its content is {found}, but {data.digest} when it was made")


_KEYS: Mapping[str, type] = {
    "name": str,
    "digest": str,
    "schema": dict,
    "origin": int,
    "has_requests": bool,
}


def _manifest(path: Path) -> dict[str, Any]:
    """The content of ``dataset.json``, every key of it there and of its type."""
    file = path / "dataset.json"
    if not file.is_file():
        raise UserError(f"{path} is not a dataset folder: it has no dataset.json (make one with `genrec data import`)")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} does not describe a dataset")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {record.get('format')!r}; this version reads format {FORMAT}: make the dataset again"
        )
    for key, kind in _KEYS.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"{file} is damaged: key {key!r} is missing or not of type {kind.__name__}")
    return record


def _schema(record: Mapping[str, Any], path: Path) -> Schema:
    try:
        schema = Schema.from_json(record["schema"])
        valid = isinstance(schema.items, int) and all(f.level in FOLDERS for f in schema.features)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path / 'dataset.json'} is damaged: its schema is incomplete")
    return schema


def _check(sequences: Sequences) -> None:
    """Refuses columns that do not fit together: a wrong gather would train on other users' events without a word."""
    path, events, schema = sequences.path, sequences.events, sequences.schema
    offsets = sequences.offsets
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise UserError(f"{path} is damaged: its offsets do not ascend from 0")
    columns = {"time": sequences.time, "labels": sequences.labels, "request": sequences.request}
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if int(offsets[-1]) != events or any(length != events for length in lengths.values()):
        raise UserError(f"{path} is damaged: its event columns differ in length")
    if sequences.labels.shape != (events, len(schema.tasks)):
        raise UserError(f"{path} is damaged: its labels do not have one column for each of {len(schema.tasks)} tasks")
    sizes = {"user": sequences.users, "item": schema.items, "event": events}
    for feature in schema.features:
        if len(sequences.features[feature.name]) != sizes[feature.level]:
            raise UserError(f"{path} is damaged: feature {feature.name!r} does not have one row per {feature.level}")
    if any(item.min() < 1 or item.max() >= schema.items for _, (item,) in sequences.scan("item")):
        raise UserError(f"{path} is damaged: it has item ids outside 1 to {schema.items - 1}")


@contextlib.contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """A scratch folder beside ``out`` that becomes ``out`` in one rename, or vanishes if anything fails.

    A dataset that is there already is deleted last, so a complete one, old or new, is always on disk; a kill between
    the two renames leaves the old one beside ``out`` as a hidden folder that ends in ``.old``.
    """
    out = claimed(out)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
        os.chmod(scratch, 0o755)
        replace(out, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def claimed(out: str | Path) -> Path:
    """Where a dataset named ``out`` is to be written. Raises UserError if something else is there."""
    out = Path(out)
    if out.exists() and not (out / "dataset.json").is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out} exists and is not a dataset folder; nothing was written")
    out = out.resolve()  # a link stays, and what it points to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def replace(out: Path, scratch: Path) -> None:
    """Renames ``scratch`` to ``out``. A folder with content cannot be renamed over, so the old one steps aside."""
    if not out.exists():
        os.rename(scratch, out)
        return
    aside = scratch.with_name(f"{scratch.name}.old")
    os.rename(out, aside)
    try:
        os.rename(scratch, out)
    except BaseException:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: Path, *, name: str, schema: Schema, origin: int, has_requests: bool, source: dict) -> None:
    """Writes ``dataset.json``; ``source`` is free provenance (files, mapping, counts).

    Call it once every column is complete: it hashes them.
    """
    record = {
        "format": FORMAT,
        "name": name,
        "digest": _digest(folder, schema, origin),
        "schema": schema.to_json(),
        "origin": origin,
        "has_requests": has_requests,
        "source": source,
    }
    (folder / "dataset.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _digest(folder: Path, schema: Schema, origin: int) -> str:
    """See :func:`digest_of`. The schema counts: the same bytes under another task's name are another dataset."""
    said = json.dumps([schema.to_json(), origin], sort_keys=True)
    digest = hashlib.sha256(said.encode())
    names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.npy")}
    for name in sorted(names):
        if name.startswith(("keys/", "truth/")):
            continue
        # With its size a name cannot be taken for the end of the bytes before it.
        digest.update(f"\n{name} {names[name].stat().st_size}\n".encode())
        with names[name].open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def save(
    out: str | Path,
    *,
    name: str,
    schema: Schema,
    origin: int,
    offsets: np.ndarray,
    item: np.ndarray,
    time: np.ndarray,
    labels: np.ndarray,
    request: np.ndarray | None = None,
    features: Mapping[str, np.ndarray] | None = None,
    source: dict | None = None,
) -> Sequences:
    """Writes in-memory columns (shapes as in :class:`Sequences`) as a dataset folder and opens it."""
    with writing(out) as folder:
        for sub in ("events", "users", "items"):
            (folder / sub).mkdir()
        np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
        np.save(folder / "events/item.npy", np.asarray(item, np.int32))
        np.save(folder / "events/time.npy", np.asarray(time, np.int32))
        np.save(folder / "events/labels.npy", np.asarray(labels, np.uint8))
        if request is not None:
            np.save(folder / "events/request.npy", np.asarray(request, np.int32))
        for feature in schema.features:
            table = np.asarray((features or {})[feature.name], np.int32)
            np.save(folder / FOLDERS[feature.level] / f"{feature.name}.npy", table)
        write_manifest(
            folder,
            name=name,
            schema=schema,
            origin=origin,
            has_requests=request is not None,
            source=source or {},
        )
    return load(out)
