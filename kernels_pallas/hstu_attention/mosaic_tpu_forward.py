"""The forward TPU kernel: query blocks in turn, each over the key blocks it sees."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention import mosaic_tpu_tiles as tiles
from kernels_pallas.hstu_attention.mosaic_tpu_bias import Bias, Times, make_tables
from kernels_pallas.hstu_attention.mosaic_tpu_tiles import LANES, Call, Pairs, Prepared, dot


def vmem_bytes(call: Call) -> int:
    """On-chip memory of one step: blocks twice (one is loaded while the other is worked on), sums and a tile."""
    lanes = 2 * call.group * (call.dqk + call.dv)
    blocks = 2 * call.block * lanes * call.itemsize
    return blocks + 4 * call.block * call.group * call.dv + tiles.tile_bytes(call)


def _kernel(call: Call, tree: Any, *refs: Any) -> None:
    """``tree`` is of the tables among the references."""
    row, blocks, flags, closing, q, k, v, queries, keys, *rest, out, total, tile, columns = refs
    del row, closing  # only the index maps read them
    records = rest.pop(0) if call.buckets else None
    tables = jax.tree.unflatten(tree, rest)
    step = pl.program_id(1)
    kind = tiles.Kind(flags[step])
    shift = (blocks[step] & 0xFFFF) - (blocks[step] >> 16)
    pairs = Pairs(columns, keys, by_key=False)

    times = Times(tables, pairs, tiles.Squares(records, kind, call.block), tile, None) if call.buckets else None

    def fill(*, masked: bool, regular: bool) -> None:
        bias = Bias(tables, shift, call.positions, regular, times)
        tiles.fill_tile(tile, pairs, bias if call.biased else None, masked=masked)

    def attend(*, masked: bool, dirty: bool) -> None:
        for head in range(call.group):
            dqk, dv = (pl.ds(head * d, d) for d in (call.dqk, call.dv))
            values = v[:, dv]
            if dirty:
                values = tiles.clean(values, tiles.real(keys, by_key=True))
            half = 0.5 * call.alpha * dot(q[:, dqk], k[:, dqk], (1, 1))
            if call.biased:
                half += tile[...]
            weights = half + half * jnp.tanh(half)
            if masked:
                weights = jnp.where(tiles.is_visible(tile[...]), weights, 0)
            total[:, dv] += dot(weights.astype(v.dtype), values, (1, 0))

    @pl.when(kind.first)
    def _():
        total[...] = jnp.zeros_like(total)
        tiles.keep_columns(columns, queries)

    if times is not None:
        times.begin()
    tiles.each_kind(call, kind, fill, attend)

    @pl.when(kind.last)
    def _():
        out[...] = (total[...] * (1 / call.divisor)).astype(out.dtype)


def forward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    prepared: Prepared,
) -> jax.Array:
    """Output [B, T, H · Dv] of the heads at ``call.starts`` of q, k and v [B, T, columns]."""
    tables, tree = jax.tree.flatten(make_tables(position_bias, time_bias, call.block, by_key=False))
    work, at = prepared.by_query, tiles.BlockSpecs(call)
    return pl.pallas_call(
        functools.partial(_kernel, call, tree),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(at.groups, work.steps),
            in_specs=[
                at.query(call.dqk, call.starts[0]),
                at.key(call.dqk, call.starts[1]),
                at.key(call.dv, call.starts[2]),
                at.query_fields(),
                at.key_fields(),
                *([at.squares()] * bool(call.buckets)),
                *(at.whole(table) for table in tables),
            ],
            out_specs=at.query(call.dv),
            scratch_shapes=[
                pltpu.VMEM((call.block, call.group * call.dv), jnp.float32),
                pltpu.VMEM((call.block, call.block), jnp.float32),
                pltpu.VMEM((tiles.QUERY_FIELDS, call.block, LANES), jnp.int32),
            ],
        ),
        out_shape=tiles.like(v, (*v.shape[:2], call.heads * call.dv)),
        compiler_params=tiles.compiler_params(),
        name="hstu_forward",
    )(*work[:4], q, k, v, prepared.queries, prepared.keys, *([work.squares] * bool(call.buckets)), *tables)
