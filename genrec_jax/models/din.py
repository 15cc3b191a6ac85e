"""DIN: Deep Interest Network (Zhou et al., KDD 2018, arXiv:1706.06978)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.pointwise import PointwiseRanker
from genrec_jax.nn.basic import MLP, Linear
from genrec_jax.nn.cost import Cost, total


@dataclasses.dataclass(frozen=True)
class DINConfig(ModelConfig):
    """embedding: width of every field. attention: hidden layers of the activation unit. width, depth: hidden layers of
    the MLP. dropout: in the MLP."""

    name = "din"
    embedding: int = 32
    attention: tuple[int, ...] = (64, 32)
    width: int = 128
    depth: int = 2
    dropout: float = 0.0

    def check(self) -> None:
        if not self.attention or min(self.embedding, self.width, self.depth, *self.attention) < 1:
            raise UserError("model.embedding, model.attention, model.width and model.depth must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), not {self.dropout}")


class ActivationUnit(nnx.Module):
    """a(e_j, v) = MLP([e_j, v, e_j - v, e_j * v]), one weight per (event, candidate), not normalised.

    The first layer is linear in e_j, v and e_j * v (the difference adds no direction), so its three parts are applied
    to N events, C candidates and N C products: a quarter of the FLOPs of the concatenation for the same function.
    """

    def __init__(self, inputs: int, widths: tuple[int, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.event = Linear(inputs, widths[0], dtype=dtype, rngs=rngs)
        self.target = Linear(inputs, widths[0], use_bias=False, dtype=dtype, rngs=rngs)
        self.product = Linear(inputs, widths[0], use_bias=False, dtype=dtype, rngs=rngs)
        self.rest = MLP(widths[0], [*widths[1:], 1], activation=jax.nn.silu, dtype=dtype, rngs=rngs)

    def __call__(self, e: jax.Array, v: jax.Array) -> jax.Array:
        """e [B, N, D] events, v [B, C, D] candidates -> weights [B, C, N]."""
        pairs = self.product(e[:, None] * v[:, :, None])
        hidden = self.event(e)[:, None] + self.target(v)[:, :, None] + pairs
        return self.rest(jax.nn.silu(hidden))[..., 0]

    def cost(self, events: int, targets: int) -> Cost:
        pairs = events * targets
        return total(
            [self.event.cost(events), self.target.cost(targets), self.product.cost(pairs), self.rest.cost(pairs)]
        )


@registry.register(DINConfig)
class DIN(PointwiseRanker):
    """u = 1/N sum_j a(e_j, v) e_j over the history;  logits = MLP([u, e_1 .. e_F, dense])  (section 4.3, equation 3).

    v is the candidate's item and side features, e_j the same of an event plus a linear map of its labels (the paper's
    behaviours are clicks alone; here an event may be a refusal). The weights are not normalised by a softmax, so that
    the strength of an interest survives; N, the constant number of history slots, only lets u start at order one at
    any length (without it the first logits of 256 events are near -10). SiLU stands where the paper has Dice, whose
    batch statistics would make a score depend on its neighbours; SiLU is Dice without them (alpha = 0). One MLP with a
    logit per task (shared-bottom) serves all tasks.
    """

    def __init__(self, config: DINConfig, build: Build, *, rngs: nnx.Rngs):
        super().__init__(build, config.embedding, hashing=config.hashing, rngs=rngs)
        tasks, dtype, d = len(build.schema.tasks), build.dtype, self.fields.item_width
        self.divisor = build.shape.history
        self.actions = Linear(tasks, d, use_bias=False, dtype=dtype, rngs=rngs)
        self.unit = ActivationUnit(d, config.attention, dtype=dtype, rngs=rngs)
        self.deep = MLP(
            d + self.flat,
            [config.width] * config.depth + [tasks],
            activation=jax.nn.silu,
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def logits(self, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        x = jnp.concatenate([self._interest(batch), self.flat_inputs(batch)], axis=-1)
        return self.deep(x, rngs=rngs)

    def _interest(self, batch: Batch) -> jax.Array:
        """u [B, C, D]; events of other segments and padding have weight zero."""
        e = self.fields.history(batch) + self.actions(batch.history.labels.astype(self.dtype))
        own = batch.candidates.segment[..., None] == batch.history.segment[:, None]
        own &= (batch.history.segment > 0)[:, None]
        a = jnp.where(own, self.unit(e, self.fields.candidate(batch)), 0) / self.divisor
        return jnp.einsum("bcn,bnd->bcd", a, e)

    def cost(self, shape: Shape) -> Cost:
        """One row: every slot's candidate meets every event of the row, as the arrays do."""
        n, slots = shape.history, shape.slots
        unit = self.unit.cost(n, slots) + Cost(flops=2.0 * n * slots * self.fields.item_width)
        return total([self.input_cost(shape, side_events=n), self.actions.cost(n), unit, self.deep.cost(slots)])
