"""HSTU attention on TPU: Pallas kernels over a list of non-empty tiles, a group of heads per step.

q, k and v are read where they lie, as [B, T, H · D]; a step of the grid takes one tile for all heads of a group, so
that mask and bias are worked out once for them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention import mosaic_tpu_tiles as tiles
from kernels_pallas.hstu_attention.mosaic_tpu_backward import backward
from kernels_pallas.hstu_attention.mosaic_tpu_backward import vmem_bytes as backward_bytes
from kernels_pallas.hstu_attention.mosaic_tpu_forward import forward
from kernels_pallas.hstu_attention.mosaic_tpu_forward import vmem_bytes as forward_bytes
from kernels_pallas.hstu_attention.mosaic_tpu_tiles import LANES, Call, Prepared
from kernels_pallas.hstu_attention.plan import Plan

prepare = tiles.prepare
_TILES_LIMIT = 2**15  # entries of a work list: four int32 each take half of the scalar memory
_GROUP = 4  # heads per step


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
    """See `api.hstu_attention`. Visible pairs must be less than 2³¹ seconds apart."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bfloat16 or float32 throughout, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, length, heads, dqk = q.shape
    prepared = plan.prepared["mosaic_tpu"]
    if len(prepared.by_query.row) > _TILES_LIMIT:
        raise NotImplementedError(
            f"{len(prepared.by_query.row)} tiles are more than the {_TILES_LIMIT} a list may hold"
        )
    call = Call(
        block=tiles.block_size(length),
        blocks=-(-length // tiles.block_size(length)),
        group=heads,
        dqk=dqk,
        dv=v.shape[3],
        itemsize=q.dtype.itemsize,
        alpha=alpha,
        divisor=divisor,
        positions=0 if position_bias is None else (position_bias.shape[0] + 1) // 2,
        buckets=0 if time_bias is None else time_bias.shape[0],
    )
    calls = tuple(_grouped(call, vmem_bytes) for vmem_bytes in (forward_bytes, backward_bytes))
    flat = (x.reshape(batch, length, -1) for x in (q, k, v))
    return _attend(calls, *flat, position_bias, time_bias, prepared).reshape(v.shape)


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
    """Attention of q, k [B, T, H · Dqk] and v [B, T, H · Dv]; ``calls`` of the forward and the backward pass."""
    return forward(calls[0], q, k, v, position_bias, time_bias, prepared)


def _attend_forward(calls: tuple[Call, Call], *arrays: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _attend(calls, *arrays), arrays


def _attend_backward(
    calls: tuple[Call, Call], arrays: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    return *backward(calls[1], d_out, *arrays), None


_attend.defvjp(_attend_forward, _attend_backward)
