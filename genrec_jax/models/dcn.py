"""DCN-v2: the improved Deep & Cross Network (Wang et al., WWW 2021, arXiv:2008.13535), stacked."""

import dataclasses

import jax
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.pointwise import PointwiseRanker
from genrec_jax.nn.basic import MLP
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.interaction import Cross


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
class DCN(PointwiseRanker):
    """x_0 = [e_1 .. e_F, dense];  x_{l+1} = x_0 * (W_l x_l + b_l) + x_l;  logits = MLP(x_L)  (section 3, stacked).

    One MLP with a logit per task (shared-bottom) serves all tasks.
    """

    def __init__(self, config: DCNConfig, build: Build, *, rngs: nnx.Rngs):
        super().__init__(build, config.embedding, hashing=config.hashing, rngs=rngs)
        self.cross = Cross(self.flat, config.cross, rank=config.rank, dtype=build.dtype, rngs=rngs)
        widths = [config.width] * config.depth + [len(build.schema.tasks)]
        self.deep = MLP(self.flat, widths, dropout=config.dropout, dtype=build.dtype, rngs=rngs)

    def logits(self, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        return self.deep(self.cross(self.flat_inputs(batch)), rngs=rngs)

    def cost(self, shape: Shape) -> Cost:
        """One row: every one of its S * K candidate slots is scored on its own."""
        return total([self.input_cost(shape), self.cross.cost(shape.slots), self.deep.cost(shape.slots)])
