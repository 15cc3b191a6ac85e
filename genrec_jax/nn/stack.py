"""A stack of sequence blocks over one row of tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.sasrec import SASRecBlock
from genrec_jax.nn.transformer_block import TransformerBlock
from kernels_pallas.hstu_attention import TIME_BUCKETS, Tokens, plan

Block = HSTUBlock | SASRecBlock | TransformerBlock


class Stack(nnx.Module):
    """Blocks one after the other; what they share (masks, distances, time buckets) is prepared once per call."""

    def __init__(self, blocks: Sequence[Block], *, longest: int):
        """``longest``: n of the blocks' position tables [2n - 1], 0 if they have no relative bias."""
        self.blocks = nnx.List(blocks)
        self.longest = longest

    def __call__(self, x: jax.Array, tokens: Tokens, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; whatever padding tokens hold is dropped here."""
        x = jnp.where((tokens.segment > 0)[..., None], x, 0)
        pairs = plan(tokens, positions=self.longest, buckets=TIME_BUCKETS if self.longest else 0)
        for block in self.blocks:
            x = block(x, pairs, rngs=rngs)
        return x

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost of one row of ``tokens`` tokens (padding included) with ``pairs`` visible pairs."""
        return total([block.cost(tokens, pairs) for block in self.blocks])
