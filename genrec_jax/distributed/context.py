"""Context parallelism: devices divide the tokens of every row among them, and for attention its heads.

Between its attentions a block works on each token alone, so a device keeps a chunk of every row. For attention the
devices exchange: each gets all tokens of its share of the heads, and after it all heads of its chunk again (Jacobs et
al., "DeepSpeed Ulysses", 2023). No device ever holds a whole row's activations, every pair of tokens is worked on by
the same number of heads, whatever the mask, and the kernels are those of one device.

All of it is for functions inside `jax.shard_map`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed import crossing
from genrec_jax.nn.cost import Cost, Exchange
from kernels_pallas.gated_norm import Part
from kernels_pallas.hstu_attention import Columns, heads_apart

Heads = jax.Array | Columns  # [B, T, H, D]
Attention = Callable[[Heads, Heads, Heads], jax.Array]


class Context(NamedTuple):
    """The mesh axis that divides the tokens of a row, and how many devices it has; with one, nothing is done."""

    axis: str = ""
    size: int = 1

    def chunk(self, length: int) -> int:
        """Tokens of a row of ``length`` that a device holds; the last chunks may end in padding."""
        return -(-length // self.size)

    def divided(self, x: jax.Array) -> jax.Array:
        """The device's chunk [B, t, ...] of the same x [B, T, ...] on every device; cotangents are put together."""
        return x if self.size == 1 else crossing.own(_padded(x, self.size * self.chunk(x.shape[1])), self.axis, 1)

    def together(self, x: jax.Array, length: int) -> jax.Array:
        """Chunks [B, t, ...] -> all ``length`` tokens on every device; of a cotangent each takes its own chunk."""
        return x if self.size == 1 else crossing.whole(x, self.axis, 1)[:, :length]

    def shared[M: nnx.Module](self, module: M) -> M:
        """The module, used by every device on its own tokens: its parameters' derivatives are summed over them."""
        if self.size == 1:
            return module
        state: Any = nnx.split(module, nnx.Param, ...)
        graph, params, rest = state
        return nnx.merge(graph, jax.tree.map(lambda x: crossing.shared(x, self.axis), params), rest)

    def attend(self, attention: Attention, q: Heads, k: Heads, v: Heads, length: int) -> jax.Array:
        """``attention(q, k, v)`` over all ``length`` tokens, of chunks [B, t, H, D]; H is a multiple of ``size``."""
        if self.size == 1:
            return attention(q, k, v)
        whole = [self._exchange(heads_apart(x), 2, 1)[:, :length] for x in (q, k, v)]
        return self._exchange(_padded(attention(*whole), self.size * self.chunk(length)), 1, 2)

    def _exchange(self, x: jax.Array, divide: int, join: int) -> jax.Array:
        return jax.lax.all_to_all(x, self.axis, divide, join, tiled=True)

    def tokens(self, length: int) -> Part | None:
        """Which tokens of rows of ``length`` the device's chunk holds; None for all."""
        return None if self.size == 1 else Part(self._index() * self.chunk(length), length)

    def heads(self, heads: int, among: Part | None = None) -> Part | None:
        """Which of the ``heads`` the device attends with; None for all. ``among``: where these are in a larger number
        of heads, which the answer is then about."""
        if self.size == 1:
            return among
        start, whole = (0, heads) if among is None else among
        return Part(start + self._index() * (heads // self.size), whole)

    def cost(self, token_bytes: float, widths: Sequence[int]) -> Cost:
        """Of :meth:`attend`: q, k, v and its result have these ``widths``; ``token_bytes``: of one number of each of a
        chunk's tokens."""
        if self.size == 1:
            return Cost()
        sizes = [token_bytes * width for width in widths]
        return Cost(exchanges=tuple(Exchange("all-to-all", self.axis, size, size) for size in sizes))

    def joined(self, chunk_bytes: float) -> Cost:
        """Of :meth:`divided`, whose cotangents are put together, and :meth:`together`."""
        whole = chunk_bytes * self.size
        return Cost(exchanges=(Exchange("all-gather", self.axis, whole, whole),)) if self.size > 1 else Cost()

    def _index(self) -> jax.Array:
        return jax.lax.axis_index(self.axis)


ALONE = Context()


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
