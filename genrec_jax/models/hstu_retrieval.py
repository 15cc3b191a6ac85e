"""HSTU for retrieval: the next item of a sequence, as in the public research code (Zhai et al., arXiv 2402.17152)."""

import dataclasses

import jax
from flax import nnx

from genrec_jax.batch import Batch
from genrec_jax.errors import UserError
from genrec_jax.layouts import NextItem
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.retrieval import RESERVED, NextItemRetriever, RetrievalConfig
from genrec_jax.nn.basic import fan_in_uniform, xavier_normal
from genrec_jax.nn.hstu import HSTUBlock


@dataclasses.dataclass(frozen=True)
class HSTURetrievalConfig(RetrievalConfig):
    """Sizes as in RetrievalConfig. qk_width, v_width: of one head, 0 for width / heads.

    next_time: attention asks at the time of the next event, which is known when an item is asked for; else at that of
    its own event. true_length: attention is divided by its user's events, not by the longest row's.
    """

    name = "hstu_retrieval"
    qk_width: int = 0
    v_width: int = 0
    next_time: bool = True
    true_length: bool = False

    def check(self) -> None:
        super().check()
        if min(self.qk_width, self.v_width) < 0:
            raise UserError("model.qk_width and model.v_width must not be negative")


@registry.register(HSTURetrievalConfig)
class HSTURetrieval(NextItemRetriever):
    """Next-item prediction with HSTU blocks and relative position and time bias.

    The published model sees the time of the event it predicts; models without time (SASRec) do not.
    """

    def __init__(self, config: HSTURetrievalConfig, build: Build, *, rngs: nnx.Rngs):
        longest = build.shape.history + RESERVED
        self.next_time = config.next_time
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
                true_length=config.true_length,
            )

        super().__init__(config, build, positions=xavier_normal, block=block, reach=longest, rngs=rngs)

    def rows(self, batch: Batch) -> NextItem:
        rows = super().rows(batch)
        if self.next_time:
            return rows
        return rows._replace(tokens=rows.tokens._replace(query_time=rows.tokens.key_time))
