"""SASRec for retrieval (Kang & McAuley 2018) as HSTU's public research code runs it: same data, loss and heads."""

import dataclasses

import jax
from flax import nnx

from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.retrieval import NextItemRetriever, RetrievalConfig
from genrec_jax.nn.sasrec import SASRecBlock


@dataclasses.dataclass(frozen=True)
class SASRecConfig(RetrievalConfig):
    """Sizes as in RetrievalConfig; the feed-forward layer is as wide as the model, as in every published setting."""

    name = "sasrec"


@registry.register(SASRecConfig)
class SASRec(NextItemRetriever):
    """Next-item prediction with softmax blocks. It knows the order of events and nothing of their times."""

    def __init__(self, config: SASRecConfig, build: Build, *, rngs: nnx.Rngs):
        def block() -> SASRecBlock:
            return SASRecBlock(config.width, config.heads, dropout=config.dropout, dtype=build.dtype, rngs=rngs)

        # A normal of standard deviation `stddev`, cut at two of them: 0.88 · sqrt(1 / D) in effect, as published.
        positions = jax.nn.initializers.truncated_normal(stddev=config.width**-0.5)
        super().__init__(config, build, positions=positions, block=block, reach=0, rngs=rngs)
