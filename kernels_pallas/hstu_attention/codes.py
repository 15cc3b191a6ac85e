"""One small integer per pair of tokens that holds its mask and its entry in both bias tables."""

import itertools

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.buckets import time_bucket
from kernels_pallas.hstu_attention.tokens import Tokens, visible

BLOCK = 64  # query rows per block


def row_blocks(length: int, block: int = BLOCK) -> list[slice]:
    """Slices that cover ``range(length)`` in blocks of near-equal size, none longer than ``block``."""
    count = -(-length // block)
    edges = [round(i * length / count) for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def distances(tokens: Tokens, positions: int) -> int:
    """Entries of a position table [2n - 1] that visible pairs can reach: a causal query meets no later position."""
    return positions if tokens.high is None else max(2 * positions - 1, 0)


def pair_codes(tokens: Tokens, rows: slice, columns: slice, positions: int, buckets: int) -> jax.Array:
    """Codes [B, rows, columns] in the smallest unsigned type that holds them.

    A code is ``distance * max(buckets, 1) + bucket``, an index into `joint_table`, the distance counting up from the
    query's own position backwards; pairs that the mask hides hold the last index.
    """
    seen = visible(tokens, rows, columns)
    code = jnp.zeros(seen.shape, jnp.int32)
    if positions:
        position = tokens.order if tokens.position is None else tokens.position
        back = position[:, rows, None] - position[:, None, columns]
        behind = distances(tokens, positions) - positions  # entries for keys at later positions
        code += jnp.clip(back + behind, 0, positions - 1 + behind)
    if buckets:
        bucket = time_bucket(tokens.query_time[:, rows, None], tokens.key_time[:, None, columns])
        code = code * buckets + jnp.minimum(bucket, buckets - 1)
    hidden = max(distances(tokens, positions), 1) * max(buckets, 1)
    kind = jnp.uint8 if hidden < 2**8 else jnp.uint16 if hidden < 2**16 else jnp.uint32
    return jnp.where(seen, code, hidden).astype(kind)


def joint_table(
    tokens: Tokens, position_bias: jax.Array | None, time_bias: jax.Array | None, hidden: float, dtype: jnp.dtype
) -> jax.Array:
    """One table [distances * buckets + 1] holding every sum of the two tables; its last entry is ``hidden``.

    One look-up per pair then yields bias and mask together, and one scatter yields the gradient of both tables
    (autodiff of this function splits it).
    """
    table = jnp.zeros((1, 1), dtype)
    if position_bias is not None:
        reach = distances(tokens, (position_bias.shape[0] + 1) // 2)
        table = table + position_bias[:reach][::-1, None].astype(dtype)  # row = position_q - position_k, rising
    if time_bias is not None:
        table = table + time_bias[None, :].astype(dtype)
    return jnp.concatenate([table.reshape(-1), jnp.full(1, hidden, dtype)])
