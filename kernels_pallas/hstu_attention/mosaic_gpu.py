"""HSTU attention on Hopper GPUs: operands in bfloat16, sums in float32, block-sparse, deterministic, without atomics.

Backward recomputes scores in one kernel by queries (dQ) and one by keys (dK, dV). Kernels
of this kind cannot gather: XLA looks the bias up for the listed tiles, all heads read the same tiles, and a last kernel
returns the gradient of each tile summed over the heads, which XLA reduces into the tables.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention import mosaic_gpu_kernels as kernels
from kernels_pallas.hstu_attention import mosaic_gpu_lists as lists
from kernels_pallas.hstu_attention.mosaic_gpu_tables import Tables, bias_tiles, table_gradients
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens
from kernels_pallas.hstu_attention.varying import varying_like

_MOST_FEATURES = 256
# Heads of up to so many features meet 128 keys at a time instead of 64: a left operand in shared memory takes
# bandwidth that more columns share. Beyond, or with tiles of the bias, two stages of so many keys do not fit.
_MOST_WIDE_FEATURES = 128
# What one row of the tiles of shared memory holds, 128 bytes, and the rows of such a tile.
_SWIZZLED_FEATURES, _TILED_TOKENS = 64, 8


def prepare(tokens: Tokens, positions: int, buckets: int) -> lists.Prepared:
    """Block lists and token fields; lists of other shapes than a call needs vanish under jit."""
    return lists.prepare(tokens)


class _Rule(NamedTuple):
    alpha: float
    factor: float  # on the output, one over the divisor


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: _Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    prepared: lists.Prepared,
) -> jax.Array:
    """Attention of q, k, v [B, T, H, D], whose padding is zero."""
    return _output(rule, q, k, v, Tables(position_bias, time_bias), prepared)


# Compiled functions of their own: layers of one shape share one lowering, and so each kernel is compiled once.
@functools.partial(jax.jit, static_argnums=(0,))
def _output(
    rule: _Rule, q: jax.Array, k: jax.Array, v: jax.Array, tables: Tables, prepared: lists.Prepared
) -> jax.Array:
    operands = (q, k, v, prepared.fields)
    if tables.empty:
        wide = q.shape[3] <= _MOST_WIDE_FEATURES
        chosen, inner = (prepared.wide, lists.WIDE) if wide else (prepared.queries, lists.NARROW)
        out = kernels.forward(*operands, chosen, None, inner=inner, **rule._asdict())
    else:

        def run(wave: lists.Lists, own: int) -> jax.Array:
            bias = bias_tiles(prepared.marks, wave.tiles, tables, query_axis=2, dtype=q.dtype)
            return kernels.forward(*operands, wave, bias, inner=lists.NARROW, **rule._asdict())

        out = lists.in_waves(run, prepared.queries)
    return varying_like(out[:, : q.shape[1]], q)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, lists.Prepared]


def _attend_forward(
    rule: _Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    prepared: lists.Prepared,
) -> tuple[jax.Array, _Residuals]:
    residuals = (q, k, v, position_bias, time_bias, prepared)
    return _attend(rule, *residuals), residuals


def _attend_backward(rule: _Rule, residuals: _Residuals, d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    return *_gradients(rule, residuals, d_out), None


@functools.partial(jax.jit, static_argnums=(0,))
def _gradients(rule: _Rule, residuals: _Residuals, d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, position_bias, time_bias, prepared = residuals
    length = q.shape[1]
    g = jnp.where(_real(prepared, length), d_out, 0)
    operands = (q, k, v, g, prepared.fields)
    tables = Tables(position_bias, time_bias)
    options = rule._asdict()
    if tables.empty:
        d_q = kernels.query_gradient(*operands, prepared.queries, None, **options)
        d_k, d_v = kernels.key_gradients(*operands, prepared.keys, None, **options)
        d_tables = tables
    else:

        def by_query(wave: lists.Lists, own: int) -> tuple[jax.Array, Tables]:
            bias = bias_tiles(prepared.marks, wave.tiles, tables, query_axis=2, dtype=q.dtype)
            d_q = kernels.query_gradient(*operands, wave, bias, **options)
            tiles = wave.tiles[:, :own]
            d_bias = kernels.bias_gradient(*operands, tiles, bias, **options)
            return d_q, table_gradients(prepared.marks, tiles, tables, d_bias)

        def by_key(wave: lists.Lists, own: int) -> tuple[jax.Array, jax.Array]:
            bias = bias_tiles(prepared.marks, wave.tiles, tables, query_axis=3, dtype=q.dtype)
            return kernels.key_gradients(*operands, wave, bias, **options)

        d_q, d_tables = lists.in_waves(by_query, prepared.queries)
        d_k, d_v = lists.in_waves(by_key, prepared.keys)
    found = (*(d[:, :length] for d in (d_q, d_k, d_v)), *d_tables)
    return tuple(None if d is None else varying_like(d, q) for d in found)


_attend.defvjp(_attend_forward, _attend_backward)


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
    _check_served(q, k, v)
    length, prepared = q.shape[1], plan.prepared["mosaic_gpu"]
    features = max(q.shape[3], v.shape[3])
    features += -features % _SWIZZLED_FEATURES
    real = _real(prepared, length)
    # XLA merges this with whatever computes q, k and v. Zeros in padding keep 0 · NaN out of the products: masking
    # the weights would not, and cleaning blocks in shared memory would cost the warpgroups a barrier per block.
    operands = [jnp.where(real, varying_like(x, q, k, v, real), 0) for x in (q, k, v)]
    short = -length % _TILED_TOKENS
    operands = [jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, features - x.shape[3]))) for x in operands]
    tables = [None if table is None else varying_like(table, operands[0]) for table in (position_bias, time_bias)]
    out = _attend(_Rule(alpha, 1 / divisor), *operands, *tables, prepared)
    return out[:, :length, :, : v.shape[3]]


def _check_served(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError with the reason for what the kernels cannot do."""
    if {q.dtype, k.dtype, v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"computes in bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}")
    if max(q.shape[3], v.shape[3]) > _MOST_FEATURES:
        raise NotImplementedError(f"heads of at most {_MOST_FEATURES} features, got {max(q.shape[3], v.shape[3])}")
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        raise NotImplementedError("needs a Hopper GPU (compute capability 9.0)")


def _real(prepared: lists.Prepared, length: int) -> jax.Array:
    """bool [B, length, 1, 1], False for padding."""
    return prepared.fields[:, 4, :length, None, None] >= 0
