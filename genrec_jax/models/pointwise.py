"""What DLRM, DCN-v2 and DIN share: their inputs and their objective."""

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.models.base import Build, Ranker
from genrec_jax.nn.cost import Cost
from genrec_jax.nn.features import Fields, request_feature_count, request_features, request_features_cost
from genrec_jax.nn.hashing import Hashing
from genrec_jax.objectives import bce


class PointwiseRanker(Ranker):
    """logits = f(e_1 .. e_F, dense) of every candidate on its own.

    e_f are the context features, the candidate with its side features, and bags of the history (``Fields``); dense are
    the request's numeric features. There is no user-id field: the history is the user.
    """

    def __init__(self, build: Build, embedding: int, *, hashing: Hashing | None, rngs: nnx.Rngs):
        """``embedding``: d, the width of every field. ``hashing``: of the item table."""
        self.schema, self.dtype = build.schema, build.dtype
        self.fields = Fields(build.schema, embedding, hashing=hashing, dtype=build.dtype, rngs=rngs)
        self.dense = request_feature_count(build.schema)
        self.flat = self.fields.count * embedding + self.dense

    def logits(self, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        """[B, C, A]; dropout is on when ``rngs`` is given."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> jax.Array:
        return self.logits(batch, None).astype(jnp.float32)

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        logits = self.logits(batch, rngs).astype(jnp.float32)
        return bce(logits, batch.candidates.labels, batch.candidates.segment > 0)

    def dense_inputs(self, batch: Batch) -> jax.Array:
        """[B, C, dense]: the request's numeric features in the compute type."""
        return request_features(batch, self.schema).astype(self.dtype)

    def flat_inputs(self, batch: Batch) -> jax.Array:
        """[B, C, flat]: every field, then the numeric features."""
        fields = self.fields(batch)
        return jnp.concatenate([fields.reshape(*fields.shape[:2], -1), self.dense_inputs(batch)], axis=-1)

    def input_cost(self, shape: Shape, *, side_events: int = 0) -> Cost:
        """Fields and numeric features of one row; ``side_events``: history events whose side features are read too."""
        return self.fields.cost(shape, side_events=side_events) + request_features_cost(self.schema, shape)
