"""Blocked attention in plain XLA: the fast path on a CPU, and the fallback everywhere else.

Short rows: the tokens are cut into static blocks of queries; each block meets only its causal prefix, forward and
backward. Scores are recomputed block by block from q and k; of size T × T there is only the plan, small integers shared
by all layers. Long rows go to `xla_tiles`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention import xla_tiles
from kernels_pallas.hstu_attention.codes import BLOCK, joint_table, pair_codes, row_blocks, tables
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens
from kernels_pallas.hstu_attention.xla_tiles import HIDDEN, Rule, Tiles, silu
from kernels_pallas.target import target

# Scores of one block and chunk, all heads together, in elements: 1 MiB in float32.
_TILE_ELEMENTS = 2**18
# Longest row worked on whole. Measured with both biases: at 768 tokens a layer takes about as long as by tiles, and
# all layers share the codes; at 1,024 tiles take 0.6 of the time. Each 64 rows unrolled add 0.4 s of compilation.
LONGEST_ROW = 768


def prepare(tokens: Tokens, positions: int, buckets: int) -> tuple[jax.Array, ...] | Tiles:
    """Codes [B, rows, keys] of each block of query rows against its keys: the causal prefix, or all of them where a
    context prefix looks ahead. For long rows the tiles with work."""
    length = tokens.segment.shape[1]
    if length > LONGEST_ROW:
        return xla_tiles.prepare(tokens)
    reach = tables(tokens, positions, buckets)
    ahead = tokens.high is not None
    found = tuple(
        pair_codes(tokens, rows, slice(0, length if ahead else rows.stop), reach) for rows in row_blocks(length)
    )
    return jax.lax.optimization_barrier(found)  # or XLA's CPU computes them again in every layer that reads them


class _Inputs(NamedTuple):
    """What a chunk of rows is computed from; every leaf has the batch as its first axis."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    real: jax.Array  # bool [B, T], False for padding
    codes: tuple[jax.Array, ...]
    keep: jax.Array | None  # bool [B, H, T, T], the weights that dropout leaves


def _weigh(rule: Rule, scores: jax.Array) -> jax.Array:
    """Weights [..., rows, keys] from biased, masked scores."""
    if rule.kind == "silu":
        return silu(scores)[0]
    top = scores.max(-1, keepdims=True)
    raised = jnp.where(top > 0.5 * HIDDEN, jnp.exp(scores - top), 0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1)  # a row that sees itself sums to at least 1


def _pull(rule: Rule, scores: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights, and the cotangent of the scores given the weights' cotangent ``upstream``."""
    if rule.kind == "silu":
        weights, slope = silu(scores)
        return weights, upstream * slope
    weights = _weigh(rule, scores)
    mean = (weights * upstream).sum(-1, keepdims=True)
    return weights, weights * (upstream - mean)


def _dropped(rule: Rule, weights: jax.Array, keep: jax.Array | None, rows: slice) -> jax.Array:
    """Dropout of the weights [b, H, rows, keys] of one block; it is its own transpose."""
    if keep is None:
        return weights
    return jnp.where(keep[:, :, rows, : weights.shape[-1]], weights / (1 - rule.rate), 0)


def _chunk_rows(batch: int, heads: int, length: int) -> int:
    """Rows of the batch worked on at a time, a divisor of ``batch``.

    On a CPU the score tiles of a chunk must stay in the second-level caches: twice the speed of the whole batch at
    once, which goes through memory for every elementwise step. Elsewhere the whole batch is one chunk.
    """
    if target() != "cpu":
        return batch
    tile = max(1, heads * min(BLOCK, length) * length)
    fitting = max(1, _TILE_ELEMENTS // tile)
    return max((rows for rows in range(1, min(fitting, batch) + 1) if batch % rows == 0), default=1)


def _chunked(arrays: Any, rows: int) -> Any:
    """Splits the leading axis B of every leaf into [B / rows, rows]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // rows, rows, *x.shape[1:]), arrays)


def _clean(x: jax.Array, real: jax.Array) -> jax.Array:
    """[b, T, H, D] with padding tokens zeroed, whatever they hold (NaN included), in at least float32."""
    return jnp.where(real[:, :, None, None], x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))


def _features_first(x: jax.Array) -> jax.Array:
    """[b, T, H, D] -> [b, H, D, T].

    With tokens innermost the small products of a block have the orientation that XLA's CPU matrix products run two
    to four times faster than the others.
    """
    return x.transpose(0, 2, 3, 1)


def _tokens_first(x: jax.Array) -> jax.Array:
    """[b, H, D, T] -> [b, T, H, D]."""
    return x.transpose(0, 3, 1, 2)


def _block_scores(rule: Rule, q: jax.Array, k_t: jax.Array, table: jax.Array, code: jax.Array) -> jax.Array:
    """Scores [b, H, rows, keys] of one block from q [b, H, rows, D], k_t [b, H, D, keys], code [b, rows, keys]."""
    bias = table.at[code].get(mode="promise_in_bounds")
    return rule.scale * (q @ k_t) + bias[:, None]


def _mixed(weights: jax.Array, v_t: jax.Array) -> jax.Array:
    """[b, H, Dv, rows] from weights [b, H, rows, keys] and v_t [b, H, Dv, keys].

    XLA's CPU adds the terms of a product one after the other; in two halves they lose about half as much to rounding.
    """
    half = v_t.shape[-1] // 2
    near, far = slice(half, None), slice(0, half)
    products = (jnp.einsum("bhdj,bhij->bhdi", v_t[..., x], weights[..., x]) for x in (near, far))
    return functools.reduce(jnp.add, products)


def _forward_chunk(rule: Rule, table: jax.Array, inputs: _Inputs) -> jax.Array:
    """Output [b, T, H, Dv] for a chunk of rows."""
    real, codes = inputs.real, inputs.codes
    q = _clean(inputs.q, real).transpose(0, 2, 1, 3)
    k_t, v_t = (_features_first(_clean(x, real)) for x in (inputs.k, inputs.v))
    out = []
    for rows, code in zip(row_blocks(q.shape[2]), codes):
        columns = slice(0, code.shape[-1])
        scores = _block_scores(rule, q[:, :, rows], k_t[..., columns], table, code)
        weights = _dropped(rule, _weigh(rule, scores), inputs.keep, rows)
        out.append(_mixed(weights, v_t[..., columns]))
    result = _tokens_first(jnp.concatenate(out, axis=3))
    return jnp.where(real[:, :, None, None], result / rule.divisor, 0).astype(inputs.v.dtype)


def _backward_chunk(
    rule: Rule, table: jax.Array, d_table: jax.Array, inputs: _Inputs, d_out: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Cotangents of q, k, v for a chunk of rows, and ``d_table`` with the chunk's share added."""
    real, codes = inputs.real, inputs.codes
    q_t, k_t, v_t = (_features_first(_clean(x, real)) for x in (inputs.q, inputs.k, inputs.v))
    g_t = _features_first(_clean(d_out, real) / rule.divisor)
    q, g = jnp.swapaxes(q_t, 2, 3), jnp.swapaxes(g_t, 2, 3)
    d_q, d_k, d_v = [], jnp.zeros_like(k_t), jnp.zeros_like(v_t)
    for rows, code in zip(row_blocks(q.shape[2]), codes):
        columns = slice(0, code.shape[-1])
        scores = _block_scores(rule, q[:, :, rows], k_t[..., columns], table, code)
        upstream = _dropped(rule, g[:, :, rows] @ v_t[..., columns], inputs.keep, rows)
        weights, d_scores = _pull(rule, scores, upstream)
        weights = _dropped(rule, weights, inputs.keep, rows)
        # Heads are added one by one: as a chain of sums it fuses, as a reduction it would be a pass of its own.
        d_bias = functools.reduce(jnp.add, (d_scores[:, head] for head in range(q.shape[1])))
        d_table = d_table.at[code].add(d_bias, mode="promise_in_bounds")
        d_q.append(jnp.einsum("bhdj,bhij->bhdi", k_t[..., columns], d_scores))
        d_k = d_k.at[..., columns].add(jnp.einsum("bhdi,bhij->bhdj", q_t[..., rows], d_scores))
        d_v = d_v.at[..., columns].add(jnp.einsum("bhdi,bhij->bhdj", g_t[..., rows], weights))
    wanted = (rule.scale * jnp.concatenate(d_q, axis=3), rule.scale * d_k, d_v)
    d_qkv = tuple(
        jnp.where(real[:, :, None, None], _tokens_first(d), 0).astype(x.dtype)
        for d, x in zip(wanted, (inputs.q, inputs.k, inputs.v))
    )
    return d_table, (d_qkv[0], d_qkv[1], d_qkv[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    real: jax.Array,
    codes: tuple[jax.Array, ...],
    keep: jax.Array | None,
) -> jax.Array:
    """Attention of q, k [B, T, H, D] and v [B, T, H, Dv] under the joint table: [B, T, H, Dv]."""
    rows = _chunk_rows(q.shape[0], q.shape[2], q.shape[1])
    inputs = _chunked(_Inputs(q, k, v, real, codes, keep), rows)
    return jax.lax.map(lambda chunk: _forward_chunk(rule, table, chunk), inputs).reshape(v.shape)


_Residuals = tuple[_Inputs, jax.Array]


def _attend_forward(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    real: jax.Array,
    codes: tuple[jax.Array, ...],
    keep: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    return _attend(rule, q, k, v, table, real, codes, keep), (_Inputs(q, k, v, real, codes, keep), table)


def _attend_backward(
    rule: Rule, residuals: _Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None, None, None]:
    inputs, table = residuals
    batch, length, heads, _ = inputs.q.shape
    chunks = _chunked((inputs, d_out), _chunk_rows(batch, heads, length))
    d_table, d_qkv = jax.lax.scan(
        lambda carry, chunk: _backward_chunk(rule, table, carry, *chunk), jnp.zeros_like(table), chunks
    )
    d_q, d_k, d_v = (d.reshape(batch, *d.shape[2:]) for d in d_qkv)
    return d_q, d_k, d_v, d_table, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    keep: jax.Array | None = None,
) -> jax.Array:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    reach = tables(plan.tokens, plan.positions, plan.buckets)
    table = joint_table(reach, position_bias, time_bias, HIDDEN, dtype)
    prepared = plan.prepared["xla"]
    if isinstance(prepared, Tiles):
        if keep is not None:
            raise NotImplementedError(f"drops weights of rows up to {LONGEST_ROW} tokens, got {q.shape[1]}")
        return xla_tiles.attend(rule, reach, q, k, v, table, prepared)
    return _attend(rule, q, k, v, table, plan.tokens.segment != 0, prepared, keep)


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
    return _run(Rule("silu", alpha, divisor), q, k, v, plan, position_bias, time_bias)


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
    """See `api.softmax_attention`."""
    return _run(Rule("softmax", scale, 1.0, rate), q, k, v, plan, position_bias, time_bias, keep)
