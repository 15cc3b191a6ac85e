"""Both relative biases and their gradients on one tile, inside the TPU kernels.

Position: on a regular tile the bias depends on the diagonal alone, so that one row of the table, rolled further from
row to row, holds all of it. Other tiles look every pair up, 128 entries of the table at a time.
Time: a distance's float bits name a cell that at most one bucket threshold cuts; two look-ups among 128 lanes. Squares
of 128 × 128 pairs whose times leave few buckets compare with the thresholds between them instead.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention.buckets import thresholds
from kernels_pallas.hstu_attention.mosaic_tpu_tiles import FEW_BUCKETS, LANES, SUBLANES, Pairs, Squares
from kernels_pallas.hstu_attention.tokens import Keys, Queries

_NEVER = int(np.iinfo(np.int32).max)
BUCKETS = 88  # 0..73, and the rest of a dozen that begins with the last
_DOZEN = 12
_LANE_BITS = LANES.bit_length() - 1
_HIGHEST = jax.lax.Precision.HIGHEST


class Tables(NamedTuple):
    """Both tables as the kernels read them, arrays or references to them; None for a bias that is not used.

    Attributes:
      windows: float32 [2 · reach + 1, 1, 2 · block]; entry y of window w is half the bias of keys
        ``(w - reach) · block + y - block`` positions after their query (before it, counting y down, for `by_key`).
      chunks: float32 [chunks, 128], half the position table in order.
      limits, buckets: int32 [1, 128], see `time_cells`.
      values: float32 [1, 128], half the time bias of each of ``buckets``.
      ends: int32 [128], see `bucket_ends`.
      levels: float32 [128], half the time bias of each bucket.
    """

    windows: Any
    chunks: Any
    limits: Any
    buckets: Any
    values: Any
    ends: Any
    levels: Any


def make_tables(position_bias: jax.Array | None, time_bias: jax.Array | None, block: int, *, by_key: bool) -> Tables:
    """Tables for blocks of ``block`` tokens from position_bias [2n - 1] and time_bias [buckets]."""
    windows = chunks = limits = buckets = values = ends = levels = None
    if position_bias is not None:
        half = 0.5 * position_bias.astype(jnp.float32)
        far = half.shape[0] // 2
        span = (reach(far + 1, block) + 1) * block
        place = jnp.clip(jnp.arange(-span, span), -far, far) + far
        line = half[place].reshape(-1, block)
        windows = jnp.concatenate([line[:-1], line[1:]], axis=1)
        if by_key:  # entry y holds what 2 · block - y held; entry 0 is never read
            windows = jnp.roll(windows[:, ::-1], 1, axis=1)
        windows = windows[:, None]
        chunks = jnp.pad(half, (0, -half.shape[0] % LANES)).reshape(-1, LANES)
    if time_bias is not None:
        half = 0.5 * time_bias.astype(jnp.float32)
        limits, buckets = (jnp.asarray(x)[None] for x in time_cells())
        levels = half[np.minimum(np.arange(LANES), half.shape[0] - 1)]
        values = levels[buckets]
        ends = jnp.asarray(bucket_ends())
    return Tables(windows, chunks, limits, buckets, values, ends, levels)


def reach(positions: int, block: int) -> int:
    """Blocks from which on every distance has the last entry of a table of ``positions``."""
    return -(-(positions - 1) // block) + 1


@dataclasses.dataclass(frozen=True)
class Bias:
    """The bias of a tile's pairs, as `fill_tile` asks for it.

    Attributes:
      tables: of VMEM references.
      shift: key block - query block, a scalar.
      positions: n of the position table, 0 for none.
      regular: the tile's positions follow the index.
      times: of the tile; None without a time bias.
    """

    tables: Tables
    shift: jax.Array
    positions: int
    regular: bool
    times: "Times | None"

    def along(self, diagonal: int) -> jax.Array | None:
        """The position bias [128, 128] of all squares on a diagonal of the tile; None if it is not regular."""
        if not self.positions or not self.regular:
            return None
        windows = self.tables.windows
        block = windows.shape[2] // 2
        far = windows.shape[0] // 2
        start = block + (diagonal - 1) * LANES
        window = windows[jnp.clip(self.shift, -far, far) + far, :, pl.ds(start, 2 * LANES)]
        rows = jnp.broadcast_to(window, (LANES, 2 * LANES))
        return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, LANES:]

    def __call__(
        self, along: jax.Array | None, queries: Queries, keys: Keys, visible: jax.Array | None, place: Any
    ) -> jax.Array:
        value = jnp.zeros((LANES, LANES), jnp.float32) if along is None else along
        if self.positions and visible is not None and not self.regular:
            value = _look_up(self.tables.chunks, self.positions, queries, keys, visible)
        if self.times is None:
            return value
        return value + self.times.finish(queries.time - keys.time, visible, place)


@dataclasses.dataclass(frozen=True)
class Times:
    """The time bias of a tile's pairs, square by square: `begin` for the whole tile, then `finish` for each square.

    Few buckets are compared with one by one, which an unmasked tile does beside its matrix products, in `finish`.

    Attributes:
      tables: of VMEM references.
      pairs, squares: of the tile.
      tile: VMEM float32 [block, block], for half the bias.
      buckets: VMEM int32 [block, block] to note each pair's bucket in, -1 for hidden pairs; or None.
    """

    tables: Tables
    pairs: Pairs
    squares: Squares
    tile: Any
    buckets: Any

    def begin(self) -> None:
        """Writes what `finish` reads: squares with many buckets, and if the tile is not plain those with few."""
        squares = self.squares
        squares.each_many(lambda place, square: self._write(place, *self._any_bucket(self._apart(place))), together=2)

        @pl.when(~squares.kind.plain)
        def _():
            squares.each_few(lambda place, square: self._write(place, *self._few_buckets(self._apart(place), square)))

    def finish(self, apart: jax.Array, visible: jax.Array | None, place: Any) -> jax.Array:
        """Half the bias [128, 128] of pairs ``apart`` (either sign) seconds; notes their buckets."""
        if visible is not None:
            if self.buckets is not None:
                self.buckets[place] = jnp.where(visible, self.buckets[place], -1)
            return self.tile[place]
        square = place[0].start // LANES * self.squares.side + place[1].start // LANES
        lowest, highest = self.squares.range(square)
        many = highest - lowest >= FEW_BUCKETS
        seconds, bucket = self._few_buckets(apart, square)
        if self.buckets is not None:
            pltpu.store(self.buckets.at[place], bucket, mask=jnp.broadcast_to(~many, bucket.shape))
        return jnp.where(many, self.tile[place], seconds)

    def _apart(self, place: Any) -> jax.Array:
        queries, keys, _ = self.pairs.subtile(*place)
        return queries.time - keys.time

    def _write(self, place: Any, seconds: jax.Array, bucket: jax.Array) -> None:
        self.tile[place] = seconds
        if self.buckets is not None:
            self.buckets[place] = bucket

    def _any_bucket(self, apart: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Bias and bucket of pairs ``apart`` (either sign) seconds."""
        step = time_step(apart, self.tables.limits[...])
        return spread(self.tables.values[...], step), spread(self.tables.buckets[...], step)

    def _few_buckets(self, apart: jax.Array, square: Any) -> tuple[jax.Array, jax.Array]:
        ends, levels, lowest = self.tables.ends, self.tables.levels, self.squares.range(square)[0]
        value = jnp.full(apart.shape, levels[lowest], jnp.float32)
        bucket = jnp.full(apart.shape, lowest, jnp.int32)
        distance = jnp.abs(apart)
        for more in range(1, FEW_BUCKETS):
            reached = distance > ends[lowest + more - 1]
            value = jnp.where(reached, levels[lowest + more], value)
            bucket = jnp.where(reached, lowest + more, bucket)
        return value, bucket


def _look_up(chunks: Any, positions: int, queries: Queries, keys: Keys, visible: jax.Array) -> jax.Array:
    """The position bias [128, 128] of any pairs, from the chunks of the table that visible pairs need."""
    reach = positions - 1
    entry = jnp.clip(keys.position - queries.position, -reach, reach) + reach
    first = jnp.min(jnp.where(visible, entry, 2 * reach)) >> _LANE_BITS
    last = jnp.max(jnp.where(visible, entry, -1)) >> _LANE_BITS  # -1: no chunk at all

    def add(chunk: jax.Array, value: jax.Array) -> jax.Array:
        found = spread(chunks[pl.ds(chunk, 1)], entry & (LANES - 1))
        return jnp.where(entry >> _LANE_BITS == chunk, found, value)

    return jax.lax.fori_loop(first, last + 1, add, jnp.zeros(entry.shape, jnp.float32))


_ALONG_LANES = jax.lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=(1,),
    start_index_map=(1,),
    operand_batching_dims=(0,),
    start_indices_batching_dims=(0,),
)


def spread(table: jax.Array, index: jax.Array) -> jax.Array:
    """table [1, 128] at ``index`` [rows, 128], 0..127; `jnp.take_along_axis` without its care for negative indices."""
    rows = jnp.broadcast_to(table, index.shape)
    inside = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(rows, index[..., None], _ALONG_LANES, (1, 1), mode=inside)


@functools.cache
def time_cells() -> tuple[np.ndarray, np.ndarray]:
    """(limits, buckets), each int32 [128]: distances by their power of two and quarter of it, 128 cells for int32.

    A cell holds at most one threshold, its limit. A distance below it falls into bucket ``buckets[cell]``, any other
    into ``buckets[cell + 1]``.
    """
    exponent, quarter = np.divmod(np.arange(LANES + 1), 4)
    begins = np.ldexp(1 + quarter / 4, exponent)
    limits, buckets = np.full(LANES, _NEVER), np.zeros(LANES, np.int32)
    for cell in range(LANES - 1):
        inside = [t for t in thresholds() if begins[cell] <= t < begins[cell + 1] and t < 2**31]
        assert len(set(inside)) <= 1
        if inside:
            limits[cell] = inside[0]
        buckets[cell + 1] = buckets[cell] + len(inside)
    return limits.astype(np.int32), buckets


def bucket_ends() -> np.ndarray:
    """int32 [128], the largest distance in bucket b or an earlier one; of int32 where there is no later bucket."""
    ends = np.minimum(thresholds().astype(np.int64) - 1, _NEVER)
    return np.pad(ends, (0, LANES - len(ends)), constant_values=_NEVER).astype(np.int32)


def time_step(apart: jax.Array, limits: jax.Array) -> jax.Array:
    """Index into the ``buckets`` of `time_cells` of distances below 2³¹ seconds, of either sign."""
    # The absolute value and the maximum are one operation each on floats, but not on integers.
    rounded = jnp.maximum(jnp.abs(apart.astype(jnp.float32)), 1.0)
    cell = (pltpu.bitcast(rounded, jnp.int32) >> 21) - (127 << 2)
    return jnp.where(jnp.abs(apart) >= spread(limits, cell), cell + 1, cell)


def add_time_gradients(total: Any, d_bias: Any, buckets: Any, squares: Squares) -> None:
    """Adds d_bias [block, block] to the row of its bucket in total [88, 8, 128]; 8 × 128 partial sums are left.

    Each square's own range of buckets is summed: the first `FEW_BUCKETS`, then by the dozen.
    """

    def add(place: Any, first: jax.Array, count: int) -> None:
        bucket, gradient = buckets[place], d_bias[place]
        for number in [first + more for more in range(count)]:
            total[number] += jnp.where(bucket == number, gradient, 0).reshape(-1, SUBLANES, LANES).sum(0)

    def add_later(place: Any, square: jax.Array) -> None:
        lowest, highest = squares.range(square)
        begin = lowest + FEW_BUCKETS
        dozens = jax.lax.div(highest - begin + _DOZEN, _DOZEN)
        jax.lax.fori_loop(0, dozens, lambda i, _: add(place, begin + i * _DOZEN, _DOZEN), None)

    squares.each_seen(lambda place, square: add(place, squares.range(square)[0], FEW_BUCKETS), together=4)
    squares.each_many(add_later)


def add_diagonals(total: Any, shift: jax.Array, d_bias: Any) -> None:
    """Adds the diagonals of d_bias [keys, queries] to row ``shift`` of total [2 · reach + 1, 8, 2 · block].

    Rows that agree in their number modulo 8 are brought to one diagonal and summed; 8 shifted sums are left.
    """
    block = d_bias.shape[0]
    squares = block // LANES
    far = total.shape[0] // 2
    zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
    lined_up = jnp.zeros((SUBLANES, 2 * block), jnp.float32)
    for first in range(0, LANES, SUBLANES):
        pieces = [zero] * (2 * squares)
        for down in range(squares):
            for across in range(squares):
                rows = pl.ds(down * LANES + first, SUBLANES)
                pieces[squares + across - down] += d_bias[rows, pl.ds(across * LANES, LANES)]
        lined_up += pltpu.roll(jnp.concatenate(pieces, axis=1), (2 * block - first) % (2 * block), 1)
    total[jnp.clip(shift, -far, far) + far] += lined_up


def add_irregular_diagonals(total: Any, merged: Any, d_bias: Any, queries: Any, keys: Any) -> None:
    """`add_diagonals` for any positions: first moves each row and column to the place of its position.

    Positions are taken a window of ``block`` at a time, only those that occur: sums over the tokens at each position
    of a key window and a query window make a regular tile. Attributes are VMEM [8, block] each; merged is VMEM
    [block, block].
    """
    block = d_bias.shape[0]
    query = queries[Queries._fields.index("position") :][:1], queries[Queries._fields.index("self") :][:1] >= 0
    key = keys[Keys._fields.index("position") :][:1], keys[Keys._fields.index("rank") :][:1] >= 0
    rows = jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)

    def windows(positions: tuple[jax.Array, jax.Array], visit: Any) -> None:
        """Calls visit(window, tokens at each of its positions [block, block]) for each window that has tokens."""
        position, real = positions
        window = position >> (block.bit_length() - 1)
        none = _NEVER

        def following(after: jax.Array) -> jax.Array:
            return jnp.min(jnp.where(real & (window > after), window, none))

        def step(now: jax.Array) -> jax.Array:
            visit(now, (real & (position - now * block == rows)).astype(jnp.float32))
            return following(now)

        jax.lax.while_loop(lambda now: now < none, step, following(jnp.int32(-none)))

    def product(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        contract = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(x, y, contract, precision=_HIGHEST, preferred_element_type=jnp.float32)

    def with_keys(key_window: jax.Array, at_key: jax.Array) -> None:
        by_key = product(at_key, d_bias[...], (1, 0))

        def with_queries(query_window: jax.Array, at_query: jax.Array) -> None:
            merged[...] = product(by_key, at_query, (1, 1))
            add_diagonals(total, key_window - query_window, merged)

        windows(query, with_queries)

    windows(key, with_keys)


def position_gradient(total: jax.Array, positions: int) -> jax.Array:
    """Gradient [2n - 1] of the position table from the kernel's sums [groups, 2 · reach + 1, 8, 2 · block]."""
    sums = total.sum(0)
    width = sums.shape[2]
    block = width // 2
    # Row s of 8 stands s places too far to the right; entry y belongs to distance shift · block + block - y.
    diagonals = jnp.stack([jnp.pad(sums[:, s, s:], ((0, 0), (0, s))) for s in range(SUBLANES)]).sum(0)
    rising = jnp.roll(diagonals[:, ::-1], 1, axis=1)  # entry y: distance shift · block + y - block
    line = jnp.zeros((sums.shape[0] + 1, block)).at[:-1].add(rising[:, :block]).at[1:].add(rising[:, block:])
    line = line.reshape(-1)
    start = line.shape[0] // 2 - (positions - 1)
    stop = start + 2 * positions - 1
    return line[start:stop].at[0].add(line[:start].sum()).at[-1].add(line[stop:].sum())


def time_gradient(total: jax.Array, buckets: int) -> jax.Array:
    """Gradient [buckets] of the time table from the kernel's sums [groups, 88, 8, 128]."""
    sums = jnp.pad(total.sum((0, 2, 3)), (0, max(0, buckets - BUCKETS)))
    return sums[:buckets].at[-1].add(sums[buckets:].sum())  # a shorter table's last entry serves all later buckets
