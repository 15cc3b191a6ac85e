"""What the retrieval models share: next-item prediction over a sequence of items (arXiv 2402.17152, public code)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.layouts import ITEMS, NextItem, last_events, next_item
from genrec_jax.models.base import Build, Retriever, Rows
from genrec_jax.models.sequence import SequenceConfig
from genrec_jax.nn.basic import dropout
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.hashing import item_table
from genrec_jax.nn.stack import Block, Stack
from genrec_jax.retrieval_loss import draw_negatives, full_softmax, l2_normalise, sampled_softmax

# The public code reserves 10 output slots and one for the target; they only enter the divisor and the table sizes.
RESERVED = 11


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(SequenceConfig):
    """width, depth, heads, dropout: the published ML-1M base.

    negatives: R per position, 0 for the full softmax over all items. sampling: of negatives, "uniform" over the items,
    or by "popularity", their share of the training targets. logq: correct the logits for that. shared_negatives: draw R
    once for all positions of a batch. temperature: of the softmax over cosines.
    """

    rows: ClassVar[Rows] = "users"
    goal = "retrieval"
    width: int = 50
    depth: int = 2
    heads: int = 1
    dropout: float = 0.2
    negatives: int = 128
    sampling: Literal["uniform", "popularity"] = "uniform"
    logq: bool = False
    shared_negatives: bool = False
    temperature: float = 0.05

    def check(self) -> None:
        super().check()
        if self.negatives < 0 or not self.temperature > 0:
            raise UserError("model.temperature must be positive and model.negatives must not be negative")
        if self.negatives == 0 and (self.sampling, self.logq, self.shared_negatives) != ("uniform", False, False):
            raise UserError(
                "model.negatives=0 draws none: leave model.sampling, model.logq, model.shared_negatives alone"
            )
        if self.logq and self.sampling == "uniform":
            raise UserError("model.logq changes nothing with model.sampling=uniform: every item is drawn alike")


class NextItemRetriever(Retriever):
    """x_t = dropout(sqrt(D) E[i_t] + P[t]);  y = stack(x) / |stack(x)|;  score(item) = y . E[item] / |E[item]|.

    Loss: softmax over the next item and R negatives per position, or over all items. What stands between x and y is
    all that a model has to say.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        build: Build,
        *,
        positions: jax.nn.initializers.Initializer,
        block: Callable[[], Block],
        reach: int,
        rngs: nnx.Rngs,
    ):
        """``positions``: initialises P [n, D]. ``block``: makes one of the ``depth`` blocks. ``reach``: of their
        position tables, 0 if they have none."""
        self.width, self.negatives, self.temperature = config.width, config.negatives, config.temperature
        self.dropout, self.dtype = config.dropout, build.dtype
        self.shared_negatives, self.logq = config.shared_negatives, config.logq
        self.popular, self.popularity = config.sampling == "popularity", build.popularity
        self.items_table = item_table(build.schema.items, config.width, hashing=config.hashing, std=0.02, rngs=rngs)
        self.positions = nnx.Param(positions(rngs.params(), (build.shape.history + RESERVED, config.width)))
        self.stack = Stack([block() for _ in range(config.depth)], longest=reach)

    def users(self, batch: Batch) -> jax.Array:
        segments = batch.user.shape[1]
        last = last_events(batch.history.segment, segments)
        return jnp.take_along_axis(self.states(batch, self.rows(batch), None), last[..., None], axis=1)

    def items(self) -> jax.Array:
        return l2_normalise(self.items_table.rows())

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        rows = self.rows(batch)
        states = self.states(batch, rows, rngs)
        if not self.negatives:
            return self.full_loss(states, rows.target)
        return self.sampled_loss(states, rows.target, self.draw(rngs, rows.target.shape))

    def rows(self, batch: Batch) -> NextItem:
        """Tokens, places and targets of the history's events."""
        return next_item(batch)

    def draw(self, rngs: nnx.Rngs, positions: tuple[int, ...]) -> jax.Array:
        """Negatives [B, N, R] of B x N positions, or [R] for all positions of a batch, in whichever pieces it comes."""
        shape = (self.negatives,) if self.shared_negatives else (*positions, self.negatives)
        key = rngs.batch() if self.shared_negatives else rngs.negatives()
        if not self.popular:
            return draw_negatives(key, shape, self.items_table.vocab - 1)
        assert self.popularity is not None, "a model that is trained is built with the items' popularity"
        return self.popularity.draw(key, shape)

    def states(self, batch: Batch, rows: NextItem, rngs: nnx.Rngs | None) -> jax.Array:
        """Unit vectors [B, N, D] float32, one per history position."""
        x = self.width**0.5 * self.items_table(batch.history.item) + self.positions[...][rows.position]
        x = dropout(x.astype(self.dtype), self.dropout, rngs)
        return l2_normalise(self.stack(x, rows.tokens, rngs=rngs).astype(jnp.float32))

    def sampled_loss(self, states: jax.Array, target: jax.Array, negatives: jax.Array) -> tuple[jax.Array, jax.Array]:
        """states [B, N, D], target [B, N], negatives [B, N, R] or [R] -> (sum of losses, positions with a target)."""
        weights = (target > 0).astype(jnp.float32)
        count = jnp.sum(weights)
        log_q = jnp.asarray(self.popularity.log_q()) if self.logq and self.popularity is not None else None
        if log_q is not None:
            log_q = log_q.at[self.items_table.ids()].get(mode="clip")
        mean = sampled_softmax(
            states,
            self.items(),
            self.items_table.places(target),
            weights,
            self.items_table.places(negatives),
            temperature=self.temperature,
            log_q=log_q,
        )
        return mean * count, count

    def full_loss(self, states: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        """states [B, N, D], target [B, N] -> (sum of losses over all items, positions with a target)."""
        weights = (target > 0).astype(jnp.float32)
        count = jnp.sum(weights)
        return full_softmax(states, self.items(), target, weights, temperature=self.temperature) * count, count

    def cost(self, shape: Shape) -> Cost:
        others = self.negatives or self.items_table.vocab - 2
        products = 2.0 * shape.history * self.width * (1 + others)
        return total(
            [
                self.items_table.cost(shape.history),
                # Of the rows that the loss reads none is kept: it works on a few positions, or items, at a time.
                Cost(dense_params=self.positions.size, embedding_reads=shape.history * (1 + others) * self.width),
                self.stack.cost(ITEMS.row_tokens(shape), ITEMS.pairs(shape)),
                Cost(flops=products, loss_flops=products),
            ]
        )
