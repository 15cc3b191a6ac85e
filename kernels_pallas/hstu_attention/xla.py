"""Blocked attention in plain XLA: the fast path on a CPU, and the fallback everywhere else.

Query rows are cut into static blocks; each block meets only its causal prefix, forward and backward. Nothing of size
T × T is kept for the backward pass: scores are recomputed block by block from q and k.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.plan import Plan, joint_table, row_blocks

_HIDDEN = -1e30  # score of a masked pair: SiLU and its slope are exactly 0 there, and so is exp after a row maximum


class Rule(NamedTuple):
    """How products become weights; the only place where the two operations differ."""

    kind: Literal["silu", "softmax"]
    scale: float


def _weigh(rule: Rule, scores: jax.Array) -> jax.Array:
    """Weights [..., rows, keys] from biased, masked scores."""
    if rule.kind == "silu":
        return 0.5 * scores * (1 + jnp.tanh(0.5 * scores))
    top = scores.max(-1, keepdims=True)
    raised = jnp.where(top > 0.5 * _HIDDEN, jnp.exp(scores - top), 0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1)  # a row that sees itself sums to at least 1


def _pull(rule: Rule, scores: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights, and the cotangent of the scores given the weights' cotangent ``upstream``."""
    weights = _weigh(rule, scores)
    if rule.kind == "silu":
        sigmoid = 0.5 * (1 + jnp.tanh(0.5 * scores))
        return weights, upstream * sigmoid * (1 + scores - weights)
    mean = (weights * upstream).sum(-1, keepdims=True)
    return weights, weights * (upstream - mean)


def _block_scores(rule: Rule, q: jax.Array, k_t: jax.Array, table: jax.Array, code: jax.Array) -> jax.Array:
    """Scores [B, H, rows, keys] of one block from q [B, H, rows, D], k_t [B, H, D, keys], code [B, rows, keys]."""
    bias = table.at[code].get(mode="promise_in_bounds")
    return rule.scale * (q @ k_t) + bias[:, None]


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule, q_t: jax.Array, k_t: jax.Array, v_t: jax.Array, table: jax.Array, codes: tuple[jax.Array, ...]
) -> jax.Array:
    """Attention of q_t, k_t [B, H, D, T] and v_t [B, H, Dv, T] under the joint table: [B, H, Dv, T].

    Features come before tokens because the small products of a block then have the orientation that XLA's CPU
    matrix products run two to four times faster than the others.
    """
    q = _swap(q_t)
    out = []
    for rows, code in zip(row_blocks(q_t.shape[3]), codes):
        columns = slice(0, rows.stop)
        scores = _block_scores(rule, q[:, :, rows], k_t[..., columns], table, code)
        out.append(jnp.einsum("bhdj,bhij->bhdi", v_t[..., columns], _weigh(rule, scores)))
    return jnp.concatenate(out, axis=3) if out else jnp.zeros_like(v_t)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]


def _attend_forward(
    rule: Rule, q_t: jax.Array, k_t: jax.Array, v_t: jax.Array, table: jax.Array, codes: tuple[jax.Array, ...]
) -> tuple[jax.Array, _Residuals]:
    return _attend(rule, q_t, k_t, v_t, table, codes), (q_t, k_t, v_t, table, codes)


def _attend_backward(
    rule: Rule, residuals: _Residuals, d_out_t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    q_t, k_t, v_t, table, codes = residuals
    q, d_out = _swap(q_t), _swap(d_out_t)
    d_q, d_k, d_v, d_table = [], jnp.zeros_like(k_t), jnp.zeros_like(v_t), jnp.zeros_like(table)
    for rows, code in zip(row_blocks(q_t.shape[3]), codes):
        columns = slice(0, rows.stop)
        scores = _block_scores(rule, q[:, :, rows], k_t[..., columns], table, code)
        upstream = d_out[:, :, rows] @ v_t[..., columns]
        weights, d_scores = _pull(rule, scores, upstream)
        d_table = d_table.at[code].add(d_scores.sum(1), mode="promise_in_bounds")
        d_q.append(rule.scale * jnp.einsum("bhdj,bhij->bhdi", k_t[..., columns], d_scores))
        d_k = d_k.at[..., columns].add(rule.scale * jnp.einsum("bhdi,bhij->bhdj", q_t[..., rows], d_scores))
        d_v = d_v.at[..., columns].add(jnp.einsum("bhdi,bhij->bhdj", d_out_t[..., rows], weights))
    return jnp.concatenate(d_q, axis=3) if d_q else jnp.zeros_like(q_t), d_k, d_v, d_table, None


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    rule: Rule,
    factor: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> jax.Array:
    """Cleans padding, moves tokens innermost, attends, and multiplies the result by ``factor``."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    # Padding may hold anything, NaN included; zero it before it meets a product. The second where also keeps the
    # cotangent of padding rows out of the backward pass.
    real = (plan.tokens.segment != 0)[:, :, None, None]
    moved = [jnp.where(real, x, 0).astype(dtype).transpose(0, 2, 3, 1) for x in (q, k, v)]
    table = joint_table(position_bias, time_bias, _HIDDEN, dtype)
    out = _attend(rule, *moved, table, plan.codes).transpose(0, 3, 1, 2)
    return jnp.where(real, factor * out, 0).astype(v.dtype)


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
    return _run(Rule("silu", alpha), 1 / divisor, q, k, v, plan, position_bias, time_bias)


def softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    *,
    scale: float,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> jax.Array:
    """See `api.softmax_attention`."""
    return _run(Rule("softmax", scale), 1.0, q, k, v, plan, position_bias, time_bias)
