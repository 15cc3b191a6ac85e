"""What all layers of one step share: for every pair of tokens, its mask and its entry in the bias tables.

Bucketing times and comparing segments costs as much as a layer's own attention, and none of it depends on a layer's
parameters. A model calls `plan` once per batch and hands the result to each layer in place of the tokens.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.buckets import time_bucket
from kernels_pallas.hstu_attention.tokens import Tokens, visible

BLOCK = 64  # query rows per block of the blocked backends


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "codes"),
    meta_fields=("positions", "buckets"),
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens with the pair codes derived from them; build it with `plan`.

    Attributes:
      tokens: the tokens themselves.
      codes: one array [B, rows, keys] per block of query rows, keys being the causal prefix of the block. A code is
        ``distance * max(buckets, 1) + bucket``, an index into the joint bias table (see `joint_table`); pairs that
        the mask hides hold the last index.
      positions: n of the position table [2n - 1] the codes are for, 0 without a position bias.
      buckets: length of the time table the codes are for, 0 without a time bias.
    """

    tokens: Tokens
    codes: tuple[jax.Array, ...]
    positions: int
    buckets: int


def row_blocks(length: int, block: int = BLOCK) -> list[slice]:
    """Slices that cover ``range(length)`` in blocks of near-equal size, none longer than ``block``."""
    count = -(-length // block)
    edges = [round(i * length / count) for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def plan(tokens: Tokens, *, positions: int = 0, buckets: int = 0) -> Plan:
    """Prepares the pairs of a batch once for all layers of a step.

    Args:
      tokens: attributes of each token, [B, T].
      positions: n of the position bias tables [2n - 1] that the layers will pass, 0 for none.
      buckets: length of the time bias tables that the layers will pass (`TIME_BUCKETS`), 0 for none.

    Raises:
      ValueError: a negative size, or token fields of different shapes.
    """
    if positions < 0 or buckets < 0:
        raise ValueError(f"table sizes must not be negative: positions={positions}, buckets={buckets}")
    if len({field.shape for field in tokens}) != 1 or tokens.segment.ndim != 2:
        raise ValueError(f"token fields must share one shape [B, T], got {[f.shape for f in tokens]}")
    blocks = row_blocks(tokens.segment.shape[1])
    codes = tuple(_codes(tokens, rows, positions, buckets) for rows in blocks)
    return Plan(tokens, codes, positions, buckets)


def _codes(tokens: Tokens, rows: slice, positions: int, buckets: int) -> jax.Array:
    """Codes [B, rows, keys] of one block of rows against its causal prefix, in the smallest unsigned type."""
    columns = slice(0, rows.stop)
    seen = visible(tokens, rows, columns)
    code = jnp.zeros(seen.shape, jnp.int32)
    if positions:
        # Visible keys never lie later in the order, so only the half of the table at or below zero is reachable.
        code += jnp.clip(tokens.order[:, rows, None] - tokens.order[:, None, columns], 0, positions - 1)
    if buckets:
        bucket = time_bucket(tokens.query_time[:, rows, None], tokens.key_time[:, None, columns])
        code = code * buckets + jnp.minimum(bucket, buckets - 1)
    hidden = max(positions, 1) * max(buckets, 1)
    kind = jnp.uint8 if hidden < 2**8 else jnp.uint16 if hidden < 2**16 else jnp.uint32
    return jnp.where(seen, code, hidden).astype(kind)


def joint_table(
    position_bias: jax.Array | None, time_bias: jax.Array | None, hidden: float, dtype: jnp.dtype
) -> jax.Array:
    """One table [positions * buckets + 1] holding every sum of the two tables; its last entry is ``hidden``.

    One look-up per pair then yields bias and mask together, and one scatter yields the gradient of both tables
    (autodiff of this function splits it).
    """
    table = jnp.zeros((1, 1), dtype)
    if position_bias is not None:
        reach = (position_bias.shape[0] + 1) // 2
        table = table + position_bias[:reach][::-1, None].astype(dtype)  # row = order_q - order_k >= 0
    if time_bias is not None:
        table = table + time_bias[None, :].astype(dtype)
    return jnp.concatenate([table.reshape(-1), jnp.full(1, hidden, dtype)])
