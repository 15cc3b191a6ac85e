"""What a dataset knows of ids: original keys to dense ids, and the features of its items."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr  # a message stays a line, however long the value
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """origin: Unix seconds of dataset time 0. features: each item feature's ids by item, [items] or [items, width].

    items, categories[name]: id of each original key, written as text; None, or absent, in a dataset that was not
    imported (a synthetic world): its dense ids are the keys.
    """

    schema: Schema
    origin: int
    features: Mapping[str, np.ndarray]
    items: Mapping[str, int] | None
    categories: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, sequences: Sequences) -> "Catalogue":
        """Of a dataset folder. Raises UserError if its keys cannot be read."""
        keys, schema = sequences.path / "keys", sequences.schema
        named = {f.name: keys / "features" / f"{f.name}.parquet" for f in schema.context_features}
        return cls(
            schema=schema,
            origin=sequences.origin,
            features={f.name: sequences.features[f.name] for f in schema.item_features},
            items=_ids(keys / "items.parquet") if (keys / "items.parquet").is_file() else None,
            categories={name: _ids(path) for name, path in named.items() if path.is_file()},
        )

    def item(self, key: Any) -> int:
        """Dense id of an item. Raises UserError for an unknown one."""
        if not isinstance(key, int | str) or isinstance(key, bool):
            raise UserError(f"item {repr(key)} is neither a whole number nor a text")
        if self.items is None:
            found = key if isinstance(key, int) and 0 < key < self.schema.items else None
        else:
            found = self.items.get(str(key))
        if found is None:
            raise UserError(f"item {repr(key)} is not in the catalogue the model was trained on")
        return found

    def item_features(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Features of items [n], as a Batch holds them."""
        return {name: np.asarray(table[items], np.int32) for name, table in self.features.items()}

    def context(self, feature: Feature, value: Any) -> np.ndarray:
        """Ids, () or [width] int32, of a request's category or list of categories; of None the unknown one's, 0."""
        several = value if isinstance(value, list) else [value]
        if isinstance(value, list) and feature.width == 1:
            raise UserError(f"context feature {feature.name!r} holds one category, not a list")
        if len(several) > feature.width:
            raise UserError(f"context feature {feature.name!r} holds at most {feature.width} categories")
        ids = np.zeros(feature.width, np.int32)
        ids[: len(several)] = [0 if key is None else self._category(feature, key) for key in several]
        return ids if feature.width > 1 else ids[0]

    def _category(self, feature: Feature, key: Any) -> int:
        known = self.categories.get(feature.name)
        if not isinstance(key, int | str):
            raise UserError(f"context feature {feature.name!r} is {repr(key)}, neither a whole number nor a text")
        if known is None:
            found = key if type(key) is int and 0 <= key < feature.vocab else None
        else:
            # As in an imported log, where booleans are categories too.
            found = known.get(str(key).lower() if isinstance(key, bool) else str(key))
        if found is None:
            raise UserError(f"context feature {feature.name!r} has no category {repr(key)} (null: unknown)")
        return found


def _ids(path: Path) -> dict[str, int]:
    try:
        table = pq.read_table(path)
        keys = table.column("key").cast(pa.string()).to_pylist()
        return dict(zip(keys, table.column("id").to_pylist(), strict=True))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
