"""HSTU for retrieval: the next item of a sequence, as in the public research code (Zhai et al., arXiv 2402.17152)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.layouts import ITEMS, NextItem, last_events, next_item
from genrec_jax.models import registry
from genrec_jax.models.base import Build, Retriever, Rows
from genrec_jax.models.sequence import SequenceConfig
from genrec_jax.nn.basic import dropout
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.embedding import Table
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.stack import Stack
from genrec_jax.retrieval_loss import draw_negatives, l2_normalise, sampled_softmax

# The public code reserves 10 output slots and one for the target; they only enter the divisor and the table sizes.
RESERVED = 11


@dataclasses.dataclass(frozen=True)
class HSTURetrievalConfig(SequenceConfig):
    """width, depth, heads, dropout: the published ML-1M base. qk_width, v_width: of one head, 0 for width / heads.
    negatives: R per position, uniform over the items. temperature: of the softmax over cosines."""

    name = "hstu_retrieval"
    rows: ClassVar[Rows] = "users"
    goal = "retrieval"
    width: int = 50
    depth: int = 2
    heads: int = 1
    dropout: float = 0.2
    qk_width: int = 0
    v_width: int = 0
    negatives: int = 128
    temperature: float = 0.05

    def check(self) -> None:
        super().check()
        if self.negatives < 1 or not self.temperature > 0:
            raise UserError("model.negatives and model.temperature must be positive")
        if min(self.qk_width, self.v_width) < 0:
            raise UserError("model.qk_width and model.v_width must not be negative")


@registry.register(HSTURetrievalConfig)
class HSTURetrieval(Retriever):
    """x_t = dropout(sqrt(D) E[i_t] + P[t]);  y = stack(x) / |stack(x)|;  score(item) = y . E[item] / |E[item]|.

    Loss: sampled softmax over the next item and R uniform negatives per position. Attention asks at the time of the
    next event, which a recommender knows; models without time (SASRec) do not see it.
    """

    def __init__(self, config: HSTURetrievalConfig, build: Build, *, rngs: nnx.Rngs):
        width, longest = config.width, build.shape.history + RESERVED
        self.width, self.negatives, self.temperature = width, config.negatives, config.temperature
        self.dropout, self.dtype = config.dropout, build.dtype
        self.items_table = Table(build.schema.items, width, std=0.02, rngs=rngs)
        positions = jax.nn.initializers.glorot_normal()
        self.positions = nnx.Param(positions(rngs.params(), (longest, width)))
        self.stack = Stack(
            [
                HSTUBlock(
                    width,
                    config.heads,
                    qk_width=config.qk_width or width // config.heads,
                    v_width=config.v_width or width // config.heads,
                    longest=longest,
                    init_std=0.02,
                    dropout=config.dropout,
                    dtype=build.dtype,
                    rngs=rngs,
                )
                for _ in range(config.depth)
            ],
            longest=longest,
        )

    def users(self, batch: Batch) -> jax.Array:
        segments = batch.user.shape[1]
        last = last_events(batch.history.segment, segments)
        return jnp.take_along_axis(self.states(batch, next_item(batch), None), last[..., None], axis=1)

    def items(self) -> jax.Array:
        return l2_normalise(self.items_table.rows_table[...].at[0].set(0.0))

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        rows = next_item(batch)
        negatives = draw_negatives(rngs.negatives(), rows.target, self.negatives, self.items_table.vocab - 1)
        return self.sampled_loss(self.states(batch, rows, rngs), rows.target, negatives)

    def states(self, batch: Batch, rows: NextItem, rngs: nnx.Rngs | None) -> jax.Array:
        """Unit vectors [B, N, D] float32, one per history position."""
        x = self.width**0.5 * self.items_table(batch.history.item) + self.positions[...][rows.position]
        x = dropout(x.astype(self.dtype), self.dropout, rngs)
        return l2_normalise(self.stack(x, rows.tokens, rngs=rngs).astype(jnp.float32))

    def sampled_loss(self, states: jax.Array, target: jax.Array, negatives: jax.Array) -> tuple[jax.Array, jax.Array]:
        """states [B, N, D], target [B, N], negatives [B, N, R] -> (sum of losses, positions with a target)."""
        weights = (target > 0).astype(jnp.float32)
        count = jnp.sum(weights)
        mean = sampled_softmax(states, self.items(), target, weights, negatives, temperature=self.temperature)
        return mean * count, count

    def cost(self, shape: Shape) -> Cost:
        # The definition's products; multiplying by the whole table instead, where that is faster, is not counted.
        products = 2.0 * shape.history * self.width * (1 + self.negatives)
        return total(
            [
                self.items_table.cost(shape.history * (2 + self.negatives)),
                Cost(dense_params=self.positions.size),
                self.stack.cost(ITEMS.row_tokens(shape), ITEMS.pairs(shape)),
                Cost(flops=products, loss_flops=products),
            ]
        )
