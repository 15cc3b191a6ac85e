"""Embedding tables. Parameters under a module named ``*_table`` follow the optimiser's rule for embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.data.schema import Feature
from genrec_jax.nn.cost import Cost


class Table(nnx.Module):
    """``vocab`` rows of ``dim`` numbers; row 0 is padding and reads as exact zeros."""

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
        self.rows_table = nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (vocab, dim)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int32 -> [..., dim]; ids of 0 give zeros and receive no gradient."""
        rows = jnp.take(self.rows_table[...], ids, axis=0).astype(self.dtype or jnp.float32)
        return jnp.where((ids > 0)[..., None], rows, 0)

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
