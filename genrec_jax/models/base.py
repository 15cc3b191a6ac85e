"""What training and evaluation ask of an architecture."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.data.schema import Schema
from genrec_jax.nn.cost import Cost
from genrec_jax.nn.hashing import Hashing, Kind
from genrec_jax.retrieval_loss import Popularity

# How a training row is cut from the log: "requests" = one request's candidates with the history before it; "prefixes" =
# the same, with the actions of the history supervised too; "windows" = disjoint windows of consecutive events, each
# supervised once; "users" = one row per user, the next item as target.
Rows = Literal["requests", "prefixes", "windows", "users"]
Goal = Literal["ranking", "retrieval"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of every architecture's configuration; ``name`` is its registry name.

    item_rows: rows that the items share, fewer than there are items; 0 for a row per item. item_hashing: how they do
    (:class:`genrec_jax.nn.hashing.Hashing`).
    """

    name: ClassVar[str]
    goal: ClassVar[Goal] = "ranking"
    item_rows: int = 0
    item_hashing: Kind = "quotient_remainder"

    @property
    def rows(self) -> Rows:
        """How training rows are cut: fixed here, a key of the configuration where an architecture has a choice."""
        return "requests"

    @property
    def hashing(self) -> Hashing | None:
        """How items share rows, if they do."""
        return Hashing(self.item_hashing, self.item_rows) if self.item_rows else None

    @property
    def base(self) -> "ModelConfig | None":
        """The model by which this one is parametrised (:mod:`genrec_jax.models.mup`); None: by the standard."""
        return None

    @property
    def branch(self) -> float:
        """Factor of what a block adds to its input."""
        return 1.0

    def check(self) -> None:
        """Raises UserError naming the ``model.`` key if the sizes are impossible."""


@dataclasses.dataclass(frozen=True)
class Build:
    """What the data decides: the schema, the static row shape and the compute type (float32 or bfloat16).

    popularity: of the items as training targets; None where nothing is trained.
    """

    schema: Schema
    shape: Shape
    dtype: jnp.dtype
    popularity: Popularity | None = None


class Ranker(nnx.Module):
    """Scores candidates. Rows, history and candidates have the shapes of :mod:`genrec_jax.batch`."""

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits [B, C, A] float32 of every candidate and task, dropout off."""
        raise NotImplementedError

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """(sum over supervised targets of the mean-over-tasks loss, number of supervised targets), dropout on."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        """Cost of one forward pass over one row of the given shape, parameters included."""
        raise NotImplementedError


class Retriever(nnx.Module):
    """Embeds users and items in one space; the score of an item is the dot product."""

    def users(self, batch: Batch) -> jax.Array:
        """[B, S, D] float32: each segment's state after its last history event."""
        raise NotImplementedError

    def items(self) -> jax.Array:
        """[items, D] float32: every item's output embedding (row 0 is padding)."""
        raise NotImplementedError

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """(sum of next-item losses, number of supervised positions)."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        """Cost of one forward pass over one row, loss included."""
        raise NotImplementedError
