"""Tokens of the generative rankers: items, actions and request contexts as vectors of the model's width."""

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Candidates, History
from genrec_jax.data.schema import Schema
from genrec_jax.nn.basic import MLP
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.embedding import FeatureTables, Table
from genrec_jax.nn.hashing import Hashing, item_table


class ItemEncoder(nnx.Module):
    """sqrt(D) * (item row + rows of its side features): one encoding for history events and candidates.

    The factor brings table rows (of norm near one) to entries of order one, as in the public HSTU code.
    """

    def __init__(self, schema: Schema, width: int, *, hashing: Hashing | None = None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.items = item_table(schema.items, width, hashing=hashing, dtype=dtype, rngs=rngs)
        self.features = FeatureTables(schema.item_features, width, dtype=dtype, rngs=rngs)
        self.scale = width**0.5

    def __call__(self, events: History | Candidates) -> jax.Array:
        """[B, E, D] for the E history or candidate slots of each row."""
        return self.scale * sum(self.features(events.features), self.items(events.item))

    def cost(self, rows: int) -> Cost:
        return self.items.cost(rows) + self.features.cost(rows)


class ActionEncoder(nnx.Module):
    """Sum over tasks of a row chosen by the task's label: every combination of labels has its own vector."""

    def __init__(self, tasks: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.actions = Table(1 + 2 * tasks, width, dtype=dtype, rngs=rngs)
        self.tasks = tasks
        self.scale = (width / tasks) ** 0.5

    def __call__(self, labels: jax.Array) -> jax.Array:
        """labels [..., A] in {0, 1} -> [..., D]."""
        ids = 1 + 2 * jnp.arange(self.tasks, dtype=jnp.int32) + labels.astype(jnp.int32)
        return self.scale * jnp.sum(self.actions(ids), axis=-2)

    def cost(self, rows: int) -> Cost:
        return self.actions.cost(rows * self.tasks)


class ContextEncoder(nnx.Module):
    """One token per request: a learned vector plus an MLP of the context features' rows (DirL's MLP_u)."""

    def __init__(self, schema: Schema, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.features = FeatureTables(schema.context_features, width, dtype=dtype, rngs=rngs)
        self.start = nnx.Param(jax.nn.initializers.normal(1.0)(rngs.params(), (width,)))
        inputs = width * len(schema.context_features)
        self.mlp = MLP(inputs, [width, width], dtype=dtype, rngs=rngs) if inputs else None
        self.scale = width**0.5
        self.dtype = dtype

    def __call__(self, features: dict[str, jax.Array], requests: tuple[int, int]) -> jax.Array:
        """features [B, S, ...] of ``requests`` = (B, S) requests -> [B, S, D]."""
        start = jnp.broadcast_to(self.start[...].astype(self.dtype), (*requests, self.start.size))
        if self.mlp is None:
            return start
        return start + self.mlp(self.scale * jnp.concatenate(self.features(features), axis=-1))

    def cost(self, rows: int) -> Cost:
        own = Cost(dense_params=self.start.size)
        return total([own, self.features.cost(rows), *([self.mlp.cost(rows)] if self.mlp else [])])
