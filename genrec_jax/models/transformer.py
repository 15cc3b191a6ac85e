"""The control of both HSTU rankers: the same tokens, layouts, masks, biases and heads, softmax blocks instead."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.models import registry
from genrec_jax.models.base import Build, Ranker, Rows
from genrec_jax.models.dirl import CandidateRanker, DirLConfig
from genrec_jax.models.hstu import InterleavedRanker
from genrec_jax.nn.cost import Cost


@dataclasses.dataclass(frozen=True)
class TransformerConfig(DirLConfig):
    """Sizes as in DirLConfig. layout: "candidates" is DirL's control; "interleaved" is HSTU's, trained on HSTU's
    generative rows (its head is linear: ``experts`` and ``expert_width`` belong to "candidates")."""

    name = "transformer"
    layout: Literal["candidates", "interleaved"] = "candidates"

    @property
    def rows(self) -> Rows:
        return "windows" if self.layout == "interleaved" else "requests"


@registry.register(TransformerConfig)
class Transformer(Ranker):
    """DirL's or HSTU's ranker with softmax blocks (nn/transformer_block.py) in place of HSTU blocks."""

    def __init__(self, config: TransformerConfig, build: Build, *, rngs: nnx.Rngs):
        kind = InterleavedRanker if config.layout == "interleaved" else CandidateRanker
        self.ranker = kind(config, build, mixer="softmax", rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        return self.ranker(batch)

    def loss(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        return self.ranker.loss(batch, rngs)

    def cost(self, shape: Shape) -> Cost:
        return self.ranker.cost(shape)
