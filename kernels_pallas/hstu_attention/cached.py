"""Attention of new tokens to a cache of keys and values, for scoring: the rows of the full call that are asked for.

Pointwise attention has no softmax, so a query's output is a plain sum over the keys it sees: a rectangle of pairs with
the cache plus a square among the new tokens. Both are summed tile by tile; no row statistics are kept or merged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.api import Implementation, _names, hstu_attention
from kernels_pallas.hstu_attention.buckets import time_bucket
from kernels_pallas.hstu_attention.tokens import Keys, Queries, Tokens, attributes, sees
from kernels_pallas.hstu_attention.worklist import tile_kinds
from kernels_pallas.target import target

_BLOCK = 256  # queries and keys of a tile
_NOWHERE = jnp.iinfo(jnp.int32).max  # index of a key that nobody sees


class Scaled(NamedTuple):
    """Numbers of eight bits: ``values`` int8 [..., D] times ``scale`` float32 [..., 1]."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


def scaled(x: jax.Array) -> Scaled:
    """x [..., D] in eight bits, one scale per vector: off by at most 1 / 254 of the vector's largest magnitude."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return Scaled(jnp.round(x / scale).astype(jnp.int8), scale)


def widened(x: jax.Array | Scaled, dtype: jnp.dtype) -> jax.Array:
    """The numbers in ``dtype``, whatever they are kept in."""
    return x.values.astype(dtype) * x.scale.astype(dtype) if isinstance(x, Scaled) else x.astype(dtype)


def hstu_attention_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    cached_k: jax.Array | Scaled,
    cached_v: jax.Array | Scaled,
    cached_tokens: Tokens,
    *,
    max_len: float,
    alpha: float = 1.0,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    one_request: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """The last M rows of `hstu_attention` over rows of N cached and M new tokens, without the others.

    The new tokens may be candidates, further history (the rows agree with the full call's, so a cache can grow event
    by event), or both. Mask and biases are the full call's. What a context prefix looks ahead at is in its own rows:
    those change when history is appended and are not computed again here.

    Args:
      q, k: new tokens [B, M, H, Dqk].
      v: as q, with Dv.
      tokens: the new tokens' attributes, fields [B, M]; `split_tokens` cuts them from whole rows. They stand behind
        the cache: ``order`` and times go on from the cached tokens', and they see no key after themselves.
      cached_k: [B, N, H, Dqk], and ``cached_v`` [B, N, H, Dv]; may be of a narrower type than q, or `scaled`. Unused
        slots may lie anywhere and hold anything.
      cached_tokens: the cache's attributes, fields [B, N], segment 0 in unused slots. Of the times ``key_time`` counts.
      max_len, alpha, position_bias, time_bias: as in `hstu_attention`.
      one_request: promises that a row's new tokens are candidates of one request, padding last: of one position and
        one query time, so that the bias is looked up once per key, not once per pair.
      implementation: a name to insist on, a sequence of names to try in order, None for the best here.

    Returns:
      As v, in its dtype; new tokens that are padding get exact zeros. Forward only.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
      NotImplementedError: no chosen backend can serve the call, or it is differentiated.
    """
    _check(q, k, v, tokens, cached_k, cached_v, cached_tokens)
    for name, table in (("position_bias", position_bias), ("time_bias", time_bias)):
        if table is not None and (table.ndim != 1 or table.size == 0):
            raise ValueError(f"{name} must be a non-empty vector, got shape {table.shape}")
    if position_bias is not None and position_bias.shape[0] % 2 == 0:
        raise ValueError(f"position_bias must have an odd length 2n - 1, got {position_bias.shape[0]}")
    if max_len <= 0:
        raise ValueError(f"max_len must be positive, got {max_len}")
    names = _names(implementation)
    chosen = next((name for name in names if name in _OPERATIONS), None)
    if chosen is None:
        reasons = "; ".join(f"{name}: has no cached attention" for name in names)
        raise NotImplementedError(f"no backend can serve this cached attention: {reasons}")
    if v.size == 0:
        return jnp.zeros_like(v)
    inputs = _Inputs(q, k, v, tokens, cached_k, cached_v, cached_tokens, position_bias, time_bias)
    rule = {"divisor": max_len, "alpha": alpha, "one_request": one_request}
    return _forward_only(functools.partial(_OPERATIONS[chosen], **rule))(inputs)


def split_tokens(tokens: Tokens, cached: jax.Array, slots: int, new: int) -> tuple[Tokens, Tokens]:
    """Cuts whole rows into (new tokens [B, new], cached tokens [B, slots]), the arguments of `hstu_attention_cached`.

    The first ``cached[b]`` tokens of row b are in the cache, at its beginning; the next ``new`` ones are new.

    Args:
      tokens: attributes of the whole rows, fields [B, T], cached and new tokens one after the other.
      cached: int [B], at most ``slots``.
      slots, new: N and M; what the rows do not fill is padding.
    """

    def cut(index: jax.Array, real: jax.Array) -> Tokens:
        length = tokens.segment.shape[1]
        inside = jnp.clip(index, 0, max(length - 1, 0))
        found = jax.tree.map(lambda field: jnp.take_along_axis(field, inside, axis=1), tokens)
        return found._replace(segment=jnp.where(real & (index < length), found.segment, 0))

    cached = cached[:, None].astype(jnp.int32)
    place = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (cached.shape[0], slots))
    behind = cached + jnp.arange(new, dtype=jnp.int32)
    return cut(behind, behind >= 0), cut(place, place < cached)


class _Inputs(NamedTuple):
    """The arrays given to `hstu_attention_cached`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: Tokens
    cached_k: jax.Array | Scaled
    cached_v: jax.Array | Scaled
    cached_tokens: Tokens
    position_bias: jax.Array | None
    time_bias: jax.Array | None


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    cached_k: jax.Array | Scaled,
    cached_v: jax.Array | Scaled,
    cached_tokens: Tokens,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"expected q and k [B, M, H, Dqk] and v [B, M, H, Dv], got {q.shape}, {k.shape}, {v.shape}")
    if cached_k.ndim != 4 or cached_v.ndim != 4 or cached_k.shape[:3] != cached_v.shape[:3]:
        raise ValueError(f"expected a cache [B, N, H, Dqk] and [B, N, H, Dv], got {cached_k.shape}, {cached_v.shape}")
    for new, old in ((k, cached_k), (v, cached_v)):
        if (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
            raise ValueError(f"new tokens {new.shape} and the cache {old.shape} differ in more than their number")
    for part, shape in ((tokens, q.shape[:2]), (cached_tokens, cached_k.shape[:2])):
        shapes = {field.shape for field in part if field is not None}
        if shapes != {shape}:
            raise ValueError(f"token fields must have shape {shape}, got {sorted(shapes)}")


def _forward_only(operation: Callable[[_Inputs], jax.Array]) -> Callable[[_Inputs], jax.Array]:
    """The operation with a derivative that says there is none."""
    guarded = jax.custom_jvp(operation)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("hstu_attention_cached is forward only; differentiate hstu_attention over whole rows")

    return guarded


def _joined(cached: Tokens, new: Tokens) -> Tokens:
    """Attributes [B, N + M]."""
    return jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), _stated(cached), _stated(new))


def _stated(tokens: Tokens) -> Tokens:
    """The tokens with their defaults written out, so that two parts can be joined."""
    low = jnp.zeros_like(tokens.order) if tokens.low is None else tokens.low
    high, position = (tokens.order if field is None else field for field in (tokens.high, tokens.position))
    return tokens._replace(low=low, high=high, position=position)


def _reference(x: _Inputs, *, divisor: float, alpha: float, one_request: bool) -> jax.Array:
    """The definition: the full call's dense oracle, and its last rows. It trusts no promise."""
    slots = x.cached_k.shape[1]
    cached_k, cached_v = (widened(part, jnp.promote_types(x.q.dtype, jnp.float32)) for part in (x.cached_k, x.cached_v))
    out = hstu_attention(
        jnp.concatenate([jnp.zeros_like(cached_k), x.q], axis=1),
        jnp.concatenate([cached_k, x.k], axis=1),
        jnp.concatenate([cached_v, x.v], axis=1),
        _joined(x.cached_tokens, x.tokens),
        max_len=divisor,
        alpha=alpha,
        position_bias=x.position_bias,
        time_bias=x.time_bias,
        implementation="reference",
    )
    return out[:, slots:].astype(x.v.dtype)


class _Part(NamedTuple):
    """Keys that lie side by side, the cache or the new tokens: attributes [b, N], k and v [b, N, H, D]."""

    keys: Keys
    k: jax.Array | Scaled
    v: jax.Array | Scaled


_Bias = Callable[[Queries, Keys], jax.Array]


def _blocked(x: _Inputs, *, divisor: float, alpha: float, one_request: bool) -> jax.Array:
    """Tile by tile: memory O(M · block) beside the arguments, and tiles in which no query sees a key cost nothing.

    On a CPU the rows of the batch go one by one, each over its own tiles; elsewhere all rows go over the tiles that
    any of them needs.
    """
    slots = x.cached_k.shape[1]
    dtype = jnp.promote_types(x.q.dtype, jnp.float32)
    queries, keys = attributes(_joined(x.cached_tokens, x.tokens))
    asked = Queries(*(field[:, slots:] for field in queries))
    q = alpha * x.q.astype(dtype).transpose(0, 2, 1, 3)  # padding queries see no key: whatever they hold is masked
    parts = (
        _Part(Keys(*(field[:, :slots] for field in keys)), x.cached_k, x.cached_v),
        _Part(Keys(*(field[:, slots:] for field in keys)), x.k, x.v),
    )
    bias = functools.partial(
        _bias, position_bias=x.position_bias, time_bias=x.time_bias, one_request=one_request, dtype=dtype
    )

    def some_rows(rows: tuple[Queries, jax.Array, tuple[_Part, _Part]]) -> jax.Array:
        asked, q, (cache, new) = rows
        out = jnp.zeros((*q.shape[:2], x.v.shape[3], q.shape[2]), dtype)
        out = _add_tiles(out, asked, q, cache, bias)
        # In what follows an index counts from the first new token.
        asked = asked._replace(until=asked.until - slots, self=asked.self - slots)
        return _add_tiles(out, asked, q, new, bias)

    if target() == "cpu":
        one_by_one = jax.tree.map(lambda field: field[:, None], (asked, q, parts))
        out = jax.lax.map(some_rows, one_by_one)[:, 0]
    else:
        out = some_rows((asked, q, parts))
    return (out.transpose(0, 3, 1, 2) / divisor).astype(x.v.dtype)


def _add_tiles(out: jax.Array, asked: Queries, q: jax.Array, part: _Part, bias: _Bias) -> jax.Array:
    """out [b, H, Dv, M] with what q [b, H, M, D] gets from the keys of ``part`` added, one tile of pairs at a time."""
    length, total = q.shape[2], part.k.shape[1]
    if total == 0:
        return out
    block_q, block_k = min(_BLOCK, length), min(_BLOCK, total)
    listed = tile_kinds(asked, part.keys, block_q, block_k)[0].any(0)
    places = jnp.nonzero(listed.reshape(-1), size=listed.size, fill_value=0)[0].astype(jnp.int32)

    def add(step: jax.Array, out: jax.Array) -> jax.Array:
        # The last block begins early enough to be whole; what the block before it has done is left out.
        begin_q, begin_k = (places[step] // listed.shape[1]) * block_q, (places[step] % listed.shape[1]) * block_k
        row, column = jnp.minimum(begin_q, length - block_q), jnp.minimum(begin_k, total - block_k)
        rows = jax.tree.map(lambda field: jax.lax.dynamic_slice_in_dim(field, row, block_q, 1), asked)
        columns = jax.tree.map(lambda field: jax.lax.dynamic_slice_in_dim(field, column, block_k, 1), part)
        index = column + jnp.arange(block_k, dtype=jnp.int32)
        tile = _tile(
            rows,
            jax.lax.dynamic_slice_in_dim(q, row, block_q, 2),
            columns,
            jnp.where(index >= begin_k, index, _NOWHERE),
            bias,
        )
        tile = jnp.where(row + jnp.arange(block_q, dtype=jnp.int32) >= begin_q, tile, 0)
        done = jax.lax.dynamic_slice_in_dim(out, row, block_q, 3)
        return jax.lax.dynamic_update_slice_in_dim(out, done + tile, row, 3)

    return jax.lax.fori_loop(0, listed.sum(dtype=jnp.int32), add, out)


def _tile(asked: Queries, q: jax.Array, part: _Part, index: jax.Array, bias: _Bias) -> jax.Array:
    """Weights times values, [b, H, Dv, rows], of q [b, H, rows, D] and the keys at ``index``.

    Tokens are innermost in both products: the orientation that XLA's CPU products run fastest.
    """
    low, high, until, self = (field[:, :, None] for field in asked[:4])
    seen = sees(low, high, until, self, part.keys.rank[:, None], index)
    real = (part.keys.rank >= 0)[:, :, None, None]
    wide = (widened(field, q.dtype) for field in (part.k, part.v))
    k_t, v_t = (jnp.where(real, field, 0).transpose(0, 2, 3, 1) for field in wide)
    scores = q @ k_t + bias(asked, part.keys)[:, None]
    weights = jnp.where(seen[:, None], 0.5 * scores * (1 + jnp.tanh(0.5 * scores)), 0)
    return jnp.einsum("bhdj,bhij->bhdi", v_t, weights)


def _bias(
    asked: Queries,
    keys: Keys,
    *,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    one_request: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """The bias that the heads share, [b, rows, columns], of one row if all are alike, [1, 1, 1] without one."""
    bias = jnp.zeros((1, 1, 1), dtype)
    if one_request:
        asked = asked._replace(position=asked.position[:, :1], time=asked.time[:, :1])
    if position_bias is not None:
        reach = (position_bias.shape[0] - 1) // 2
        distance = keys.position[:, None] - asked.position[:, :, None]
        entry = jnp.clip(distance, -reach, reach) + reach
        bias = bias + position_bias.astype(dtype).at[entry].get(mode="promise_in_bounds")
    if time_bias is not None:
        entry = jnp.minimum(time_bucket(asked.time[:, :, None], keys.time[:, None]), time_bias.shape[0] - 1)
        bias = bias + time_bias.astype(dtype).at[entry].get(mode="promise_in_bounds")
    return bias


_OPERATIONS: dict[str, Callable[..., jax.Array]] = {"reference": _reference, "xla": _blocked}
