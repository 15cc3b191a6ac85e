"""DCN-v2: the improved Deep & Cross Network (Wang et al., WWW 2021, arXiv:2008.13535), stacked."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig, Ranker
from genrec_jax.nn.basic import MLP
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.features import Fields, request_feature_count, request_features
from genrec_jax.nn.interaction import Cross
from genrec_jax.objectives import bce


@dataclasses.dataclass(frozen=True)
class DCNConfig(ModelConfig):
    """embedding: width of every field. cross: cross layers. rank: of each cross matrix, 0 for a full one. width, depth:
    hidden layers of the MLP behind the crosses. dropout: in the MLP."""

    name = "dcn"
    embedding: int = 32
    cross: int = 3
    rank: int = 0
    width: int = 128
    depth: int = 2
    dropout: float = 0.0

    def check(self) -> None:
        if min(self.embedding, self.cross, self.width, self.depth) < 1 or self.rank < 0:
            raise UserError(
                "model.embedding, model.cross, model.width and model.depth must be positive, model.rank not negative"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), not {self.dropout}")


@registry.register(DCNConfig)
class DCN(Ranker):
    """x_0 = [e_1 .. e_F, dense];  x_{l+1} = x_0 * (W_l x_l + b_l) + x_l;  logits = MLP(x_L)  (section 3, stacked).

    e_f are the context features, the candidate with its side features, and bags of the history (``Fields``); dense are
    the request's numeric features. There is no user-id field: the history is the user. One MLP with a logit per task
    (shared-bottom) serves all tasks.
    """

    def __init__(self, config: DCNConfig, build: Build, *, rngs: nnx.Rngs):
        schema, dtype = build.schema, build.dtype
        self.schema, self.dtype = schema, dtype
        self.fields = Fields(schema, config.embedding, dtype=dtype, rngs=rngs)
        inputs = self.fields.count * config.embedding + request_feature_count(schema)
        self.cross = Cross(inputs, config.cross, rank=config.rank, dtype=dtype, rngs=rngs)
        widths = [config.width] * config.depth + [len(schema.tasks)]
        self.deep = MLP(inputs, widths, dropout=config.dropout, dtype=dtype, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        return self._logits(batch, None)

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        return bce(self._logits(batch, rngs), batch.candidates.labels, batch.candidates.segment > 0)

    def _logits(self, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        e = self.fields(batch)
        dense = request_features(batch, self.schema).astype(self.dtype)
        x0 = jnp.concatenate([e.reshape(*e.shape[:2], -1), dense], axis=-1)
        return self.deep(self.cross(x0), rngs=rngs).astype(jnp.float32)

    def cost(self, shape: Shape) -> Cost:
        """One row: every one of its S * K candidate slots is scored on its own."""
        return total([self.fields.cost(shape), self.cross.cost(shape.slots), self.deep.cost(shape.slots)])
