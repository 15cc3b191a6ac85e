"""The backward TPU kernel: key blocks in turn, each over the query blocks that see it, all five products at once.

Tiles are transposed, keys down the sublanes, so that the gradients of keys and values need no transposed operand. The
gradient of a row's queries stays on chip until the last tile of each query block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention import mosaic_tpu_bias as biases
from kernels_pallas.hstu_attention import mosaic_tpu_tiles as tiles
from kernels_pallas.hstu_attention.mosaic_tpu_bias import Bias, Times, make_tables
from kernels_pallas.hstu_attention.mosaic_tpu_tiles import LANES, SUBLANES, Call, Pairs, Prepared, dot


def vmem_bytes(call: Call) -> int:
    """On-chip memory: blocks twice, sums in float32 (those of the queries for a whole row), tiles, table gradients."""
    lanes = call.group * (4 * call.dqk + 3 * call.dv)
    blocks = 2 * call.block * lanes * call.itemsize
    sums = 4 * call.block * call.group * (call.dqk * (1 + call.blocks) + call.dv)
    return blocks + sums + tiles.tile_bytes(call) + sum(2 * 4 * math.prod(shape) for shape in _table_shapes(call))


def _table_shapes(call: Call) -> list[tuple[int, int, int]]:
    """Per group of heads, what the kernel leaves of the gradients of the tables in use."""
    shapes = []
    if call.positions:
        shapes.append((2 * biases.reach(call.positions, call.block) + 1, SUBLANES, 2 * call.block))
    if call.buckets:
        shapes.append((biases.BUCKETS, SUBLANES, LANES))
    return shapes


def _kernel(call: Call, tree: Any, *refs: Any) -> None:
    """``tree`` is of the tables among the references."""
    row, blocks, flags, closing, q, k, v, d_out, queries, keys, *rest = refs
    records: Any = rest.pop(0) if call.buckets else None
    tables = jax.tree.unflatten(tree, [rest.pop(0) for _ in range(tree.num_leaves)])
    dq, dk, dv = (rest.pop(0) for _ in range(3))
    d_position: Any = rest.pop(0) if call.positions else None
    d_time: Any = rest.pop(0) if call.buckets else None
    dq_total, dk_total, dv_total, tile, columns, *bias_scratch = rest
    d_bias: Any = bias_scratch.pop(0) if call.biased else None
    merged = bias_scratch.pop(0) if call.positions else None
    bucket: Any = bias_scratch.pop(0) if call.buckets else None
    del row, closing  # only the index maps read them
    step = pl.program_id(1)
    kind = tiles.Kind(flags[step])
    query_block = blocks[step] >> 16
    shift = (blocks[step] & 0xFFFF) - query_block
    pairs = Pairs(columns, queries, by_key=True)

    squares = tiles.Squares(records, kind, call.block)
    times = Times(tables, pairs, squares, tile, bucket) if call.buckets else None

    def fill(*, masked: bool, regular: bool) -> None:
        bias = Bias(tables, shift, call.positions, regular, times)
        tiles.fill_tile(tile, pairs, bias if call.biased else None, masked=masked)

    def attend(*, masked: bool, dirty: bool) -> None:
        for head in range(call.group):
            at_qk, at_v = (pl.ds(head * d, d) for d in (call.dqk, call.dv))
            query, key, value, upstream = q[:, at_qk], k[:, at_qk], v[:, at_v], d_out[:, at_v]
            if dirty:
                real_queries, real_keys = tiles.real(queries, by_key=False), tiles.real(keys, by_key=True)
                query, upstream = (tiles.clean(x, real_queries) for x in (query, upstream))
                key, value = (tiles.clean(x, real_keys) for x in (key, value))
            half = 0.5 * call.alpha * dot(key, query, (1, 1))
            if call.biased:
                half += tile[...]
            sigmoid = 1 + jnp.tanh(half)  # twice that of the score, 2 · half
            weights = half * sigmoid
            slopes = sigmoid * ((half + half) + 1 - weights)
            d_scores = dot(value, upstream, (1, 1)) * slopes
            if masked:
                visible = tiles.is_visible(tile[...])
                weights, d_scores = (jnp.where(visible, x, 0) for x in (weights, d_scores))
            if call.biased:
                d_bias[...] = d_scores if head == 0 else d_bias[...] + d_scores
            dv_total[:, at_v] += dot(weights.astype(v.dtype), upstream, (1, 0))
            d_scores = d_scores.astype(q.dtype)
            dk_total[:, at_qk] += dot(d_scores, query, (1, 0))
            dq_total[query_block, :, at_qk] += dot(d_scores, key, (0, 0))

    @pl.when(kind.first)
    def _():
        dk_total[...] = jnp.zeros_like(dk_total)
        dv_total[...] = jnp.zeros_like(dv_total)
        tiles.keep_columns(columns, keys)

    @pl.when(kind.opens)
    def _():
        dq_total[query_block] = jnp.zeros(dq_total.shape[1:], jnp.float32)

    if call.biased:

        @pl.when(step == 0)
        def _():
            for total in (d_position, d_time):
                if total is not None:
                    total[...] = jnp.zeros_like(total)

    if times is not None:
        times.begin()
    tiles.each_kind(call, kind, fill, attend)
    if call.buckets:
        biases.add_time_gradients(d_time, d_bias, bucket, squares)
    if call.positions:
        pl.when(~kind.irregular)(lambda: biases.add_diagonals(d_position, shift, d_bias))
        pl.when(kind.irregular)(lambda: biases.add_irregular_diagonals(d_position, merged, d_bias, queries, keys))

    scale = 0.5 * call.alpha / call.divisor

    @pl.when(kind.last)
    def _():
        dk[...] = (dk_total[...] * scale).astype(dk.dtype)
        dv[...] = (dv_total[...] * (1 / call.divisor)).astype(dv.dtype)

    @pl.when(kind.closes)
    def _():
        dq[...] = (dq_total[query_block] * scale).astype(dq.dtype)


def backward(
    call: Call,
    d_out: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    prepared: Prepared,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of the heads of q, k, v [B, T, H · D] and of both tables, given that of the output [B, T, H · Dv]."""
    tables, tree = jax.tree.flatten(make_tables(position_bias, time_bias, call.block, by_key=True))
    work, at = prepared.by_key, tiles.BlockSpecs(call)
    groups, block = at.groups, call.block
    square = pltpu.VMEM((block, block), jnp.float32)
    dq, dk, dv, *sums = pl.pallas_call(
        functools.partial(_kernel, call, tree),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(groups, work.steps),
            in_specs=[
                at.query(call.dqk, call.starts[0]),
                at.key(call.dqk, call.starts[1]),
                at.key(call.dv, call.starts[2]),
                at.query(call.dv),
                at.query_fields(),
                at.key_fields(),
                *([at.squares()] * bool(call.buckets)),
                *(at.whole(table) for table in tables),
            ],
            out_specs=[
                at.closing(call.dqk),
                at.key(call.dqk),
                at.key(call.dv),
                *(at.per_group(shape) for shape in _table_shapes(call)),
            ],
            scratch_shapes=[
                pltpu.VMEM((call.blocks, block, call.group * call.dqk), jnp.float32),
                pltpu.VMEM((block, call.group * call.dqk), jnp.float32),
                pltpu.VMEM((block, call.group * call.dv), jnp.float32),
                square,
                pltpu.VMEM((tiles.KEY_FIELDS, block, LANES), jnp.int32),
                *([square] * (call.biased + bool(call.positions))),
                *([pltpu.VMEM((block, block), jnp.int32)] * bool(call.buckets)),
            ],
        ),
        out_shape=[
            *(tiles.like(x, (*x.shape[:2], call.heads * d)) for x, d in ((q, call.dqk), (k, call.dqk), (v, call.dv))),
            *(tiles.like(v, (groups, *shape), jnp.float32) for shape in _table_shapes(call)),
        ],
        compiler_params=tiles.compiler_params(),
        name="hstu_backward",
    )(*work[:4], q, k, v, d_out, prepared.queries, prepared.keys, *([work.squares] * bool(call.buckets)), *tables)
    d_position = d_time = None
    scale = 0.5 / call.divisor
    if position_bias is not None:
        d_position = (scale * biases.position_gradient(sums.pop(0), call.positions)).astype(position_bias.dtype)
    if time_bias is not None:
        d_time = (scale * biases.time_gradient(sums.pop(0), call.buckets)).astype(time_bias.dtype)
    return dq, dk, dv, d_position, d_time
