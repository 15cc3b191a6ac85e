"""Second stage of an import: items and categories of all segments are numbered in order of first appearance."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec_jax.data.log import LogMapping
from genrec_jax.data.log_columns import Vocabulary
from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.segments import varies, where
from genrec_jax.data.work import Advance
from genrec_jax.errors import UserError


def number_keys(
    pieces: Pieces, mapping: LogMapping, segments: Sequence[dict[str, Any]], catalogue: Vocabulary, *, advance: Advance
) -> tuple[dict[str, Any], list[Extent]]:
    """Saves for every segment the dataset's numbers of its items (``NAME.item.map``) and categories.

    Also saved are all keys, how many events each item has, and the features of items that are columns of the log.
    ``catalogue``: the items of a side table, which are then all that may be; else empty. Raises UserError naming a row
    with an item outside the catalogue or with another feature than the item's rows before.
    """
    items = copy.deepcopy(catalogue)
    categories = {feature.name: Vocabulary(first=1) for _, feature in mapping.features}
    tables = [_ItemTable(feature.name) for level, feature in mapping.features if level == "item"]
    counts, extents = np.zeros(0, np.int64), []
    for segment in segments:
        name = segment["name"]
        rows = pieces.read(f"{name}.item-rows", np.int64)
        keys = pieces.keys(f"{name}.items")
        ids = items.encode(keys)
        if (ids < 0).any():
            unknown = int(np.argmin(np.where(ids < 0, rows, np.iinfo(np.int64).max)))
            key = keys[unknown].as_py()
            said = key if segment["whole_items"] else repr(key)
            raise UserError(f"{where(segment, int(rows[unknown]))}: item {said} is not in the item table")
        counts = _longer(counts, items.first + len(items), 0)
        counts[ids] += pieces.read(f"{name}.item-counts", np.int64)
        extents.append(pieces.save(f"{name}.item.map", ids))
        maps = {}
        for feature, vocabulary in categories.items():
            codes = vocabulary.encode(pieces.keys(f"{name}.feature-{feature}"))
            maps[feature] = np.concatenate([np.zeros(1, np.int32), codes])
            extents.append(pieces.save(f"{name}.feature-{feature}.map", maps[feature]))
        for table in tables:
            codes = maps[table.name][pieces.read(f"{name}.item-{table.name}", np.int32)]
            table.add(segment, ids, codes, rows)
        advance(1, 0)
    counts = counts[: items.first + len(items)]
    extents.append(pieces.save("item-counts", counts))
    extents.append(pieces.save_keys("items.keys", list(items.ids)))
    for feature, vocabulary in categories.items():
        extents.append(pieces.save_keys(f"feature-{feature}.keys", list(vocabulary.ids)))
    for table in tables:
        if table.bad is not None:
            raise UserError(f"{table.bad}: {varies('item', table.name)}")
        codes = _longer(table.codes, len(counts), 0)[: len(counts)]
        extents.append(pieces.save(f"items.feature-{table.name}", np.maximum(codes, 0)))
    sizes = {feature: len(vocabulary) for feature, vocabulary in categories.items()}
    return {"events": 0, "categories": sizes}, extents


class _ItemTable:
    """A feature of items that is a column of the log. codes: by item, -1 for none yet; bad: the first row at fault."""

    def __init__(self, name: str):
        self.name = name
        self.codes = np.zeros(0, np.int32)
        self.bad: str | None = None

    def add(self, segment: dict[str, Any], ids: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> None:
        """A segment's items, the category of each in its first row there, and that row."""
        self.codes = _longer(self.codes, int(ids.max()) + 1, -1)
        known = self.codes[ids]
        faults = rows[(known >= 0) & (known != codes)].tolist()
        if segment["varying"][self.name] is not None:
            faults.append(segment["varying"][self.name])
        if faults and self.bad is None:
            self.bad = where(segment, min(faults))
        self.codes[ids] = np.where(known < 0, codes, known)


def _longer(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """``values`` made ``size`` long at least, in steps that double."""
    if size <= len(values):
        return values
    longer = np.full(max(size, 2 * len(values)), fill, values.dtype)
    longer[: len(values)] = values
    return longer
