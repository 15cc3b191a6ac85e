"""Sequences: a log sorted once by (user, time, file order), kept as memory-mapped columns in a dataset folder.

A dataset folder holds ``dataset.json`` (schema, counts, provenance), ``offsets.npy`` [U+1], one file per event
column under ``events/``, feature tables under ``users/`` and ``items/``, and the original keys under ``keys/``.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from genrec_jax.data.schema import Schema
from genrec_jax.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Events of U users, user after user, each user's in time order (memory-mapped arrays).

    offsets [U+1] int64: user u owns events ``offsets[u]:offsets[u+1]``; item [E] int32 in ``1..items-1``; time [E]
    int32 seconds since ``origin`` (Unix seconds); labels [E, A] uint8 in {0, 1}; request [E] int32 or None: events of
    one user with equal request ids were shown together. ``features[name]`` is [U], [items] or [E] by the feature's
    level, with a trailing width axis if the feature is multi-valued.
    """

    name: str
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


_FOLDER = {"user": "users", "item": "items", "event": "events"}


def load(path: str | Path) -> Sequences:
    """Opens a dataset folder. Raises UserError if it is not one."""
    path = Path(path)
    manifest = path / "dataset.json"
    if not manifest.is_file():
        raise UserError(f"{path} is not a dataset folder: it has no dataset.json (make one with `genrec data import`)")
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{manifest} is not valid JSON: {error}") from None
    if record.get("format") != FORMAT:
        raise UserError(f"{manifest} has format {record.get('format')!r}; this version reads format {FORMAT}")
    schema = Schema.from_json(record["schema"])

    def column(name: str) -> np.ndarray:
        file = path / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    sequences = Sequences(
        name=record["name"],
        schema=schema,
        origin=record["origin"],
        offsets=np.asarray(column("offsets")),
        item=column("events/item"),
        time=column("events/time"),
        labels=column("events/labels"),
        request=column("events/request") if record["has_requests"] else None,
        features={f.name: column(f"{_FOLDER[f.level]}/{f.name}") for f in schema.features},
        path=path,
    )
    if len(sequences.time) != sequences.events or sequences.offsets[-1] != sequences.events:
        raise UserError(f"{path} is damaged: its event columns differ in length")
    return sequences


@contextlib.contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """A scratch folder beside ``out`` that becomes ``out`` in one rename, or vanishes if anything fails."""
    out = Path(out)
    if out.exists() and not (out / "dataset.json").is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out} exists and is not a dataset folder; nothing was written")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
        if out.exists():
            shutil.rmtree(out)
        os.chmod(scratch, 0o755)
        os.rename(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_manifest(folder: Path, *, name: str, schema: Schema, origin: int, has_requests: bool, source: dict) -> None:
    """Writes ``dataset.json``; ``source`` is free provenance (files, mapping, counts)."""
    record = {
        "format": FORMAT,
        "name": name,
        "schema": schema.to_json(),
        "origin": origin,
        "has_requests": has_requests,
        "source": source,
    }
    (folder / "dataset.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
            np.save(folder / _FOLDER[feature.level] / f"{feature.name}.npy", table)
        write_manifest(
            folder,
            name=name,
            schema=schema,
            origin=origin,
            has_requests=request is not None,
            source=source or {},
        )
    return load(out)
