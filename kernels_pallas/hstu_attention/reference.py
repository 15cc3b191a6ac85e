"""Dense attention written as its definition: the oracle of every other backend. Memory is O(B·H·T²)."""

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.buckets import time_bucket
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens, visible


def prepare(tokens: Tokens, positions: int, buckets: int) -> None:
    """Nothing is shared between layers: every call states the whole definition."""


def relative_bias(
    tokens: Tokens, position_bias: jax.Array | None, time_bias: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """The bias [B, T, T] that all heads share, from the tables of positions [2n - 1] and of time buckets."""
    bias = jnp.zeros((*tokens.segment.shape, tokens.segment.shape[-1]), dtype)
    if position_bias is not None:
        reach = (position_bias.shape[0] - 1) // 2  # n - 1
        position = tokens.order if tokens.position is None else tokens.position
        distance = position[:, None, :] - position[:, :, None]
        bias += position_bias.astype(dtype)[jnp.clip(distance, -reach, reach) + reach]
    if time_bias is not None:
        bucket = time_bucket(tokens.query_time[:, :, None], tokens.key_time[:, None, :])
        bias += time_bias.astype(dtype)[jnp.minimum(bucket, time_bias.shape[0] - 1)]
    return bias


def _scores(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    scale: float,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores [B, H, T, T] in at least float32, the mask [B, 1, T, T], and v with padding zeroed."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    # Padding may hold anything, NaN included; zero it before it meets a product.
    real = (plan.tokens.segment != 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0).astype(dtype) for x in (q, k, v))
    scores = scale * jnp.einsum("bihd,bjhd->bhij", q, k)
    scores += relative_bias(plan.tokens, position_bias, time_bias, dtype)[:, None]
    return scores, visible(plan.tokens)[:, None], v


def _mixed(weights: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    """weights · v as [B, T, H, Dv]; the select also keeps the cotangent of padding rows out of the backward pass."""
    real = (plan.tokens.segment != 0)[:, :, None, None]
    return jnp.where(real, jnp.einsum("bhij,bjhd->bihd", weights, v), 0)


def hstu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    *,
    divisor: float,
    alpha: float,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> jax.Array:
    """See `api.hstu_attention`."""
    scores, mask, v_clean = _scores(q, k, v, plan, alpha, position_bias, time_bias)
    weights = jnp.where(mask, jax.nn.silu(scores), 0) / divisor
    return _mixed(weights, v_clean, plan).astype(v.dtype)


def softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    *,
    scale: float,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    rate: float,
    keep: jax.Array | None,
) -> jax.Array:
    """See `api.softmax_attention`; ``keep`` bool [B, H, T, T], the weights that dropout leaves."""
    scores, mask, v_clean = _scores(q, k, v, plan, scale, position_bias, time_bias)
    weights = jax.nn.softmax(scores, axis=-1, where=mask)
    weights = jnp.where(mask, weights, 0)  # a row that sees nothing is 0/0 above
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - rate), 0)
    return _mixed(weights, v_clean, plan).astype(v.dtype)
