"""Embedding tables. Parameters under a module named ``*_table`` follow the optimiser's rule for embeddings."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genrec_jax.data.schema import Feature
from genrec_jax.nn.cost import Cost

# Of each table (by its identity) the ids that are asked for while they are recorded; None while they are not.
_recorded: ContextVar[dict[int, list[jax.Array]] | None] = ContextVar("recorded", default=None)


# A table of as many rows is large: devices divide its rows among them (genrec_jax/distributed/tables.py). A smaller one
# takes a few MiB, and to hold it whole costs less than to exchange its rows.
LARGE = 2**14
# Rows of a large table are a multiple of this, so that any such power of two divides them, and so are its ids dealt
# out: datasets number items by first appearance, popular ones early, and a block of neighbours would hold them all.
SPREAD = 4096
_BLOCK = 2**18  # rows drawn at a time


def table_rows(vocab: int) -> int:
    """Rows that hold ``vocab`` ids: as many, but for a large table's, which are a multiple of `SPREAD`."""
    return vocab if vocab < LARGE else -(-vocab // SPREAD) * SPREAD


def place_of(ids: jax.Array, vocab: int) -> jax.Array:
    """Which rows of a table are those of the ids: of a large one ids in succession lie far apart, 0 first."""
    return ids if vocab < LARGE else ids % SPREAD * (table_rows(vocab) // SPREAD) + ids // SPREAD


def id_of(places: jax.Array, vocab: int) -> jax.Array:
    """The ids of rows of a table; those that fill it up have ids from ``vocab`` on."""
    apart = table_rows(vocab) // SPREAD
    return places if vocab < LARGE else places % apart * SPREAD + places // apart


def by_id[Array: (jax.Array, np.ndarray)](table: Array, vocab: int) -> Array:
    """The rows [vocab, dim] in the order of ids."""
    if vocab < LARGE:
        return table
    rows = table.shape[0]
    return table.reshape(SPREAD, rows // SPREAD, -1).swapaxes(0, 1).reshape(rows, -1)[:vocab]


def from_ids(rows: np.ndarray) -> np.ndarray:
    """The table of rows [vocab, dim] in the order of ids; what fills it up is zero."""
    vocab, width = rows.shape
    if vocab < LARGE:
        return rows
    full = np.pad(rows, ((0, table_rows(vocab) - vocab), (0, 0)))
    return full.reshape(-1, SPREAD, width).swapaxes(0, 1).reshape(-1, width)


def _initial(key: jax.Array, rows: int, dim: int, scale: float) -> jax.Array:
    """Normal of deviation ``scale``, cut at two of them: [rows, dim]. A large table is drawn in place, some of each of
    `SPREAD` equal parts at a time: what a draw needs beside its result is several times as large, and of devices that
    divide the rows among them each draws its own."""
    if rows <= _BLOCK:
        return scale * jax.random.truncated_normal(key, -2.0, 2.0, (rows, dim))
    part, at_once = rows // SPREAD, _BLOCK // SPREAD

    def block(n: jax.Array, table: jax.Array) -> jax.Array:
        drawn = scale * jax.random.truncated_normal(jax.random.fold_in(key, n), -2.0, 2.0, (SPREAD, at_once, dim))
        return jax.lax.dynamic_update_slice(table, drawn, (0, jnp.minimum(n * at_once, part - at_once), 0))

    drawn = jax.lax.fori_loop(0, -(-part // at_once), block, jnp.zeros((SPREAD, part, dim)))
    return drawn.reshape(rows, dim)


class Held(nnx.Variable):
    """Which rows a table holds that holds a few alone: their places [U] in the whole one, int32, ascending, each
    once."""


class Table(nnx.Module):
    """Rows of ``dim`` numbers for ``vocab`` ids; id 0 is padding and reads as exact zeros.

    A large table has rows that no id has, up to a multiple of `SPREAD`, and they do not lie in the order of ids.

    A training step may put a few rows in place of all of them (``held`` says which) so that its gradient is as small;
    :func:`recorded` says which it needs. Whoever reads ``rows()`` must then ask ``places`` where those of its ids are.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        std: float | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.vocab = vocab
        self.dim = dim
        self.dtype = dtype
        scale = dim**-0.5 if std is None else std
        self.rows_table = nnx.Param(_initial(rngs.params(), table_rows(vocab), dim, scale))
        self.held: Held | None = nnx.data(None)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int32 -> [..., dim]; ids of 0 give zeros and receive no gradient."""
        rows = jnp.take(self.rows_table[...], self._at(ids), axis=0).astype(self.dtype or jnp.float32)
        return jnp.where((ids > 0)[..., None], rows, 0)

    def places(self, ids: jax.Array) -> jax.Array:
        """Where the rows of ``ids`` are in :meth:`rows`."""
        return ids if self.held is None and _recorded.get() is None else self._at(ids)

    def _at(self, ids: jax.Array) -> jax.Array:
        """Where the rows of ``ids`` are in the rows that are held."""
        record, places = _recorded.get(), place_of(ids, self.vocab)
        if record is not None:
            record.setdefault(id(self), []).append(places)
            return jnp.zeros_like(ids)
        return places if self.held is None else jnp.searchsorted(self.held[...], places).astype(jnp.int32)

    def rows(self) -> jax.Array:
        """The rows of :meth:`ids` [U, dim], in at least float32, padding zero."""
        rows = self.rows_table[...] if self.held is not None else by_id(self.rows_table[...], self.vocab)
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        return jnp.where((self.ids() > 0)[:, None], wide, 0)

    def ids(self) -> jax.Array:
        """Whose rows they are [U]: of all in turn, unless the table holds a few."""
        return jnp.arange(self.vocab, dtype=jnp.int32) if self.held is None else id_of(self.held[...], self.vocab)

    def pooled(self, ids: jax.Array) -> jax.Array:
        """ids [..., width] -> mean over the non-zero ids [..., dim]; zeros if there are none."""
        count = jnp.sum(ids > 0, axis=-1, keepdims=True)
        return jnp.sum(self(ids), axis=-2) / jnp.maximum(count, 1).astype(self.dtype or jnp.float32)

    def cost(self, reads: int) -> Cost:
        """``reads``: rows looked up per row of a batch."""
        item = jnp.dtype(self.dtype or jnp.float32).itemsize
        return Cost(
            embedding_params=self.vocab * self.dim,
            embedding_reads=reads * self.dim,
            activation_bytes=float(reads * self.dim * item),
        )


class FeatureTables(nnx.Module):
    """One table per side feature; a multi-valued feature is the mean of its ids' rows."""

    def __init__(self, features: tuple[Feature, ...], dim: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
        self.features = features
        self.tables = nnx.Dict({f.name: Table(f.vocab, dim, dtype=dtype, rngs=rngs) for f in features})

    def __call__(self, ids: dict[str, jax.Array]) -> list[jax.Array]:
        """``ids[name]`` [...] (or [..., width]) -> one [..., dim] array per feature, in schema order."""
        return [
            self.tables[f.name].pooled(ids[f.name]) if f.width > 1 else self.tables[f.name](ids[f.name])
            for f in self.features
        ]

    def cost(self, rows: int) -> Cost:
        """``rows``: number of entities (tokens, candidates) whose features are looked up."""
        return sum((self.tables[f.name].cost(rows * f.width) for f in self.features), Cost())


def tables(model: nnx.Module) -> dict[tuple, Table]:
    """The embedding tables of a model by their place in it."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Table)}


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, list[jax.Array]]]:
    """Collects what tables are asked for: the ids of each call by the table's ``id()``; what they answer is void.

    Only for calls outside of loops and branches that jax traces on their own.
    """
    seen: dict[int, list[jax.Array]] = {}
    token = _recorded.set(seen)
    try:
        yield seen
    finally:
        _recorded.reset(token)
