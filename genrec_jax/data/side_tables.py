"""Features of users and items: read from side tables, or from columns of the log that never vary within a key."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec_jax.data.log import FeatureColumn, SideTable
from genrec_jax.data.log_columns import Vocabulary, check_kinds, keys
from genrec_jax.data.log_files import Chunk, open_log
from genrec_jax.errors import UserError


class Categories:
    """One feature's categories with ids from 1 in order of first appearance; 0 is a missing value."""

    def __init__(self, feature: FeatureColumn):
        self.feature = feature
        self.vocabulary = Vocabulary(first=1)

    def encode(self, chunk: Chunk) -> np.ndarray:
        """Category ids [rows] int32, or [rows, width] for a feature with several categories, 0-padded."""
        array = chunk.columns[self.feature.column]
        if self.feature.separator is None:
            return self.vocabulary.encode(array.cast(pa.string()))
        lists = pc.split_pattern(array.cast(pa.string()), self.feature.separator)
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(lists)
        flat = pc.if_else(pc.equal(flat, ""), pa.scalar(None, pa.string()), flat)
        table = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), np.int32)
        table[np.arange(table.shape[1]) < lengths[:, None]] = self.vocabulary.encode(flat)
        return table


class LoadedTable:
    """A side table in memory: its rows' key ids and category ids. text: whether its keys are typed as text.

    Reading an item table fills and seals the item vocabulary. A user table has keys of its own until
    :meth:`features` joins it with the users of the log.
    """

    def __init__(self, table: SideTable, items: Vocabulary):
        self.spec = table
        self.vocabulary = items if table.level == "item" else Vocabulary(first=0)
        self.categories = [Categories(feature) for feature in table.features]
        roles = {feature.column: f"feature {feature.name}" for feature in reversed(table.features)}
        roles[table.key] = "key"
        file = open_log(table.file, roles)
        check_kinds(file, roles)
        self.text = file.kinds[table.key] == "text"
        blocks = [self._read(chunk) for chunk in file.chunks()]
        if not blocks:
            raise UserError(f"{table.file} has no rows")
        self.vocabulary.sealed = True
        self.columns = [_stack(column) for column in zip(*blocks)]

    def _read(self, chunk: Chunk) -> list[np.ndarray]:
        before = len(self.vocabulary)
        ids = keys(chunk, self.spec.key, "key", self.vocabulary)
        expected = np.arange(self.vocabulary.first + before, self.vocabulary.first + before + chunk.rows)
        repeated = np.flatnonzero(ids != expected)
        if len(repeated):
            row = int(repeated[0])
            value = chunk.columns[self.spec.key][row].as_py()
            raise UserError(f"{chunk.where(row)}: key {value!r} is already in the table")
        return [categories.encode(chunk) for categories in self.categories]

    def features(self, keys: Sequence[str]) -> list[np.ndarray]:
        """The features' rows [keys] or [keys, width] int32 of some keys, 0 where the side table has no row."""
        rows = np.array([self.vocabulary.ids.get(key, -1) for key in keys], np.int64)
        known = rows >= 0
        tables = []
        for column in self.columns:
            table = np.zeros((len(rows), *column.shape[1:]), np.int32)
            table[known] = column[rows[known] - self.vocabulary.first]
            tables.append(table)
        return tables


def _stack(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks joined along rows; widths differ from block to block if a feature has several categories."""
    if blocks[0].ndim == 1:
        return np.concatenate(blocks)
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(block, ((0, 0), (0, width - block.shape[1]))) for block in blocks])


def constant_per_key(ids: np.ndarray, categories: np.ndarray, size: int) -> tuple[np.ndarray, int | None]:
    """Folds an event column into a table [size] int32 by key id [E].

    Also returns the first event whose category differs from that of its key's first event, or None.
    """
    table = np.zeros(size, np.int32)
    table[ids[::-1]] = categories[::-1]  # reversed: the first event of a key is written last
    bad = np.flatnonzero(table[ids] != categories)
    return table, int(bad[0]) if len(bad) else None
