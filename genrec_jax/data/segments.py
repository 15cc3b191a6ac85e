"""First stage of an import: log files are read in chunks, checked, and kept as segments.

A segment is some hundred thousand consecutive rows of one file. Its keys (users, items, categories) are numbered within
the segment, in order of first appearance, so that files can be read at once and none of it again. Its rows are grouped
by partition, a hash of the user's key, each group in the order of the file.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec_jax.data.log import LogMapping
from genrec_jax.data.log_columns import Vocabulary, hashes, keys, labels, times, whole_numbers
from genrec_jax.data.log_files import Chunk, LogFile, Position
from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.schema import Level
from genrec_jax.data.side_tables import Categories, constant_per_key
from genrec_jax.data.splits import hash64
from genrec_jax.data.work import Advance
from genrec_jax.errors import UserError


def record_type(mapping: LogMapping) -> np.dtype:
    """One row of a segment; ``row`` counts from the segment's first. Features of items are not in it."""
    fields: list[Any] = [("user", "<i4"), ("item", "<i4"), ("row", "<i4"), ("time", "<i8")]
    if mapping.order is not None:
        fields.append(("order", "<i8"))
    if mapping.request is not None:
        fields.append(("request", "<u8"))  # a hash: two requests of a user share it with a chance of 2^-64
    fields.append(("labels", "u1", (len(mapping.labels),)))
    fields += [(f"feature {feature.name}", "<i4") for level, feature in mapping.features if level != "item"]
    return np.dtype(fields)


def where(segment: dict[str, Any], row: int) -> str:
    """Names row ``row`` of a segment (its result, see :func:`read_file`)."""
    return f"{segment['path']}, {segment['unit']} {segment['first'] + row}"


def varies(level: Level, feature: str) -> str:
    """What is said of a row with another feature than earlier rows of its user or item."""
    return f"{level} feature {feature!r} differs from the same {level}'s earlier event"


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How a log is cut: into segments of about ``rows``, read ``chunk_rows`` at a time, and ``partitions``."""

    mapping: LogMapping
    partitions: int
    rows: int
    chunk_rows: int


def user_hashes(texts: Sequence[str]) -> np.ndarray:
    """[n] uint64: what decides a user's partition."""
    return hash64(np.fromiter((zlib.crc32(text.encode()) for text in texts), np.uint64, len(texts)))


def read_file(
    pieces: Pieces, plan: ReadPlan, log: LogFile, number: int, *, advance: Advance
) -> tuple[dict[str, Any], list[Extent]]:
    """Reads file ``number`` of a log into segments, after those that an earlier run has read of it.

    Its result names the ``segments``. Raises UserError naming file and row.
    """
    segments: list[dict[str, Any]] = []
    while (found := pieces.recorded(f"segment-{number:06d}-{len(segments):06d}")) is not None:
        segments.append(found)
        advance(found["size"], found["rows"], found=True)

    def finish() -> None:
        name = f"segment-{number:06d}-{len(segments):06d}"
        result, extents = segment.write(pieces, name)
        pieces.record(name, result, extents)
        segments.append(result)

    segment = _Segment(plan, log)
    start = Position(*segments[-1]["end"]) if segments else None
    for chunk in log.chunks(plan.chunk_rows, start):
        segment.add(chunk)
        advance(chunk.size, chunk.rows)
        if segment.rows >= plan.rows:
            finish()
            segment = _Segment(plan, log)
    if segment.rows:
        finish()
    if not segments:
        raise UserError(f"{log.path} has no rows")
    return {"segments": segments, "events": sum(found["rows"] for found in segments)}, []


class _Segment:
    """Rows collected in memory, and the numbers of their keys."""

    def __init__(self, plan: ReadPlan, log: LogFile):
        self._plan = plan
        self._whole_items = log.kinds[plan.mapping.item] == "integer"
        self._users, self._items = Vocabulary(first=0), Vocabulary(first=0)
        self._categories = {feature.name: Categories(feature) for _, feature in plan.mapping.features}
        self._of_items = [feature.name for level, feature in plan.mapping.features if level == "item"]
        self._blocks: list[np.ndarray] = []
        self._item_blocks: dict[str, list[np.ndarray]] = {name: [] for name in self._of_items}
        self._chunks: list[Chunk] = []
        self.rows = self._size = 0

    def add(self, chunk: Chunk) -> None:
        mapping = self._plan.mapping
        block = np.empty(chunk.rows, record_type(mapping))
        block["user"] = keys(chunk, mapping.user, "user", self._users)
        block["item"] = keys(chunk, mapping.item, "item", self._items)
        block["row"] = np.arange(self.rows, self.rows + chunk.rows)
        block["time"] = times(chunk, mapping.time)
        if mapping.order is not None:
            block["order"] = whole_numbers(chunk, mapping.order, "order")
        if mapping.request is not None:
            block["request"] = hashes(chunk, mapping.request, "request")
        for number, label in enumerate(mapping.labels):
            block["labels"][:, number] = labels(chunk, label)
        for name, categories in self._categories.items():
            codes = categories.encode(chunk)
            if name in self._item_blocks:
                self._item_blocks[name].append(codes)
            else:
                block[f"feature {name}"] = codes
        self._blocks.append(block)
        self._chunks.append(dataclasses.replace(chunk, columns={}))
        self.rows += chunk.rows
        self._size += chunk.size

    def write(self, pieces: Pieces, name: str) -> tuple[dict[str, Any], list[Extent]]:
        rows = np.concatenate(self._blocks)
        self._blocks.clear()
        users, partition = self._by_partition()
        rows["user"], owner = np.argsort(users)[rows["user"]], partition[rows["user"]]
        order = np.argsort(owner, kind="stable")
        bounds = np.arange(self._plan.partitions + 1)
        texts = list(self._users.ids)
        item, count = rows["item"], len(self._items)
        extents = [
            pieces.save_keys(f"{name}.users", [texts[user] for user in users]),
            pieces.save_keys(f"{name}.items", list(self._items.ids)),
            pieces.save(f"{name}.item-counts", np.bincount(item, minlength=count)),
            pieces.save(f"{name}.item-rows", constant_per_key(item, rows["row"], count)[0].astype(np.int64)),
        ]
        varying = {}  # by feature of items: the first row that has another one than its item's first row
        for feature, blocks in self._item_blocks.items():
            table, bad = constant_per_key(item, np.concatenate(blocks), count)
            extents.append(pieces.save(f"{name}.item-{feature}", table))
            varying[feature] = bad
        for feature, categories in self._categories.items():
            extents.append(pieces.save_keys(f"{name}.feature-{feature}", list(categories.vocabulary.ids)))
        extents += [
            pieces.save(f"{name}.rows", rows[order]),
            pieces.save(f"{name}.row-starts", np.searchsorted(owner[order], bounds)),
            pieces.save(f"{name}.user-starts", np.searchsorted(partition[users], bounds)),
        ]
        first, last = self._chunks[0], self._chunks[-1]
        result = {
            "name": name,
            "path": str(first.path),
            "unit": first.unit,
            "first": first.first,
            "rows": self.rows,
            "size": self._size,
            "end": list(last.end),
            "varying": varying,
            "whole_items": self._whole_items,
            "events": self.rows,
        }
        return result, extents

    def _by_partition(self) -> tuple[np.ndarray, np.ndarray]:
        """The segment's users, grouped by partition in order of appearance, and each user's partition."""
        partition = (user_hashes(list(self._users.ids)) % np.uint64(self._plan.partitions)).astype(np.int64)
        return np.argsort(partition, kind="stable"), partition
