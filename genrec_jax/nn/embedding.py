"""Embedding tables. Parameters under a module named ``*_table`` follow the optimiser's rule for embeddings."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.data.schema import Feature
from genrec_jax.nn.cost import Cost

# Of each table (by its identity) the ids that are asked for while they are recorded; None while they are not.
_recorded: ContextVar[dict[int, list[jax.Array]] | None] = ContextVar("recorded", default=None)


_BLOCK = 2**18  # rows drawn at a time


def _initial(key: jax.Array, vocab: int, dim: int, scale: float) -> jax.Array:
    """Normal of deviation ``scale``, cut at two of them: [vocab, dim]. A large table is drawn in place, block by block:
    what a draw needs beside its result is several times as large."""
    if vocab <= _BLOCK:
        return scale * jax.random.truncated_normal(key, -2.0, 2.0, (vocab, dim))

    def block(n: jax.Array, table: jax.Array) -> jax.Array:
        drawn = scale * jax.random.truncated_normal(jax.random.fold_in(key, n), -2.0, 2.0, (_BLOCK, dim))
        return jax.lax.dynamic_update_slice(table, drawn, (jnp.minimum(n * _BLOCK, vocab - _BLOCK), 0))

    return jax.lax.fori_loop(0, -(-vocab // _BLOCK), block, jnp.zeros((vocab, dim)))


class Held(nnx.Variable):
    """Which rows a table holds that holds a few alone: their ids [U] int32, ascending, each once."""


class Table(nnx.Module):
    """``vocab`` rows of ``dim`` numbers; row 0 is padding and reads as exact zeros.

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
        self.rows_table = nnx.Param(_initial(rngs.params(), vocab, dim, scale))
        self.held: Held | None = nnx.data(None)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int32 -> [..., dim]; ids of 0 give zeros and receive no gradient."""
        rows = jnp.take(self.rows_table[...], self.places(ids), axis=0).astype(self.dtype or jnp.float32)
        return jnp.where((ids > 0)[..., None], rows, 0)

    def places(self, ids: jax.Array) -> jax.Array:
        """Where the rows of ``ids`` are in :meth:`rows`."""
        record = _recorded.get()
        if record is not None:
            record.setdefault(id(self), []).append(ids)
            return jnp.zeros_like(ids)
        return ids if self.held is None else jnp.searchsorted(self.held[...], ids).astype(jnp.int32)

    def rows(self) -> jax.Array:
        """The rows that the table holds [U, dim], in at least float32, padding zero."""
        rows = self.rows_table[...]
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        return jnp.where((self.ids() > 0)[:, None], wide, 0)

    def ids(self) -> jax.Array:
        """Whose rows they are [U]: all of them, unless the table holds a few."""
        return jnp.arange(self.rows_table.shape[0], dtype=jnp.int32) if self.held is None else self.held[...]

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
