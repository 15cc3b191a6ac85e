"""What the forward and the backward TPU kernel share: the list of tiles, token attributes, the bias and mask of a tile.

A tile is the square of a query block and a key block. One side lies down the sublanes (the outer loop's: queries in
the forward, keys in the backward kernel), the other along the lanes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention.buckets import time_bucket
from kernels_pallas.hstu_attention.tokens import Keys, Queries, Tokens, attributes, sees
from kernels_pallas.hstu_attention.worklist import listed_tiles, tile_kinds, work_list

LANES = 128
SUBLANES = 8
VMEM_LIMIT = 60 * 2**20  # v5p and 7x have 64 MiB per core, v5e and v6e 128
VMEM_BUDGET = 50 * 2**20  # for what the kernels declare; the rest is the compiler's
QUERY_FIELDS, KEY_FIELDS = 6, 4  # attributes of a query and of a key
HIDDEN = -1e30  # what a tile holds for a pair that is not visible
_HIGHEST, _ORDER = 7, 14  # bits of a square's record in `Squares`
_FIELDS = 8  # token attributes per side, filled up to a register's sublanes

# Flags of a tile.
FULL, FIRST, LAST, DIRTY, IRREGULAR, OPENS, CLOSES = (1 << bit for bit in range(7))
_MANY, _SEEN = 8, 16  # first bits of two numbers of squares in the flags
FEW_BUCKETS = 6  # a square with this many time buckets or less gets them by comparing with each threshold


class Call(NamedTuple):
    """What is static about one attention.

    Attributes:
      block: tokens per block.
      blocks: blocks per row.
      heads: of the whole call.
      group: heads per step.
      starts: of the heads of q, k and v, the first column in their arrays; a multiple of a group's columns.
      dqk, dv: of one head.
      itemsize: bytes of an element of q.
      alpha, divisor: see `api.hstu_attention`.
      positions: n of the position table, 0 for none.
      buckets: length of the time table, 0 for none.
    """

    block: int
    blocks: int
    heads: int
    group: int
    starts: tuple[int, int, int]
    dqk: int
    dv: int
    itemsize: int
    alpha: float
    divisor: float
    positions: int
    buckets: int

    @property
    def biased(self) -> bool:
        return bool(self.positions or self.buckets)


class TileList(NamedTuple):
    """A work list as the kernels read it from scalar memory, int32 [W].

    Attributes:
      row: row of the batch.
      blocks: query block · 2¹⁶ + key block.
      flags: FULL (all pairs visible), FIRST and LAST (of the outer block), DIRTY (padding among its tokens), IRREGULAR
        (positions do not follow the index), OPENS and CLOSES (first and last of the inner block); with a time bias
        the squares with many buckets times 2⁸, and those with anything visible times 2¹⁶.
      closing: the inner block that closes next.
      squares: [W, 1, squares of a tile], see `Squares`; None without a time bias. Read a tile at a time.
      steps: int32 scalar, tiles to work on.
    """

    row: jax.Array
    blocks: jax.Array
    flags: jax.Array
    closing: jax.Array
    squares: jax.Array | None
    steps: jax.Array


class Prepared(NamedTuple):
    """What `prepare` derives from tokens: attributes int32 [B, 8, T filled up to blocks] and two lists of tiles."""

    queries: jax.Array
    keys: jax.Array
    by_query: TileList
    by_key: TileList


def block_size(length: int) -> int:
    """Tokens of a query or key block for rows of ``length`` tokens: a power of two, at least 128."""
    return min(512, LANES << max(0, (length - 1) // LANES).bit_length())


def prepare(tokens: Tokens, positions: int, buckets: int) -> Prepared:
    """The attributes and both lists of tiles."""
    length = tokens.segment.shape[1]
    block = block_size(length)
    queries, keys = attributes(tokens)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), keys.rank.shape)
    dirty = _blocks(tokens.segment == 0, block, True).any(-1)
    flags = DIRTY * (dirty[:, :, None] | dirty[:, None, :])
    if positions:
        flags += IRREGULAR * ~_regular(tokens, block)
    ranges = _bucket_ranges(queries, keys, block) if buckets else None
    return Prepared(
        _stack(queries, [0, 0, 0, -1, 0, 0], block),
        _stack((*keys, index), [-1, 0, 0, -2], block),
        _tile_list(queries, keys, flags, ranges, block, "query"),
        _tile_list(queries, keys, flags, ranges, block, "key"),
    )


def _blocks(x: jax.Array, block: int, fill: Any) -> jax.Array:
    """[B, T] -> [B, blocks, block], the last block filled up."""
    short = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, short)), constant_values=fill).reshape(x.shape[0], -1, block)


def _stack(fields: Any, fill: list[int], block: int) -> jax.Array:
    """Attributes [B, T] each -> [B, 8, T filled up to whole blocks with what sees nothing and is seen by nothing]."""
    short = -fields[0].shape[1] % block
    padded = [jnp.pad(x, ((0, 0), (0, short)), constant_values=value) for x, value in zip(fields, fill)]
    stacked = jnp.stack(padded, axis=1)
    return jnp.pad(stacked, ((0, 0), (0, _FIELDS - len(padded)), (0, 0)))


def _regular(tokens: Tokens, block: int) -> jax.Array:
    """Tiles whose visible pairs are as many positions apart as they are tokens apart, bool [B, blocks, blocks].

    True where, between the first and the last token of the two blocks, positions rise by one inside each segment and
    no segment resumes.
    """
    segment = tokens.segment
    position = tokens.order if tokens.position is None else tokens.position
    anchor = jnp.arange(segment.shape[1], dtype=jnp.int32) - position
    before = jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
    anchor_before = jnp.pad(anchor, ((0, 0), (1, 0)))[:, :-1]
    follows = segment == before
    resumes = ~follows & (segment <= jax.lax.cummax(before, axis=1))
    breaks = (segment > 0) & jnp.where(follows, anchor != anchor_before, resumes)
    count = _blocks(jnp.cumsum(breaks, axis=1, dtype=jnp.int32), block, 0)
    begin, end = count[:, :, 0], count.max(-1)
    number = jnp.arange(begin.shape[1])
    earlier = jnp.minimum(number[:, None], number[None])
    later = jnp.maximum(number[:, None], number[None])
    return begin[:, earlier] == end[:, later]


class BucketRanges(NamedTuple):
    """Time buckets of the real pairs of each square of 128 × 128, each [B, blocks, blocks, squares, squares]."""

    lowest: jax.Array
    highest: jax.Array
    seen: jax.Array  # bool: some pair may be visible

    def records(self, axes: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """What `Squares` reads, int32 [B, blocks, blocks, squares²], with ``axes`` down and across; and its numbers."""
        lowest, highest, seen = (jnp.moveaxis(x, axes, (3, 4)).reshape(*x.shape[:3], -1) for x in self)
        many = seen & (highest - lowest >= FEW_BUCKETS)
        order = jnp.argsort(jnp.where(many, 0, jnp.where(seen, 1, 2)), axis=-1, stable=True)
        numbers = (many.sum(-1) << _MANY) + (seen.sum(-1) << _SEEN)
        return lowest | highest << _HIGHEST | order << _ORDER, numbers


def _bucket_ranges(queries: Queries, keys: Keys, block: int) -> BucketRanges:
    """From the first and last times of real tokens in blocks of 128."""
    squares, blocks = block // LANES, -(-queries.time.shape[1] // block)

    def ends(time: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        lowest, highest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
        first = _blocks(jnp.where(real, time, highest), block, highest).reshape(-1, blocks * squares, LANES).min(-1)
        last = _blocks(jnp.where(real, time, lowest), block, lowest).reshape(-1, blocks * squares, LANES).max(-1)
        return first, last

    def tiled(x: jax.Array) -> jax.Array:
        return x.reshape(-1, blocks, squares, blocks, squares).swapaxes(2, 3)

    first_query, last_query = (x[:, :, None] for x in ends(queries.time, queries.self >= 0))
    first_key, last_key = (x[:, None] for x in ends(keys.time, keys.rank >= 0))
    behind, ahead = time_bucket(first_query, last_key), time_bucket(last_query, first_key)
    lowest = jnp.where(first_query > last_key, behind, jnp.where(first_key > last_query, ahead, 0))
    seen = tile_kinds(queries, keys, LANES, LANES)[0]
    short = blocks * squares - seen.shape[1]
    seen = jnp.pad(seen, ((0, 0), (0, short), (0, short)))
    return BucketRanges(tiled(lowest), tiled(jnp.maximum(ahead, behind)), tiled(seen))


def _tile_list(
    queries: Queries, keys: Keys, flags: jax.Array, ranges: BucketRanges | None, block: int, by: str
) -> TileList:
    squares = None
    work = work_list(queries, keys, block, block, by=by)
    listed = listed_tiles(tile_kinds(queries, keys, block, block)[0], by=by)
    if by == "key":
        inner, outer, axis = work.query, work.key, 2
    else:
        inner, outer, axis = work.key, work.query, 1
    last = listed.shape[axis] - 1
    opens = jnp.argmax(listed, axis)[work.row, inner] == outer
    closes = last - jnp.argmax(jnp.flip(listed, axis), axis)[work.row, inner] == outer
    place = jnp.arange(len(inner))
    real = place < work.size
    closing = jax.lax.cummin(jnp.where(closes & real, place, len(inner) - 1), reverse=True)
    tile = work.row, work.query, work.key
    if ranges is not None:
        records, numbers = ranges.records((3, 4) if by == "query" else (4, 3))
        flags, squares = flags + numbers, records[tile][:, None]
    bits = flags[tile]
    for flag, holds in ((FULL, work.full), (FIRST, work.first), (LAST, work.last), (OPENS, opens), (CLOSES, closes)):
        bits += flag * holds
    return TileList(work.row, work.query << 16 | work.key, bits, inner[closing], squares, work.size)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of one tile inside a kernel.

    Attributes:
      columns: VMEM [fields, block, 128], the outer side's attributes, the same in every lane.
      rows: VMEM [8, block], the inner side's attributes.
      by_key: the outer side is the keys.
    """

    columns: Any
    rows: Any
    by_key: bool

    def subtile(self, down: Any, across: Any) -> tuple[Queries, Keys, jax.Array]:
        """Attributes of queries and keys, and the keys' index, of a square of 128 × 128 pairs."""
        outer = [self.columns[field, down] for field in range(self.columns.shape[0])]
        inner = [self.rows[field : field + 1, across] for field in range(_FIELDS)]
        queries, keys = (inner, outer) if self.by_key else (outer, inner)
        return Queries(*queries[:6]), Keys(*keys[:3]), keys[3]


def keep_columns(columns: Any, rows: Any) -> None:
    """Turns the attributes [8, block] of the outer block into columns [fields, block, 128]."""
    turned = rows[...].T
    for field in range(columns.shape[0]):
        columns[field] = jnp.broadcast_to(turned[:, field : field + 1], columns.shape[1:])


def seen(queries: Queries, keys: Keys, index: jax.Array) -> jax.Array:
    return sees(queries.low, queries.high, queries.until, queries.self, keys.rank, index)


def real(fields: Any, *, by_key: bool) -> jax.Array:
    """Which tokens of a block are no padding, bool [block, 1], from its attributes [8, block]."""
    field = Keys._fields.index("rank") if by_key else Queries._fields.index("self")
    return fields[...].T[:, field : field + 1] >= 0


def clean(x: jax.Array, real: jax.Array) -> jax.Array:
    """[block, D] with the rows of padding zeroed."""
    return jnp.where(real, x, jnp.zeros_like(x))


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices over one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contract, precision=precision, preferred_element_type=jnp.float32)


class Kind:
    """The flags of a tile inside a kernel, as scalar conditions and numbers of squares."""

    def __init__(self, flags: jax.Array) -> None:
        bits = (flags & bit != 0 for bit in (FULL, FIRST, LAST, DIRTY, IRREGULAR, OPENS, CLOSES))
        self.full, self.first, self.last, self.dirty, self.irregular, self.opens, self.closes = bits
        self.many = flags >> _MANY & 0xFF
        self.seen = flags >> _SEEN
        self.plain = self.full & ~self.irregular


class Squares:
    """The squares of 128 × 128 pairs of a tile inside a kernel, with the range of their time buckets.

    Record i in scalar memory tells the lowest and highest bucket of square i in the order of rows, and which square is
    the i-th by kind: first those with many buckets, then those with few, then those with nothing visible.
    """

    def __init__(self, records: Any, kind: Kind, block: int) -> None:
        self.records, self.kind, self.side = records, kind, block // LANES

    def range(self, square: Any) -> tuple[jax.Array, jax.Array]:
        """The lowest and highest bucket of a square, scalars."""
        record = self.records[0, square]
        return record & 127, record >> _HIGHEST & 127

    def each(self, begin: Any, end: Any, visit: Callable[[Any, jax.Array], None], together: int = 1) -> None:
        """Calls visit(place in the tile, square) for squares ``begin`` to ``end`` by kind.

        As many as ``together`` in one turn, so that one fills the other's waits; what is left over, one by one.
        """

        def turn(number: jax.Array, size: int) -> None:
            for more in range(size):
                square = self.records[0, number + more] >> _ORDER
                starts = square >> (self.side.bit_length() - 1), square & (self.side - 1)
                visit(tuple(pl.ds(pl.multiple_of(start * LANES, LANES), LANES) for start in starts), square)

        whole: Any = 0
        if 1 < together <= self.side**2:
            whole = jax.lax.div(end - begin, together)
            jax.lax.fori_loop(0, whole, lambda i, _: turn(begin + i * together, together), None)
        jax.lax.fori_loop(begin + whole * together, end, lambda i, _: turn(i, 1), None)

    def each_many(self, visit: Callable[[Any, jax.Array], None], together: int = 1) -> None:
        self.each(0, self.kind.many, visit, together)

    def each_few(self, visit: Callable[[Any, jax.Array], None]) -> None:
        self.each(self.kind.many, self.kind.seen, visit)

    def each_seen(self, visit: Callable[[Any, jax.Array], None], together: int) -> None:
        self.each(0, self.kind.seen, visit, together)


def each_kind(call: Call, kind: Kind, fill: Callable[..., None], attend: Callable[..., None]) -> None:
    """Runs fill(masked, regular) and attend(masked, dirty) as the kind of tile needs them."""

    @pl.when(kind.plain)
    def _():
        if call.biased:
            fill(masked=False, regular=True)
        attend(masked=False, dirty=False)

    pl.when(~kind.plain & ~kind.irregular)(lambda: fill(masked=True, regular=True))
    if call.positions:
        pl.when(kind.irregular)(lambda: fill(masked=True, regular=False))
    pl.when(~kind.plain & ~kind.dirty)(lambda: attend(masked=True, dirty=False))
    pl.when(~kind.plain & kind.dirty)(lambda: attend(masked=True, dirty=True))


def tile_bytes(call: Call) -> int:
    """Tiles of bias and mask, their gradient and buckets, and the attributes of tokens."""
    return 4 * call.block * (call.block * (4 if call.biased else 1) + QUERY_FIELDS * LANES + 4 * _FIELDS)


def compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def like(x: jax.Array, shape: tuple[int, ...] | None = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The type of an output that differs over a mesh as x does."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=varying)


class BlockSpecs:
    """Which block of each array a step takes; index maps take (group, step, row, blocks, flags, closing).

    ``start`` is the first column of the heads in their array.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.groups = call.heads // call.group

    def query(self, width: int, start: int = 0) -> pl.BlockSpec:
        """A query block of heads of ``width`` lanes."""
        shape, first = self._heads(width, start)
        return pl.BlockSpec(shape, lambda group, step, row, blocks, *_: (row[step], blocks[step] >> 16, first + group))

    def key(self, width: int, start: int = 0) -> pl.BlockSpec:
        shape, first = self._heads(width, start)
        return pl.BlockSpec(
            shape, lambda group, step, row, blocks, *_: (row[step], blocks[step] & 0xFFFF, first + group)
        )

    def closing(self, width: int) -> pl.BlockSpec:
        """The inner block that is finished next."""
        shape, _ = self._heads(width, 0)
        return pl.BlockSpec(shape, lambda group, step, row, blocks, flags, closing: (row[step], closing[step], group))

    def _heads(self, width: int, start: int) -> tuple[tuple[int | None, int, int], int]:
        """Shape of a block of a group's heads, and the number of the first one."""
        lanes = self.call.group * width
        return (None, self.call.block, lanes), start // lanes

    def query_fields(self) -> pl.BlockSpec:
        shape = (None, _FIELDS, self.call.block)
        return pl.BlockSpec(shape, lambda group, step, row, blocks, *_: (row[step], 0, blocks[step] >> 16))

    def key_fields(self) -> pl.BlockSpec:
        shape = (None, _FIELDS, self.call.block)
        return pl.BlockSpec(shape, lambda group, step, row, blocks, *_: (row[step], 0, blocks[step] & 0xFFFF))

    def squares(self) -> pl.BlockSpec:
        """The records of a tile's squares."""
        shape = (None, 1, (self.call.block // LANES) ** 2)
        return pl.BlockSpec(shape, lambda group, step, *_: (step, 0, 0), memory_space=pltpu.SMEM)

    def whole(self, table: jax.Array) -> pl.BlockSpec:
        """All of a table; vectors go to scalar memory."""
        if table.ndim == 1:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.BlockSpec(table.shape, lambda *_: (0,) * table.ndim)

    def per_group(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda group, *_: (group,) + (0,) * len(shape))


def fill_tile(tile: Any, pairs: Pairs, bias: Any, *, masked: bool) -> None:
    """Writes half the bias of each pair, and HIDDEN for the hidden pairs of a ``masked`` tile, into [block, block].

    ``bias`` is a function of (diagonal, queries, keys, visible, place in the tile) to [128, 128], or None.
    """
    squares = tile.shape[0] // LANES
    for diagonal in range(1 - squares, squares):
        shared = None if bias is None else bias.along(diagonal)
        for down in range(max(0, -diagonal), min(squares, squares - diagonal)):
            across = down + diagonal
            place = pl.ds(down * LANES, LANES), pl.ds(across * LANES, LANES)
            queries, keys, index = pairs.subtile(*place)
            visible = seen(queries, keys, index) if masked else None
            value = jnp.zeros((LANES, LANES), jnp.float32)
            if bias is not None:
                value = bias(shared, queries, keys, visible, place)
            if visible is not None:
                value = jnp.where(visible, value, HIDDEN)
            tile[place] = value


def is_visible(value: jax.Array) -> jax.Array:
    """Visibility of pairs from what `fill_tile` wrote."""
    return value > 0.5 * HIDDEN
