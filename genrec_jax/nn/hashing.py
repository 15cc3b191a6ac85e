"""Item tables with fewer rows than items: every item is put together from two rows that it shares with others."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.nn.cost import Cost
from genrec_jax.nn.embedding import Table

Kind = Literal["quotient_remainder", "double"]
_FACTORS = (0x9E3779B1, 0xBB67AE85)  # odd, of two hashes: fractions of the golden ratio and of the square root of 3


@dataclasses.dataclass(frozen=True)
class Hashing:
    """How items share ``rows`` rows.

    quotient_remainder: the product of row (id - 1) mod ``rows`` of one table and row (id - 1) div ``rows`` of another,
    a pair that no other item has (Shi et al., KDD 2020). double: the sum of the rows of one table that two hashes
    choose; two items may have both in common (Zhang et al., RecSys 2020).
    """

    kind: Kind
    rows: int


class HashedTable(nnx.Module):
    """In place of a `Table` of ``vocab`` rows of ``dim`` numbers; id 0 is padding and reads as zeros."""

    held = None  # the rows of ids are never at hand alone: those of its own tables may be

    def __init__(
        self,
        hashing: Hashing,
        vocab: int,
        dim: int,
        *,
        std: float | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.hashing, self.vocab, self.dim = hashing, vocab, dim
        std = dim**-0.5 if std is None else std

        def table(rows: int, std: float) -> Table:
            return Table(1 + rows, dim, std=std, dtype=dtype, rngs=rngs)

        if hashing.kind == "double":  # deviations of a sum and of a product are those of a row of its own
            self.tables = nnx.List([table(hashing.rows, std / math.sqrt(2))])
        else:
            rows = (hashing.rows, -(-(vocab - 1) // hashing.rows))
            self.tables = nnx.List([table(count, math.sqrt(std)) for count in rows])

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int32 -> [..., dim]; ids of 0 give zeros and receive no gradient."""
        first, second = self._places(ids)
        if self.hashing.kind == "double":
            (table,) = self.tables
            both = table(jnp.stack([first, second], axis=-1))
            return both[..., 0, :] + both[..., 1, :]
        remainders, quotients = self.tables
        return remainders(first) * quotients(second)

    def _places(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two rows of each id, counted from 1; 0 for padding."""
        rows = self.hashing.rows
        if self.hashing.kind == "double":
            found = [_hashed(ids, factor, rows) for factor in _FACTORS]
        else:
            found = [(ids - 1) % rows, (ids - 1) // rows]
        first, second = (jnp.where(ids > 0, 1 + place, 0).astype(jnp.int32) for place in found)
        return first, second

    def rows(self) -> jax.Array:
        """Every item's vector [vocab, dim], in at least float32, padding zero."""
        vectors = self(self.ids())
        return vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))

    def ids(self) -> jax.Array:
        """Whose vectors :meth:`rows` has: all ids."""
        return jnp.arange(self.vocab, dtype=jnp.int32)

    def places(self, ids: jax.Array) -> jax.Array:
        """Where the vectors of ``ids`` are in :meth:`rows`."""
        return ids

    def cost(self, reads: int) -> Cost:
        """``reads``: items looked up per row of a batch."""
        parts = [table.cost(reads) for table in self.tables]
        combined = Cost(flops=float(reads * self.dim))
        if self.hashing.kind == "double":
            return parts[0] + dataclasses.replace(parts[0], embedding_params=0) + combined
        return parts[0] + parts[1] + combined


def item_table(
    vocab: int,
    dim: int,
    *,
    hashing: Hashing | None,
    std: float | None = None,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
) -> Table | HashedTable:
    """A table of a row per item, or one whose items share fewer rows."""
    if hashing is None:
        return Table(vocab, dim, std=std, dtype=dtype, rngs=rngs)
    return HashedTable(hashing, vocab, dim, std=std, dtype=dtype, rngs=rngs)


def _hashed(ids: jax.Array, factor: int, rows: int) -> jax.Array:
    """Numbers below ``rows``: a product, mixed as in the end of MurmurHash3, so that all bits of an id count."""
    mixed = ids.astype(jnp.uint32) * jnp.uint32(factor)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> 16)) % jnp.uint32(rows)
