"""Which tiles a thread block of the Hopper kernels works through.

A thread block owns 128 tokens of one side, its outer block (queries, or keys in the kernel of their gradients), and
loops over blocks of the other side, its inner blocks. XLA builds the lists once per step for all layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.tokens import Tokens, attributes
from kernels_pallas.hstu_attention.worklist import tile_kinds

OUTER = 128
NARROW, WIDE = 64, 128  # tokens of an inner block
# Tiles of the bias held at a time, over all rows of the batch: 256 MiB of biases, 512 MiB of their gradients.
_HELD_TILES = 2**14


class Lists(NamedTuple):
    """The inner blocks of each outer block: O outer blocks, I inner blocks, W = O · I places for tiles.

    Attributes:
      counts: int32 [B, O, 3], of each outer block: its full tiles, its tiles, and the tiles of outer blocks before it.
      inner: int32 [B, O, I], its inner blocks, those of full tiles (no pair is masked) before the others.
      tiles: int32 [B, W, 2], the tiles of a row in one list: outer block and inner block. Places past the row's number
        of tiles hold outer block -1.
    """

    counts: jax.Array
    inner: jax.Array
    tiles: jax.Array


class Marks(NamedTuple):
    """What the biases are looked up by: int32 [B, T up to a multiple of 128] each."""

    query_position: jax.Array
    query_time: jax.Array
    key_position: jax.Array
    key_time: jax.Array


class Prepared(NamedTuple):
    """Everything the kernels share between layers.

    Attributes:
      fields: int32 [B, 5, T up to a multiple of 128], the arguments of `tokens.sees` but the key's index: low, high,
        until, self, rank.
      marks: for the biases.
      wide: lists of queries against blocks of 128 keys.
      queries: lists of queries against blocks of 64 keys.
      keys: lists of keys against blocks of 64 queries.
    """

    fields: jax.Array
    marks: Marks
    wide: Lists
    queries: Lists
    keys: Lists


def prepare(tokens: Tokens) -> Prepared:
    """Lists of fields [B, T]; T and B must be positive."""
    queries, keys = attributes(tokens)

    def whole(x: jax.Array, fill: int = 0) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % OUTER)), constant_values=fill)

    fields = [
        whole(queries.low),
        whole(queries.high),
        whole(queries.until),
        whole(queries.self, -1),
        whole(keys.rank, -1),
    ]
    return Prepared(
        fields=jnp.stack(fields, axis=1),
        marks=Marks(*(whole(x) for x in (queries.position, queries.time, keys.position, keys.time))),
        wide=block_lists(*tile_kinds(queries, keys, OUTER, WIDE)),
        queries=block_lists(*tile_kinds(queries, keys, OUTER, NARROW)),
        keys=block_lists(*(x.swapaxes(1, 2) for x in tile_kinds(queries, keys, NARROW, OUTER))),
    )


def block_lists(some: jax.Array, full: jax.Array) -> Lists:
    """Lists from the kinds of all tiles, bool [B, O, I] each: some pair may be visible, and no pair is hidden."""
    full = full & some
    rows, outer, inner = some.shape
    count = some.sum(2, dtype=jnp.int32)
    ends = jnp.cumsum(count, axis=1, dtype=jnp.int32)
    by_kind = jnp.argsort(2 - some.astype(jnp.int32) - full, axis=2, stable=True).astype(jnp.int32)
    place = jnp.arange(outer * inner, dtype=jnp.int32)
    owner = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right"))(ends).astype(jnp.int32)
    listed = owner < outer
    owner = jnp.where(listed, owner, 0)
    nth = jnp.where(listed, place - jnp.take_along_axis(ends - count, owner, 1), 0)
    partner = jnp.take_along_axis(by_kind.reshape(rows, -1), owner * inner + nth, 1)
    return Lists(
        counts=jnp.stack([full.sum(2, dtype=jnp.int32), count, ends - count], axis=2),
        inner=by_kind,
        tiles=jnp.stack([jnp.where(listed, owner, -1), partner], axis=2),
    )


def in_waves[Result](run: Callable[[Lists, int], Result], lists: Lists) -> Result:
    """Sum of ``run(lists, own)`` over waves of tiles few enough to hold their biases; mostly there is but one.

    The lists of a wave count tiles only for the outer blocks whose first tile it holds. All tiles of these blocks are
    among its ``tiles``, of which the first ``own`` belong to no other wave.
    """
    rows, outer, inner = lists.inner.shape
    # Half of the places and a spare block hold every tile of a causal row.
    held = min(outer * inner, outer * inner // 2 + 2 * inner, max(_HELD_TILES // rows, 4 * inner))
    if held == outer * inner:
        return run(lists, held)
    own = held - inner
    padded = jnp.pad(lists.tiles, ((0, 0), (0, held), (0, 0)), constant_values=-1)

    def wave(i: int | jax.Array) -> Result:
        full, count, before = (lists.counts[..., field] for field in range(3))
        begins = before // own == i
        counts = jnp.stack([jnp.where(begins, full, 0), jnp.where(begins, count, 0), before - i * own], axis=2)
        tiles = jax.lax.dynamic_slice_in_dim(padded, i * own, held, axis=1)
        return run(Lists(counts, lists.inner, tiles), own)

    waves = -(-(lists.counts[:, -1, 1] + lists.counts[:, -1, 2]).max() // own)
    return jax.lax.fori_loop(1, waves, lambda i, total: jax.tree.map(jnp.add, total, wave(i)), wave(0))
