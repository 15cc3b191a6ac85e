"""One small integer per pair of tokens that holds its mask and its entry in both bias tables."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.buckets import REACHABLE, time_bucket
from kernels_pallas.hstu_attention.tokens import Keys, Queries, Tokens, attributes, sees

BLOCK = 64  # query rows per block


def row_blocks(length: int, block: int = BLOCK) -> list[slice]:
    """Slices that cover ``range(length)`` in blocks of near-equal size, none longer than ``block``."""
    count = -(-length // block)
    edges = [round(i * length / count) for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class Tables(NamedTuple):
    """What of the bias tables visible pairs can reach; all static.

    Attributes:
      positions: n of the position table [2n - 1], 0 without one.
      later: its n - 1 entries for keys at later positions count too. A causal query meets none.
      buckets: entries of the time table, 0 without one.
    """

    positions: int
    later: bool
    buckets: int

    @property
    def behind(self) -> int:
        """Entries for keys at later positions."""
        return max(self.positions - 1, 0) if self.later else 0

    @property
    def hidden(self) -> int:
        """The code of a pair that the mask hides, which is the number of entries before it."""
        return max(self.positions + self.behind, 1) * max(self.buckets, 1)


def tables(tokens: Tokens, positions: int, buckets: int) -> Tables:
    """The reach of tables of n = ``positions`` and ``buckets`` entries."""
    return Tables(positions, tokens.high is not None, min(buckets, REACHABLE))


def codes(reach: Tables, queries: Queries, keys: Keys, index: jax.Array) -> jax.Array:
    """Codes (int32) of pairs, elementwise with broadcasting; ``index`` is the keys' place in their row.

    A code is ``distance * max(buckets, 1) + bucket``, an index into `joint_table`, the distance counting up from the
    query's own position backwards; pairs that the mask hides hold the last index.
    """
    seen = sees(*queries[:4], keys.rank, index)
    code = jnp.int32(0)
    if reach.positions:
        back = queries.position - keys.position
        code = jnp.clip(back + reach.behind, 0, reach.positions - 1 + reach.behind)
    if reach.buckets:
        code = code * reach.buckets + jnp.minimum(time_bucket(queries.time, keys.time), reach.buckets - 1)
    return jnp.where(seen, code, reach.hidden)


def pair_codes(tokens: Tokens, rows: slice, columns: slice, reach: Tables) -> jax.Array:
    """`codes` [B, rows, columns] in the smallest unsigned type that holds them."""
    queries, keys = attributes(tokens)
    index = jnp.arange(tokens.segment.shape[-1], dtype=jnp.int32)
    found = codes(
        reach,
        Queries(*(x[:, rows, None] for x in queries)),
        Keys(*(x[:, None, columns] for x in keys)),
        index[columns],
    )
    kind = jnp.uint8 if reach.hidden < 2**8 else jnp.uint16 if reach.hidden < 2**16 else jnp.uint32
    return found.astype(kind)


def joint_table(
    reach: Tables, position_bias: jax.Array | None, time_bias: jax.Array | None, hidden: float, dtype: jnp.dtype
) -> jax.Array:
    """One table [distances * buckets + 1] holding every sum of the two tables; its last entry is ``hidden``.

    One look-up per pair then yields bias and mask together, and one scatter yields the gradient of both tables
    (autodiff of this function splits it).
    """
    table = jnp.zeros((1, 1), dtype)
    if position_bias is not None:
        # row = position_q - position_k, rising
        table = table + position_bias[: reach.positions + reach.behind][::-1, None].astype(dtype)
    if time_bias is not None:
        table = table + time_bias[None, : reach.buckets].astype(dtype)
    return jnp.concatenate([table.reshape(-1), jnp.full(1, hidden, dtype)])
