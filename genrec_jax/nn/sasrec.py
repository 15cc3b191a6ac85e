"""SASRec's block, as coded in HSTU's public research code (sequential/sasrec.py)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.context import ALONE
from genrec_jax.distributed.tensor import UNDIVIDED
from genrec_jax.nn.basic import LayerNorm, Linear, dropout, fan_in_uniform, xavier_normal
from genrec_jax.nn.cost import Cost, total
from kernels_pallas.hstu_attention import Plan, softmax_attention

EPSILON = 1e-8


class SASRecBlock(nnx.Module):
    """N = LN(X);  Z = LN(N + W_o softmax(N W_q (X W_k)^T / sqrt(d)) X W_v);  Y = Z + W_2 relu(Z W_1).

    Every map has a bias, no normalisation an affine part. Queries are normalised and so is what the residual carries;
    keys and values are not. Dropout falls on the attention weights and after each map of the feed-forward layer, all at
    one rate, as published. Rows too long for a mask of weights (`softmax_attention`) are refused unless the rate is 0.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads, self.head_width, self.dropout = heads, width // heads, dropout
        self.context, self.tensor = ALONE, UNDIVIDED
        self.sections = (width, width, width)  # of Q, K and V

        def norm() -> LayerNorm:
            return LayerNorm(
                width,
                epsilon=EPSILON,
                use_scale=False,
                use_bias=False,
                use_fast_variance=False,
                dtype=dtype,
                rngs=rngs,
            )

        def linear(outputs: int, bias: jax.nn.initializers.Initializer) -> Linear:
            return Linear(width, outputs, kernel_init=xavier_normal, bias_init=bias, dtype=dtype, rngs=rngs)

        self.norm, self.norm_ffn = norm(), norm()
        self.project = linear(3 * width, jax.nn.initializers.zeros)  # Q, K, V
        self.out = linear(width, jax.nn.initializers.zeros)
        self.inner, self.outer = linear(width, fan_in_uniform(width)), linear(width, fan_in_uniform(width))

    def __call__(self, x: jax.Array, plan: Plan, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D], the pairs of its tokens -> [B, T, D]; dropout is on when ``rngs`` is given."""
        normal = self.norm(x)
        q, k, v = self.projections(normal, x)
        key = rngs.dropout() if rngs is not None and self.dropout else None
        attention = functools.partial(
            softmax_attention,
            tokens=plan,
            scale=self.head_width**-0.5,
            rate=self.dropout,
            key=key,
            part=self.context.heads(self.tensor.share(self.heads), self.tensor.part(self.heads)),
        )
        length = plan.tokens.segment.shape[1]
        attended, part = self.context.attend(attention, q, k, v, length), self.context.tokens(length)
        mixed = self.out.summed(attended.reshape(*x.shape[:-1], -1), self.tensor)
        z = self.norm_ffn(normal + mixed)
        inner = jax.nn.relu(self.inner(self.tensor.enter(z)))
        inner = dropout(inner, self.dropout, rngs, part, self.tensor)
        return z + dropout(self.outer.summed(inner, self.tensor), self.dropout, rngs, part)

    def projections(self, normal: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """LN(X) and X [..., T, D] -> Q, K, V [..., T, H, head width]; H: the device's heads."""
        heads, rows = self.tensor.share(self.heads), x.shape[:-1]
        width = heads * self.head_width
        normal, x = self.tensor.enter(normal), self.tensor.enter(x)
        q = self.project.columns(normal, slice(0, width)).reshape(*rows, heads, self.head_width)
        kv = self.project.columns(x, slice(width, None)).reshape(*rows, 2 * heads, self.head_width)
        k, v = jnp.split(kv, 2, axis=-2)
        return q, k, v

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost over ``tokens`` tokens of which ``pairs`` (query, key) pairs are visible."""
        width = self.heads * self.head_width
        item, divided = jnp.dtype(self.project.dtype or jnp.float32).itemsize, self.tensor.size
        kept = float(tokens * width * item)  # of X, which keys and values read beside LN(X), and of each of Q, K, V
        return total(
            [
                self.norm.cost(tokens),
                self.project.cost(tokens).among(divided, activations=False),
                Cost(activation_bytes=kept),
                Cost(flops=2.0 * pairs * 2 * width, activation_bytes=3 * kept).among(divided),
                self.out.cost(tokens).among(divided),
                self.norm_ffn.cost(tokens),
                self.inner.cost(tokens).among(divided, activations=False),
                self.outer.cost(tokens).among(divided),
                self.context.cost(tokens * item / divided, (width,) * 4),
                self.tensor.cost(kept, forward=2, backward=3),
            ]
        )
