"""HSTU for retrieval: the next item of a sequence, as in the public research code (Zhai et al., arXiv 2402.17152)."""

import dataclasses

import jax
from flax import nnx

from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.retrieval import RESERVED, NextItemRetriever, RetrievalConfig
from genrec_jax.nn.basic import fan_in_uniform, xavier_normal
from genrec_jax.nn.hstu import HSTUBlock


@dataclasses.dataclass(frozen=True)
class HSTURetrievalConfig(RetrievalConfig):
    """Sizes as in RetrievalConfig. qk_width, v_width: of one head, 0 for width / heads."""

    name = "hstu_retrieval"
    qk_width: int = 0
    v_width: int = 0

    def check(self) -> None:
        super().check()
        if min(self.qk_width, self.v_width) < 0:
            raise UserError("model.qk_width and model.v_width must not be negative")


@registry.register(HSTURetrievalConfig)
class HSTURetrieval(NextItemRetriever):
    """Next-item prediction with HSTU blocks and relative position and time bias.

    Attention asks at the time of the next event, which a recommender knows; models without time (SASRec) do not see it.
    """

    def __init__(self, config: HSTURetrievalConfig, build: Build, *, rngs: nnx.Rngs):
        longest = build.shape.history + RESERVED
        v_width = config.v_width or config.width // config.heads

        def block() -> HSTUBlock:
            return HSTUBlock(
                config.width,
                config.heads,
                qk_width=config.qk_width or config.width // config.heads,
                v_width=v_width,
                longest=longest,
                project_init=jax.nn.initializers.normal(0.02),
                dropout=config.dropout,
                dtype=build.dtype,
                rngs=rngs,
                out_bias=fan_in_uniform(config.heads * v_width),
            )

        super().__init__(config, build, positions=xavier_normal, block=block, reach=longest, rngs=rngs)
