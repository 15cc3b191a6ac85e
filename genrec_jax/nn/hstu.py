"""The HSTU block (Zhai et al., ICML 2024, arXiv 2402.17152, equations 1-3; the public retrieval code's variant)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.nn.basic import LayerNorm, Linear
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.position import RelativeBias
from kernels_pallas.gated_norm import gated_norm
from kernels_pallas.hstu_attention import (
    Columns,
    Plan,
    Scaled,
    Tokens,
    heads_apart,
    hstu_attention,
    hstu_attention_cached,
    widened,
)

Kept = jax.Array | Scaled  # keys or values [B, N, H, D] as a cache keeps them


class HSTUBlock(nnx.Module):
    """[U, V, Q, K] = SiLU(LN(X) W);  A = SiLU(Q K^T + rab) / n * mask;  Y = X + W_o dropout(LN(A V) * U) + b_o.

    The divisor n is ``longest``, a constant of the model: a divisor taken from the batch would make a score depend
    on its neighbours. Normalisations have no affine part and W has no bias.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_width: int,
        v_width: int,
        longest: int,
        init_std: float,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """``qk_width``, ``v_width``: width of one head's queries and keys, and of its values and gates.

        ``init_std``: of W. The public code starts every width at 0.02; at small widths that leaves A V below the
        epsilon of its normalisation, and ``width ** -0.5`` learns much faster.
        """
        self.heads, self.longest, self.dropout = heads, longest, dropout
        self.values, self.keys = heads * v_width, heads * qk_width
        self.norm = LayerNorm(width, use_scale=False, use_bias=False, use_fast_variance=False, dtype=dtype, rngs=rngs)
        self.project = Linear(
            width,
            2 * (self.values + self.keys),
            use_bias=False,
            kernel_init=jax.nn.initializers.normal(init_std),
            dtype=dtype,
            rngs=rngs,
        )
        self.bias = RelativeBias(longest, rngs=rngs)
        xavier = jax.nn.initializers.glorot_uniform()
        self.out = Linear(self.values, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, plan: Plan, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D], the pairs of its tokens -> [B, T, D]; dropout is on when ``rngs`` is given."""
        gate, v, q, k = self.projections(x)
        attended = hstu_attention(
            q, k, v, plan, max_len=self.longest, position_bias=self.bias.position[...], time_bias=self.bias.time[...]
        )
        return self.merge(x, gate, attended, rngs=rngs)

    def cached(
        self,
        x: jax.Array,
        tokens: Tokens,
        earlier: tuple[Kept, Kept],
        earlier_tokens: Tokens,
        *,
        keep: Callable[[jax.Array], Kept] = lambda x: x,
        one_request: bool = False,
    ) -> tuple[jax.Array, tuple[Kept, Kept]]:
        """The block's rows for new tokens x [B, M, D] behind ``earlier`` keys and values, and their own, as kept.

        ``keep`` says how a cache keeps them; they are attended to as kept, so that it does not matter which tokens
        were new together. The rest is as in `hstu_attention_cached`. Dropout is off.
        """
        gate, v, q, k = self.projections(x)
        own = keep(heads_apart(k)), keep(heads_apart(v))
        attended = hstu_attention_cached(
            heads_apart(q),
            widened(own[0], x.dtype),
            widened(own[1], x.dtype),
            tokens,
            *earlier,
            earlier_tokens,
            max_len=self.longest,
            position_bias=self.bias.position[...],
            time_bias=self.bias.time[...],
            one_request=one_request,
        )
        return self.merge(x, gate, attended), own

    def projections(self, x: jax.Array) -> tuple[jax.Array, Columns, Columns, Columns]:
        """x [..., T, D] -> U [..., T, H * Dv] and V, Q, K [..., T, H, Dv or Dqk], columns of one array."""
        mixed = jax.nn.silu(self.project(self.norm(x)))
        value, key = self.values // self.heads, self.keys // self.heads
        v = Columns(mixed, self.values, self.heads, value)
        q = Columns(mixed, 2 * self.values, self.heads, key)
        k = Columns(mixed, 2 * self.values + self.keys, self.heads, key)
        return mixed[..., : self.values], v, q, k

    def merge(self, x: jax.Array, gate: jax.Array, attended: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [..., T, D], U [..., T, H * Dv], A V [..., T, H, Dv] -> the block's output [..., T, D]."""
        key = rngs.dropout() if rngs is not None and self.dropout else None
        return x + self.out(gated_norm(attended.reshape(gate.shape), gate, rate=self.dropout, key=key))

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost over ``tokens`` tokens of which ``pairs`` (query, key) pairs are visible."""
        item = jnp.dtype(self.project.dtype or jnp.float32).itemsize
        kept = tokens * (4 * (self.values + self.keys) + self.values) * item  # before and after SiLU; A V
        return total(
            [
                self.norm.cost(tokens),
                self.project.cost(tokens),
                self.bias.cost(),
                Cost(flops=2.0 * pairs * (self.keys + self.values), activation_bytes=float(kept)),
                self.out.cost(tokens),
            ]
        )
