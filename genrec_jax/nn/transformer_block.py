"""The pre-norm softmax Transformer block: HSTU's control, under the same mask and the same relative bias."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.context import ALONE
from genrec_jax.distributed.tensor import UNDIVIDED
from genrec_jax.nn.basic import MLP, LayerNorm, Linear, dropout
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.position import RelativeBias
from kernels_pallas.gated_norm import Part
from kernels_pallas.hstu_attention import Plan, softmax_attention

EXPANSION = 4  # FFN width over model width


class TransformerBlock(nnx.Module):
    """X' = X + W_o softmax(scale Q K^T + rab) V;  Y = X' + FFN(LN(X')) with [Q, K, V] = LN(X) W, GELU, FFN x4.

    Vaswani et al. 2017 with normalisation before each part. Dropout is on both residual branches.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scale: float,
        longest: int,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """``scale``: of Q K^T, usually one over the square root of a head's width."""
        self.heads, self.head_width, self.dropout = heads, width // heads, dropout
        self.scale = scale
        self.context, self.tensor = ALONE, UNDIVIDED
        self.sections = (width, width, width)  # of W's outputs
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.project = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.bias = RelativeBias(longest, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_ffn = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.ffn = MLP(width, [EXPANSION * width, width], activation=jax.nn.gelu, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, plan: Plan, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D], the pairs of its tokens -> [B, T, D]; dropout is on when ``rngs`` is given."""
        q, k, v = self.projections(x)
        attention = functools.partial(
            softmax_attention,
            tokens=plan,
            scale=self.scale,
            position_bias=self.tensor.enter(self.bias.position[...]),
            time_bias=self.tensor.enter(self.bias.time[...]),
        )
        length = plan.tokens.segment.shape[1]
        attended = self.context.attend(attention, q, k, v, length)
        return self.merge(x, attended, rngs=rngs, part=self.context.tokens(length))

    def projections(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., T, D] -> Q, K, V [..., T, H, head width]; H: the device's heads."""
        mixed = self.project(self.tensor.enter(self.norm(x)))
        q, k, v = jnp.split(mixed.reshape(*x.shape[:-1], -1, self.head_width), 3, axis=-2)
        return q, k, v

    def merge(
        self, x: jax.Array, attended: jax.Array, *, rngs: nnx.Rngs | None = None, part: Part | None = None
    ) -> jax.Array:
        """x [..., T, D], attention's output [..., T, H, head width] -> the block's output [..., T, D]; ``part``: which
        of a row's tokens these are, None for all."""
        mixed = self.out.summed(attended.reshape(*x.shape[:-1], -1), self.tensor)
        x = x + dropout(mixed, self.dropout, rngs, part)
        return x + dropout(self.ffn(self.norm_ffn(x), tensor=self.tensor), self.dropout, rngs, part)

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost over ``tokens`` tokens of which ``pairs`` (query, key) pairs are visible."""
        width = self.heads * self.head_width
        item, divided = jnp.dtype(self.project.dtype or jnp.float32).itemsize, self.tensor.size
        kept = tokens * (3 + EXPANSION) * width * item  # Q, K, V and the FFN's hidden layer before GELU
        return total(
            [
                self.norm.cost(tokens),
                self.project.cost(tokens).among(divided, activations=False),
                self.bias.cost(),
                Cost(flops=2.0 * pairs * 2 * width, activation_bytes=float(kept)).among(divided),
                self.out.cost(tokens).among(divided),
                self.norm_ffn.cost(tokens),
                self.ffn.cost(tokens, self.tensor),
                self.context.cost(tokens * item / divided, (width,) * 4),
                self.tensor.cost(tokens * item * width, forward=2, backward=2),
            ]
        )
