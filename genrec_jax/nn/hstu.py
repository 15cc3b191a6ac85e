"""The HSTU block (Zhai et al., ICML 2024, arXiv 2402.17152, equations 1-3) in the variants of the public code."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.context import ALONE, Heads
from genrec_jax.distributed.tensor import UNDIVIDED, Tensor
from genrec_jax.nn.basic import LayerNorm, Linear, dropout
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.position import RelativeBias
from kernels_pallas.gated_norm import Part, gated_norm
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

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the two published HSTU layers differ in.

    affine: both normalisations have a scale and a bias. project_bias: W has a bias. gate_only: SiLU falls on U alone,
    not on V, Q and K. relative_bias: attention has rab. concat: W_o reads [U; A V; norm(A V) * U], not the last alone.
    group_norm: norm(A V) is over each head alone, with one scale and one bias per head, not over all heads together.
    """

    affine: bool = False
    project_bias: bool = False
    gate_only: bool = False
    relative_bias: bool = True
    concat: bool = False
    group_norm: bool = False


RESEARCH = Variant()  # research/modeling/sequential/hstu.py: retrieval, and the paper's equations
RANKING = Variant(affine=True, project_bias=True, gate_only=True, relative_bias=False, concat=True)  # modules/stu.py


class HSTUBlock(nnx.Module):
    """[U, V, Q, K] = SiLU(LN(X) W);  A = SiLU(alpha Q K^T + rab) / n * mask;  Y = X + W_o dropout(LN(A V) * U) + b_o.

    The divisor n is ``longest``, a constant of the model: a divisor taken from the batch would make a score depend
    on its neighbours; with ``true_length`` it is the number of tokens of the query's own sequence. This is `RESEARCH`;
    the other `Variant` changes what it names.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_width: int,
        v_width: int,
        longest: int,
        project_init: jax.nn.initializers.Initializer,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        variant: Variant = RESEARCH,
        alpha: float = 1.0,
        out_bias: jax.nn.initializers.Initializer | None = jax.nn.initializers.zeros,
        true_length: bool = False,
    ):
        """``qk_width``, ``v_width``: width of one head's queries and keys, and of its values and gates.

        ``project_init``: of W. The public retrieval code starts every width at a deviation of 0.02; at small widths
        that leaves A V below the epsilon of its normalisation, and ``width ** -0.5`` learns much faster.
        ``out_bias``: of b_o; None for none.
        """
        self.heads, self.longest, self.dropout = heads, longest, dropout
        self.context, self.tensor = ALONE, UNDIVIDED
        self.values, self.keys = heads * v_width, heads * qk_width
        self.sections = (self.values, self.values, self.keys, self.keys)  # of W's outputs
        self.variant, self.alpha, self.true_length = variant, alpha, true_length
        self.norm = LayerNorm(
            width,
            epsilon=EPSILON,
            use_scale=variant.affine,
            use_bias=variant.affine,
            use_fast_variance=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.project = Linear(
            width,
            2 * (self.values + self.keys),
            use_bias=variant.project_bias,
            kernel_init=project_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.bias = RelativeBias(longest, rngs=rngs) if variant.relative_bias else None
        self.out_norm = OutputNorm(heads, v_width, affine=variant.affine, grouped=variant.group_norm)
        self.out = Linear(
            (3 if variant.concat else 1) * self.values,
            width,
            use_bias=out_bias is not None,
            kernel_init=jax.nn.initializers.glorot_uniform(),
            bias_init=out_bias or jax.nn.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, plan: Plan, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D], the pairs of its tokens -> [B, T, D]; dropout is on when ``rngs`` is given."""
        gate, v, q, k = self.projections(x)
        length = plan.tokens.segment.shape[1]
        attended = self.context.attend(functools.partial(self._attended, plan), q, k, v, length)
        return self.merge(x, gate, attended, rngs=rngs, part=self.context.tokens(length))

    def _attended(self, plan: Plan, q: Heads, k: Heads, v: Heads) -> jax.Array:
        attended = hstu_attention(q, k, v, plan, **self.attention())
        if not self.true_length:
            return attended
        scale = self.longest / sequence_lengths(plan.tokens.segment)
        return (attended * scale[..., None, None]).astype(attended.dtype)

    def attention(self) -> dict[str, Any]:
        """The arguments of `hstu_attention` that are the block's own."""
        own = {"max_len": self.longest, "alpha": self.alpha}
        if self.bias is None:
            return own
        position, time = (self.tensor.enter(table[...]) for table in (self.bias.position, self.bias.time))
        return own | {"position_bias": position, "time_bias": time}

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
            **self.attention(),
            one_request=one_request,
        )
        return self.merge(x, gate, attended), own

    def projections(self, x: jax.Array) -> tuple[jax.Array, Columns, Columns, Columns]:
        """x [..., T, D] -> U [..., T, H * Dv] and V, Q, K [..., T, H, Dv or Dqk], columns of one array; H: the
        device's heads."""
        mixed = self.project(self.tensor.enter(self.norm(x)))
        if not self.variant.gate_only:
            mixed = jax.nn.silu(mixed)
        heads, values, keys = map(self.tensor.share, (self.heads, self.values, self.keys))
        v = Columns(mixed, values, heads, values // heads)
        q = Columns(mixed, 2 * values, heads, keys // heads)
        k = Columns(mixed, 2 * values + keys, heads, keys // heads)
        gate = mixed[..., :values]
        return (jax.nn.silu(gate) if self.variant.gate_only else gate), v, q, k

    def merge(
        self,
        x: jax.Array,
        gate: jax.Array,
        attended: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        part: Part | None = None,
    ) -> jax.Array:
        """x [..., T, D], U [..., T, H * Dv], A V [..., T, H, Dv] -> the block's output [..., T, D]; ``part``: which of
        a row's tokens these are, None for all."""
        variant, flat = self.variant, attended.reshape(gate.shape)
        if not (variant.affine or variant.group_norm or variant.concat or self.tensor.size > 1):
            key = rngs.dropout() if rngs is not None and self.dropout else None
            return x + self.out(gated_norm(flat, gate, rate=self.dropout, key=key, part=part, eps=EPSILON))
        gated = gate * self.out_norm(attended, self.tensor).astype(gate.dtype)
        joined = jnp.concatenate([gate, flat, gated], axis=-1) if variant.concat else gated
        return x + self.out.summed(dropout(joined, self.dropout, rngs, part, self.tensor), self.tensor)

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost over ``tokens`` tokens of which ``pairs`` (query, key) pairs are visible."""
        item = jnp.dtype(self.project.dtype or jnp.float32).itemsize
        after = self.values if self.variant.gate_only else 2 * (self.values + self.keys)
        kept = tokens * (2 * (self.values + self.keys) + after + self.values) * item  # before and after SiLU; A V
        divided = self.tensor.size
        return total(
            [
                self.norm.cost(tokens),
                self.project.cost(tokens).among(divided, activations=False),
                Cost() if self.bias is None else self.bias.cost(),
                Cost(flops=2.0 * pairs * (self.keys + self.values), activation_bytes=float(kept)).among(divided),
                self.out_norm.cost(),
                self.out.cost(tokens).among(divided),
                self.context.cost(tokens * item / divided, (self.keys, self.keys, self.values, self.values)),
                self.tensor.cost(tokens * item * self.out.out_features, forward=1, backward=1),
                Cost() if self.variant.group_norm else self.tensor.cost(4.0 * tokens, forward=2, backward=2),
            ]
        )


def sequence_lengths(segment: jax.Array) -> jax.Array:
    """segment [B, T] -> float32 [B, T]: how many tokens of its row have the token's own segment."""
    return jnp.sum(segment[:, :, None] == segment[:, None, :], axis=2, dtype=jnp.float32)


class OutputNorm(nnx.Module):
    """What HSTU does to A V: layer normalisation over all heads together, or ``grouped`` over each alone.

    ``affine``: a scale and a bias, [H * Dv], or [H] if ``grouped`` (PyTorch's group norm of H channels of Dv places).
    """

    def __init__(self, heads: int, width: int, *, affine: bool, grouped: bool):
        self.grouped = grouped
        size = heads if grouped else heads * width
        self.scale = nnx.Param(jnp.ones(size)) if affine else None
        self.bias = nnx.Param(jnp.zeros(size)) if affine else None

    def __call__(self, attended: jax.Array, tensor: Tensor = UNDIVIDED) -> jax.Array:
        """[..., H, Dv] -> [..., H * Dv], at least float32; the devices of ``tensor`` may have a part of the heads each,
        without an affine part."""
        x = attended.astype(jnp.promote_types(attended.dtype, jnp.float32))
        axes, over = ((-1,), UNDIVIDED) if self.grouped else ((-2, -1), tensor)
        centred = x - over.mean(x, axes)
        y = centred * jax.lax.rsqrt(over.mean(centred * centred, axes) + EPSILON)
        if self.scale is not None and self.bias is not None:
            scale, bias = (p[...].reshape(x.shape[-2], -1) for p in (self.scale, self.bias))
            y = y * scale + bias
        return y.reshape(*x.shape[:-2], -1)

    def cost(self) -> Cost:
        """Parameters; its output is counted by the map that reads it."""
        return Cost(dense_params=0 if self.scale is None or self.bias is None else self.scale.size + self.bias.size)
