"""The relative bias of HSTU: when and how far apart two tokens are, never what they hold."""

import jax
from flax import nnx

from genrec_jax.nn.cost import Cost
from kernels_pallas.hstu_attention import TIME_BUCKETS


class RelativeBias(nnx.Module):
    """rab_{qk} = w_pos[order_k - order_q + n - 1] + w_time[bucket(|time_q - time_k|)] (HSTU, arXiv 2402.17152).

    One pair of tables per layer, shared by its heads: ``position`` [2n - 1] and ``time`` [129].
    """

    def __init__(self, longest: int, *, rngs: nnx.Rngs):
        """``longest``: n, the longest sequence a token can see."""
        init = jax.nn.initializers.normal(0.02)
        self.position = nnx.Param(init(rngs.params(), (2 * longest - 1,)))
        self.time = nnx.Param(init(rngs.params(), (TIME_BUCKETS,)))

    def cost(self) -> Cost:
        """Parameters only: a look-up and an addition per pair are below 1 % of the pair's products."""
        return Cost(dense_params=self.position.size + self.time.size)
