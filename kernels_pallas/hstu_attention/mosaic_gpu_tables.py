"""The bias of the tiles that the Hopper kernels work through, and the way back into the tables; all of it XLA.

Sums are in a fixed order, or of integers, so that results repeat bit for bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.hstu_attention.buckets import REACHABLE, thresholds, time_bucket, time_distance
from kernels_pallas.hstu_attention.mosaic_gpu_lists import NARROW, OUTER, Marks
from kernels_pallas.hstu_attention.varying import varying_like

_AT_ONCE = 8  # time buckets summed in one pass over the gradients of all tiles
_PARTS = 16  # tiles with unusual positions are worked through in parts of this share of all
_GROUPED = 8  # of these tiles, how many are added up in one table of integers
_DIAGONALS = OUTER + NARROW - 1


class Tables(NamedTuple):
    """The bias tables [2n - 1] and [buckets], each None if not in use."""

    position: jax.Array | None
    time: jax.Array | None

    @property
    def empty(self) -> bool:
        return self.position is None and self.time is None


def _blocks(x: jax.Array, tiles: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    """Tokens of each tile's outer block (axis -2) as [..., outer, 1], of its inner block (axis -1) as [..., 1, inner].

    ``x`` [B, T], ``tiles`` [..., 2], ``rows`` [...] or what broadcasts to it.
    """
    cut = x.reshape(x.shape[0], -1, OUTER if axis == -2 else NARROW)
    return jnp.expand_dims(cut[rows, jnp.maximum(tiles[..., axis], 0)], -3 - axis)


def _all_rows(tiles: jax.Array) -> jax.Array:
    return jnp.arange(tiles.shape[0])[:, None]


def bias_tiles(marks: Marks, tiles: jax.Array, tables: Tables, *, query_axis: int, dtype: jnp.dtype) -> jax.Array:
    """Half the bias of each pair of ``tiles`` [B, W, 2], as [B, W, outer, inner]; the kernels work on half scores.

    Queries run along ``query_axis``, 2 or 3. The sum of the two entries is rounded once, to the type of the operands.
    """
    query, key = (
        functools.partial(_blocks, tiles=tiles, rows=_all_rows(tiles), axis=a - 4) for a in (query_axis, 5 - query_axis)
    )
    places = []
    if tables.position is not None:
        places.append(_position_place(tables.position, key(marks.key_position) - query(marks.query_position)))
    if tables.time is not None:
        bucket = time_bucket(query(marks.query_time), key(marks.key_time))
        places.append(jnp.minimum(bucket, tables.time.shape[0] - 1))
    used = [0.5 * table.astype(jnp.float32) for table in tables if table is not None]
    entries = [table.at[place].get(mode="promise_in_bounds") for table, place in zip(used, places)]
    return sum(entries[1:], start=entries[0]).astype(dtype)


def _position_place(table: jax.Array, apart: jax.Array) -> jax.Array:
    """Index into the table [2n - 1] of a key ``apart`` places behind its query."""
    reach = (table.shape[0] - 1) // 2
    return jnp.clip(apart, -reach, reach) + reach


def table_gradients(marks: Marks, tiles: jax.Array, tables: Tables, d_bias: jax.Array) -> Tables:
    """Gradients of the tables, float32, from that of the bias of ``tiles`` [B, W, 2], float32 [B, W, queries, keys].

    Places of ``d_bias`` without a tile may hold anything.
    """
    d_bias = jnp.where(tiles[:, :, 0, None, None] >= 0, d_bias, 0)
    position = None if tables.position is None else _position_gradient(marks, tiles, tables.position, d_bias)
    time = None if tables.time is None else _time_gradient(marks, tiles, tables.time, d_bias)
    return Tables(position, time)


def _time_gradient(marks: Marks, tiles: jax.Array, table: jax.Array, d_bias: jax.Array) -> jax.Array:
    """A tile meets few buckets: each pass over all tiles sums the next eight of every tile's own."""
    buckets = min(table.shape[0], REACHABLE)
    shortest = np.zeros(buckets + _AT_ONCE, np.uint32)
    longest = np.zeros_like(shortest)  # past the last bucket nothing is between 1 and 0
    shortest[1:buckets], shortest[buckets:] = thresholds()[: buckets - 1], 1
    longest[: buckets - 1], longest[buckets - 1] = thresholds()[: buckets - 1] - 1, 2**32 - 1

    def distances() -> jax.Array:
        rows = _all_rows(tiles)
        times = _blocks(marks.query_time, tiles, rows, -2), _blocks(marks.key_time, tiles, rows, -1)
        return time_distance(*times)

    def bucket(distance: jax.Array) -> jax.Array:
        return (distance[..., None] >= shortest[1:buckets]).sum(-1, dtype=jnp.int32)

    counted = d_bias != 0
    nearest = jnp.where(counted, distances(), np.uint32(2**32 - 1)).min((2, 3))
    farthest = jnp.where(counted, distances(), np.uint32(0)).max((2, 3))
    begin, end = bucket(nearest), jnp.where(counted.any((2, 3)), bucket(farthest) + 1, 0)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        place = begin[..., None] + i * _AT_ONCE + jnp.arange(_AT_ONCE)
        low, high = (jnp.asarray(x)[jnp.minimum(place, buckets)][:, :, None, None] for x in (shortest, longest))
        distance = distances()
        inside = [(distance >= low[..., s]) & (distance <= high[..., s]) for s in range(_AT_ONCE)]
        sums = _sums([jnp.where(here, d_bias, 0) for here in inside])
        hit = place[..., None] == jnp.arange(table.shape[0])
        return total + jnp.where(hit, jnp.stack(sums, -1)[..., None], 0).sum((0, 1, 2))

    turns = jnp.maximum(end - begin + _AT_ONCE - 1, 0).max() // _AT_ONCE
    return lax.fori_loop(0, turns, add, varying_like(jnp.zeros(table.shape, jnp.float32), d_bias))


def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sums [B, W] of arrays [B, W, outer, inner]: one reduction, so that one pass over memory makes all of them."""
    zeros = [varying_like(jnp.zeros((), x.dtype), x) for x in arrays]
    return lax.reduce(arrays, zeros, lambda x, y: [a + b for a, b in zip(x, y)], (2, 3))


def _position_gradient(marks: Marks, tiles: jax.Array, table: jax.Array, d_bias: jax.Array) -> jax.Array:
    """Tokens that follow one another mostly have positions that do: then a diagonal of a tile is one entry.

    The others, such as candidates, which share a position, are few and looked up one by one.
    """
    rows = _all_rows(tiles)
    apart = _apart(marks, tiles, rows)
    usual = apart == _first_apart(tiles)[..., None, None] + jnp.arange(NARROW) - jnp.arange(OUTER)[:, None]
    along = _summed_diagonals(marks.key_position.shape[1], tiles, table, jnp.where(usual, d_bias, 0))
    return along + _one_by_one(marks, tiles, table, jnp.where(usual, 0, d_bias))


def _apart(marks: Marks, tiles: jax.Array, rows: jax.Array) -> jax.Array:
    """Position of the key less that of the query, [..., queries, keys]."""
    return _blocks(marks.key_position, tiles, rows, -1) - _blocks(marks.query_position, tiles, rows, -2)


def _first_apart(tiles: jax.Array) -> jax.Array:
    """The index of a tile's first key less that of its first query."""
    return tiles[..., 1] * NARROW - tiles[..., 0] * OUTER


def _summed_diagonals(length: int, tiles: jax.Array, table: jax.Array, d_bias: jax.Array) -> jax.Array:
    """Gradient of the table, where a pair's entry is given by the indices of its tokens in a row of ``length``."""
    lead = d_bias.shape[:2]
    # Each row moved right by one place less than the row above: a diagonal becomes a column. Rows are cut one element
    # shorter than they are read.
    flat = jnp.pad(d_bias, ((0, 0), (0, 0), (0, 0), (0, _DIAGONALS - 1 - NARROW))).reshape(*lead, -1)
    moved = jnp.pad(flat, ((0, 0), (0, 0), (OUTER - 1, 1))).reshape(*lead, OUTER, _DIAGONALS)
    diagonals = moved.sum(2)  # column c: key index less query index = first_apart + c - (OUTER - 1)
    # Tiles of one class lie on the same diagonals of the row's square of pairs.
    lowest = -(length // OUTER - 1) * (OUTER // NARROW)
    classes = length // NARROW - lowest
    own = (_first_apart(tiles) // NARROW - lowest)[..., None] == jnp.arange(classes)
    by_class = jnp.einsum("bwc,bwd->cd", own.astype(jnp.float32), diagonals, precision=lax.Precision.HIGHEST)
    parts = jnp.pad(by_class, ((0, 0), (0, 1))).reshape(classes, -1, NARROW)
    overlap = parts.shape[1] - 1
    moved_on = [jnp.pad(parts[:, i], ((i, overlap - i), (0, 0))) for i in range(overlap + 1)]
    return _clipped(jnp.stack(moved_on).sum(0).reshape(-1), lowest * NARROW - (OUTER - 1), table.shape[0])


def _clipped(entries: jax.Array, lowest: int, size: int) -> jax.Array:
    """Entries for the differences ``lowest``, ``lowest`` + 1 and so on, as a table [2n - 1]; its ends take the rest."""
    reach = (size - 1) // 2
    below, above = max(-reach - lowest, 0), max(lowest + len(entries) - 1 - reach, 0)
    first, last = entries[:below].sum(), entries[len(entries) - above :].sum()
    kept = entries[below : len(entries) - above]
    before = lowest + below + reach
    table = jnp.pad(kept, (before, size - before - len(kept)))
    return table.at[0].add(first).at[-1].add(last)


def _one_by_one(marks: Marks, tiles: jax.Array, table: jax.Array, d_bias: jax.Array) -> jax.Array:
    """Gradient of the table from pairs anywhere; work is done for tiles with entries that are not 0 alone.

    Entries are added up as integers, in units of 2^-14 of the largest entry of a group of 8 tiles: the sum of its 2^16
    entries fits in int32 whatever the order in which the device adds.
    """
    width = tiles.shape[1]
    places = tiles.shape[0] * width
    busy = (d_bias != 0).any((2, 3)).reshape(-1)
    part = -(-places // (_PARTS * _GROUPED)) * _GROUPED
    order = jnp.pad(jnp.argsort(~busy, stable=True), (0, part))
    count = busy.sum(dtype=jnp.int32)
    group = jnp.arange(part)[:, None, None] // _GROUPED

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        chosen = lax.dynamic_slice(order, [i * part], [part])
        row, place = chosen // width, chosen % width
        listed = i * part + jnp.arange(part) < count
        entries = jnp.where(listed[:, None, None], d_bias[row, place], 0)
        largest = jnp.abs(entries).reshape(-1, _GROUPED, OUTER * NARROW).max((1, 2))
        unit = jnp.where(largest > 0, largest, 1) * 2.0**-14
        whole = jnp.round(entries / unit[group]).astype(jnp.int32)
        where = _position_place(table, _apart(marks, tiles[row, place], row))
        sums = jnp.zeros((len(unit), *table.shape), jnp.int32).at[group, where].add(whole, mode="promise_in_bounds")
        return total + (sums * unit[:, None]).sum(0)

    zeros = varying_like(jnp.zeros(table.shape, jnp.float32), d_bias)
    return lax.fori_loop(0, -(-count // part), add, zeros)
