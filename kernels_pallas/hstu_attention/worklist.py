"""Which tiles of the square of pairs hold anything: the block-sparse work list of the tiled backends.

Built on the device from token attributes, once per step for all layers. A tile is listed when the summaries of its
query block and its key block leave a visible pair possible, and is `full` when they leave no hidden one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.tokens import Keys, Queries

_HIGHEST = jnp.iinfo(jnp.int32).max


class WorkList(NamedTuple):
    """Tiles in the order of work; entries past ``size`` repeat the last one, so that they load nothing new.

    Attributes:
      row, query, key: int32 [W], the row of the batch and the block indices of a tile.
      full: bool [W], every pair of the tile is visible.
      first, last: bool [W], the tile is the first or last of its row of tiles (`by="query"`: same row and query
        block; `by="key"`: same row and key block).
      size: int32 scalar, tiles listed. Every query block (key block) of every row has at least one.
    """

    row: jax.Array
    query: jax.Array
    key: jax.Array
    full: jax.Array
    first: jax.Array
    last: jax.Array
    size: jax.Array


def work_list(queries: Queries, keys: Keys, block_q: int, block_k: int, *, by: str = "query") -> WorkList:
    """Lists the tiles of queries [B, T] against keys [B, N], grouped ``by`` "query" or "key" blocks, in rising order.

    W = B · ceil(T / block_q) · ceil(N / block_k) entries; T, N and B must be positive.
    """
    some, full = tile_kinds(queries, keys, block_q, block_k)
    some = listed_tiles(some, by=by)
    nq, nk = some.shape[1:]
    order, minor = (some, nk) if by == "query" else (some.transpose(0, 2, 1), nq)
    flat = order.reshape(-1)
    count = flat.sum(dtype=jnp.int32)
    places = jnp.nonzero(flat, size=flat.shape[0], fill_value=0)[0].astype(jnp.int32)
    final = places[jnp.maximum(count - 1, 0)]
    places = jnp.where(jnp.arange(places.shape[0]) < count, places, final)
    group, inner = places // minor, places % minor
    outer = order.shape[1]
    row, block = group // outer, group % outer
    changes = group[1:] != group[:-1]
    ones = jnp.ones(1, bool)
    first = jnp.concatenate([ones, changes])
    last = jnp.concatenate([changes, ones]) | (jnp.arange(places.shape[0]) == count - 1)
    query, key = (block, inner) if by == "query" else (inner, block)
    return WorkList(row, query, key, full[row, query, key], first, last, count)


def listed_tiles(some: jax.Array, *, by: str) -> jax.Array:
    """The tiles that `work_list` lists, bool [B, query blocks, key blocks], from those that hold something.

    A block with nothing to do is listed once all the same, since its output must be written (with zeros): query
    blocks always (their output, or in the backward pass their gradient), key blocks when listing by them.
    """
    lonely = ~some.any(2)
    listed = some.at[:, :, 0].set(some[:, :, 0] | lonely)
    if by == "key":
        lonely = ~some.any(1)
        listed = listed.at[:, 0, :].set(listed[:, 0, :] | lonely)
    return listed


def tile_kinds(queries: Queries, keys: Keys, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """(may hold a visible pair, holds visible pairs alone), each bool [B, query blocks, key blocks]."""

    def low(x: jax.Array, block: int, fill: int) -> jax.Array:
        return _blocks(x, block, fill).min(-1)

    def high(x: jax.Array, block: int, fill: int) -> jax.Array:
        return _blocks(x, block, fill).max(-1)

    # Padding queries have an empty interval: they must not widen the interval of their block.
    asks = queries.low < queries.high
    widest = (
        low(jnp.where(asks, queries.low, _HIGHEST), block_q, _HIGHEST)[:, :, None],
        high(jnp.where(asks, queries.high, 0), block_q, 0)[:, :, None],
        high(jnp.where(asks, queries.until, 0), block_q, 0)[:, :, None],
    )
    narrowest = (
        high(queries.low, block_q, _HIGHEST)[:, :, None],
        low(queries.high, block_q, 0)[:, :, None],
        low(queries.until, block_q, 0)[:, :, None],
    )
    rank_low = low(keys.rank, block_k, -1)[:, None]
    rank_high = high(keys.rank, block_k, -1)[:, None]
    rank_real = low(jnp.where(keys.rank >= 0, keys.rank, _HIGHEST), block_k, _HIGHEST)[:, None]
    begin = jnp.arange(rank_low.shape[-1], dtype=jnp.int32) * block_k
    end = begin + block_k - 1
    some = (rank_high >= widest[0]) & (rank_real < widest[1]) & (begin < widest[2])
    self_low = low(jnp.where(queries.self >= 0, queries.self, _HIGHEST), block_q, _HIGHEST)[:, :, None]
    self_high = high(queries.self, block_q, -1)[:, :, None]
    some |= (self_high >= begin) & (self_low <= end)
    full = (rank_low >= narrowest[0]) & (rank_high < narrowest[1]) & (end < narrowest[2])
    return some, full


def _blocks(x: jax.Array, block: int, fill: int) -> jax.Array:
    """[B, T] -> [B, blocks, block], the last block filled up."""
    short = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, short)), constant_values=fill).reshape(x.shape[0], -1, block)
