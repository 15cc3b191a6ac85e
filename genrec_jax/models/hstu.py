"""HSTU for ranking: actions predicted inside the sequence of items and actions (Zhai et al., arXiv 2402.17152)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.layouts import INTERLEAVED
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.sequence import Mixer, RankingConfig, SequenceRanker, ranking_stack
from genrec_jax.nn.basic import LayerNorm, Linear
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.tokens import ActionEncoder, ContextEncoder, ItemEncoder
from genrec_jax.objectives import bce


class InterleavedRanker(SequenceRanker):
    """X = [context, i_1, a_1, i_2, a_2, ..., candidates];  logits_t = W LN(stack(X)_{i_t}) + b.

    The state at an item has seen the context and every earlier item and action, not the item's own action: it predicts
    that action. Training supervises the candidates and, in generative rows, each history event marked ``supervised``
    once, so one pass over a sequence yields a target per event (generative training, section 2.3). Candidates are
    item tokens without an action, invisible to each other. Context features enter as one prefix token per request.

    An action's token also holds its item. With the bare action of the paper's figure, an action means something only
    once a block has bound it to the token before it; pointwise attention learns that binding very slowly.
    """

    layout = INTERLEAVED

    def __init__(self, config: RankingConfig, build: Build, *, mixer: Mixer, rngs: nnx.Rngs):
        schema, dtype, width = build.schema, build.dtype, config.width
        self.context = ContextEncoder(schema, width, dtype=dtype, rngs=rngs)
        self.items = ItemEncoder(schema, width, hashing=config.hashing, dtype=dtype, rngs=rngs)
        self.actions = ActionEncoder(len(schema.tasks), width, dtype=dtype, rngs=rngs)
        self.stack = ranking_stack(config, mixer, self.layout.longest(build.shape.history), dtype, rngs)
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.head = Linear(width, len(schema.tasks), dtype=jnp.float32, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, batch: Batch) -> jax.Array:
        return self.logits(self.states(batch, None)[1])

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        events, candidates = (self.logits(x) for x in self.states(batch, rngs))
        history, targets = batch.history, batch.candidates
        past, past_count = bce(events, history.labels, history.supervised & (history.segment > 0))
        shown, shown_count = bce(candidates, targets.labels, targets.segment > 0)
        return past + shown, past_count + shown_count

    def prefix(self, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
        item = self.items(batch.history)
        context = self.context(batch.context.features, batch.user.shape)
        return context, [item, item + self.actions(batch.history.labels)]

    def candidate_tokens(self, batch: Batch) -> jax.Array:
        return self.items(batch.candidates)

    def logits(self, states: jax.Array) -> jax.Array:
        return self.head(self.norm(states))

    def cost(self, shape: Shape) -> Cost:
        # The head is counted on history items too: generative rows read them, and it is one column per task.
        predicted = shape.history + shape.slots
        return total(
            [
                self.context.cost(shape.segments),
                self.items.cost(predicted),
                self.actions.cost(shape.history),
                self.stack.cost(self.layout.row_tokens(shape), self.layout.pairs(shape)),
                self.norm.cost(predicted),
                self.head.cost(predicted),
            ]
        )


@dataclasses.dataclass(frozen=True)
class HSTUConfig(RankingConfig):
    """Sizes as in RankingConfig; heads are width / heads wide.

    rows: what one encoding is trained on. "windows": generative, every event of a window once per pass. "requests":
    impression-level, only the candidates of one request. "prefixes": a request and every action before it; with
    ``data.rows_per_user`` 1 these are the paper's users sampled at rate 1/n (section 2.3).
    """

    name = "hstu"
    rows: Literal["windows", "requests", "prefixes"] = "windows"


@registry.register(HSTUConfig)
class HSTU(InterleavedRanker):
    """Interleaved tokens through HSTU blocks with relative position and time bias."""

    def __init__(self, config: HSTUConfig, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, build, mixer="hstu", rngs=rngs)
