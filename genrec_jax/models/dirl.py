"""DirL: direct learning on [context | history | candidates] (Microsoft, "GenRec Direct Learning", 2026)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.layouts import CONTEXT_HISTORY_CANDIDATES
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.sequence import Mixer, RankingConfig, SequenceRanker, ranking_stack
from genrec_jax.nn.basic import MLP, LayerNorm
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.experts import CGC
from genrec_jax.nn.features import request_feature_count, request_features, request_features_cost
from genrec_jax.nn.tokens import ActionEncoder, ContextEncoder, ItemEncoder
from genrec_jax.objectives import bce


@dataclasses.dataclass(frozen=True)
class DirLConfig(RankingConfig):
    """Sizes as in RankingConfig. experts: N shared experts of the head, beside one per task; expert_width: of each."""

    name = "dirl"
    experts: int = 2
    expert_width: int = 64

    def check(self) -> None:
        super().check()
        if min(self.experts, self.expert_width) < 1:
            raise UserError("model.experts and model.expert_width must be positive")


class CandidateRanker(SequenceRanker):
    """X = [u | x_1 .. x_N | c_1 .. c_K];  z_k = LN(stack(X)_{c_k});  logits = CGC(z_k), N shared + 1 expert per task.

    u = MLP_u(context features); x_t = item + action; c = item + MLP_c(item, cross features): the numeric user-item
    features of the classical rankers stay, inside the candidate's token. The published history holds engaged
    documents only and therefore no action tokens; here a history event may be a refusal, so its label is in its token.
    K candidates in one row score exactly as K rows of one (they are invisible to each other). Loss on candidates only.
    """

    layout = CONTEXT_HISTORY_CANDIDATES

    def __init__(self, config: DirLConfig, build: Build, *, mixer: Mixer, rngs: nnx.Rngs):
        schema, dtype, width = build.schema, build.dtype, config.width
        self.schema = schema
        self.context = ContextEncoder(schema, width, dtype=dtype, rngs=rngs)
        self.items = ItemEncoder(schema, width, hashing=config.hashing, dtype=dtype, rngs=rngs)
        self.actions = ActionEncoder(len(schema.tasks), width, dtype=dtype, rngs=rngs)
        beside = request_feature_count(schema)
        self.cross = MLP(
            width,
            [width, width],
            beside=beside,
            beside_init=jax.nn.initializers.normal(((config.base_width or width) + beside) ** -0.5),
            dtype=dtype,
            rngs=rngs,
        )
        self.stack = ranking_stack(config, mixer, self.layout.longest(build.shape.history), dtype, rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = CGC(
            width,
            len(schema.tasks),
            shared=config.experts,
            specific=1,
            widths=[config.expert_width],
            dtype=jnp.dtype(
                jnp.float32
            ),  # the head is small, and bfloat16 logits would cost digits that log-loss can see
            rngs=rngs,
        )
        self.dropout = config.dropout

    def __call__(self, batch: Batch) -> jax.Array:
        return self.logits(self.states(batch, None)[1])

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        candidates = batch.candidates
        return bce(self.logits(self.states(batch, rngs)[1]), candidates.labels, candidates.segment > 0)

    def logits(self, states: jax.Array) -> jax.Array:
        return self.head(self.norm(states))

    def prefix(self, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
        context = self.context(batch.context.features, batch.user.shape)
        return context, [self.items(batch.history) + self.actions(batch.history.labels)]

    def candidate_tokens(self, batch: Batch) -> jax.Array:
        item = self.items(batch.candidates)
        return item + self.cross(item, beside=request_features(batch, self.schema).astype(item.dtype))

    def cost(self, shape: Shape) -> Cost:
        return total(
            [
                self.context.cost(shape.segments),
                self.items.cost(shape.history + shape.slots),
                self.actions.cost(shape.history),
                request_features_cost(self.schema, shape),
                self.cross.cost(shape.slots),
                self.stack.cost(self.layout.row_tokens(shape), self.layout.pairs(shape)),
                self.norm.cost(shape.slots),
                self.head.cost(shape.slots),
            ]
        )


@registry.register(DirLConfig)
class DirL(CandidateRanker):
    """Context, history and candidates through HSTU blocks with relative position and time bias."""

    def __init__(self, config: DirLConfig, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, build, mixer="hstu", rngs=rngs)
