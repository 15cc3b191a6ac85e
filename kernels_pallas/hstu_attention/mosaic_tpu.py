"""HSTU attention on TPU: Pallas kernels over a list of non-empty tiles, a group of heads per step.

q, k and v are read where they lie, as columns of [B, T, C]; a step of the grid takes one tile for all heads of a group,
so that mask and bias are worked out once for them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention import mosaic_tpu_tiles as tiles
from kernels_pallas.hstu_attention.columns import Columns, alone, flat
from kernels_pallas.hstu_attention.mosaic_tpu_backward import backward
from kernels_pallas.hstu_attention.mosaic_tpu_backward import vmem_bytes as backward_bytes
from kernels_pallas.hstu_attention.mosaic_tpu_forward import forward
from kernels_pallas.hstu_attention.mosaic_tpu_forward import vmem_bytes as forward_bytes
from kernels_pallas.hstu_attention.mosaic_tpu_tiles import LANES, Call, Prepared
from kernels_pallas.hstu_attention.plan import Plan

prepare = tiles.prepare
READS_COLUMNS = True
_TILES_LIMIT = 2**15  # entries of a work list: four int32 each take half of the scalar memory
_GROUP = 4  # heads per step


def hstu(
    q: jax.Array | Columns,
    k: jax.Array | Columns,
    v: jax.Array | Columns,
    plan: Plan,
    *,
    divisor: float,
    alpha: float,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> jax.Array:
    """See `api.hstu_attention`. Visible pairs must be less than 2³¹ seconds apart."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bfloat16 or float32 throughout, got {q.dtype}, {k.dtype}, {v.dtype}")
    _, length, heads, dqk = q.shape
    prepared = plan.prepared["mosaic_tpu"]
    if len(prepared.by_query.row) > _TILES_LIMIT:
        raise NotImplementedError(
            f"{len(prepared.by_query.row)} tiles are more than the {_TILES_LIMIT} a list may hold"
        )
    call = Call(
        block=tiles.block_size(length),
        blocks=-(-length // tiles.block_size(length)),
        heads=heads,
        group=heads,
        starts=(0, 0, 0),
        dqk=dqk,
        dv=v.shape[3],
        itemsize=q.dtype.itemsize,
        alpha=alpha,
        divisor=divisor,
        positions=0 if position_bias is None else (position_bias.shape[0] + 1) // 2,
        buckets=0 if time_bias is None else time_bias.shape[0],
    )
    calls = [_grouped(call, vmem_bytes) for vmem_bytes in (forward_bytes, backward_bytes)]
    views = [_readable(flat(x), calls) for x in (q, k, v)]
    starts = views[0].start, views[1].start, views[2].start
    placed = calls[0]._replace(starts=starts), calls[1]._replace(starts=starts)
    return _attend(placed, *(x.array for x in views), position_bias, time_bias, prepared).reshape(v.shape)


def _readable(x: Columns, calls: list[Call]) -> Columns:
    """The columns where they lie, if they are whole blocks of each call's groups of heads; else on their own."""
    blocks = [call.group * x.width for call in calls]
    return x if all(lanes % LANES == 0 and x.start % lanes == 0 for lanes in blocks) else alone(x)


def _grouped(call: Call, vmem_bytes: Callable[[Call], int]) -> Call:
    """The call with as many heads per step as fit: their lanes must fill registers, or be all there are."""
    heads = call.group
    legal = [
        group
        for group in range(heads, 0, -1)
        if heads % group == 0 and (group == heads or group * call.dqk % LANES == group * call.dv % LANES == 0)
    ]
    preferred = [group for group in legal if group <= _GROUP] or legal[-1:]
    for group in preferred:
        sized = call._replace(group=group)
        if vmem_bytes(sized) <= tiles.VMEM_BUDGET:
            return sized
    raise NotImplementedError(
        f"rows of {call.blocks * call.block} tokens and {preferred[-1]} heads of {call.dqk} and {call.dv} need "
        f"{vmem_bytes(sized) >> 20} MiB of the {tiles.VMEM_BUDGET >> 20} there are on chip"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    calls: tuple[Call, Call],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
    prepared: Prepared,
) -> jax.Array:
    """Attention of columns of q, k and v [B, T, C]: [B, T, H · Dv]; ``calls`` of the forward and the backward pass."""
    return _output(calls[0], q, k, v, position_bias, time_bias, prepared)


# Compiled functions of their own: layers of one shape share one lowering.
_output = jax.jit(forward, static_argnums=(0,))
_gradients = jax.jit(backward, static_argnums=(0,))


def _attend_forward(calls: tuple[Call, Call], *arrays: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _attend(calls, *arrays), arrays


def _attend_backward(
    calls: tuple[Call, Call], arrays: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    dq, dk, dv, d_position, d_time = _gradients(calls[1], d_out, *arrays)
    placed = (_placed(d, x.shape[2], start) for d, x, start in zip((dq, dk, dv), arrays, calls[1].starts))
    return *placed, d_position, d_time, None


def _placed(gradient: jax.Array, width: int, start: int) -> jax.Array:
    """The gradient [B, T, width] of an array, from that of the columns [B, T, H · D] read of it."""
    return jnp.pad(gradient, ((0, 0), (0, 0), (start, width - start - gradient.shape[2])))


_attend.defvjp(_attend_forward, _attend_backward)
