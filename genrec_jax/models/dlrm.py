"""DLRM: Deep Learning Recommendation Model (Naumov et al. 2019, arXiv:1906.00091)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.pointwise import PointwiseRanker
from genrec_jax.nn.basic import MLP
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.interaction import dot_interaction, dot_interaction_cost, dot_interaction_count


@dataclasses.dataclass(frozen=True)
class DLRMConfig(ModelConfig):
    """embedding: d, the width of every field. bottom: hidden layers of the bottom MLP. width, depth: hidden layers of
    the top MLP, the axes of a ladder. dropout: in the top MLP."""

    name = "dlrm"
    embedding: int = 32
    bottom: tuple[int, ...] = (64,)
    width: int = 128
    depth: int = 2
    dropout: float = 0.0

    def check(self) -> None:
        if min(self.embedding, self.width, self.depth, *self.bottom) < 1:
            raise UserError("model.embedding, model.bottom, model.width and model.depth must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), not {self.dropout}")


@registry.register(DLRMConfig)
class DLRM(PointwiseRanker):
    """b = MLP_bot(dense);  V = [b, e_1 .. e_F];  z = [b, {<v_i, v_j>: j < i}];  logits = MLP_top(z).

    One top MLP with a logit per task (shared-bottom) serves all tasks.
    """

    def __init__(self, config: DLRMConfig, build: Build, *, rngs: nnx.Rngs):
        super().__init__(build, config.embedding, hashing=config.hashing, rngs=rngs)
        d, dtype = config.embedding, build.dtype
        self.d = d
        self.bottom = MLP(self.dense, [*config.bottom, d], activate_last=True, dtype=dtype, rngs=rngs)
        self.vectors = 1 + self.fields.count
        self.top = MLP(
            d + dot_interaction_count(self.vectors),
            [config.width] * config.depth + [len(build.schema.tasks)],
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def logits(self, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        b = self.bottom(self.dense_inputs(batch))
        v = jnp.concatenate([b[:, :, None], self.fields(batch)], axis=2)
        z = jnp.concatenate([b, dot_interaction(v)], axis=-1)
        return self.top(z, rngs=rngs)

    def cost(self, shape: Shape) -> Cost:
        """One row: every one of its S * K candidate slots is scored on its own."""
        rows = shape.slots
        dots = dot_interaction_cost(rows, self.vectors, self.d, self.dtype)
        return total([self.input_cost(shape), self.bottom.cost(rows), dots, self.top.cost(rows)])
