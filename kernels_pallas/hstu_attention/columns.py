"""Heads as a range of columns of a wider array: a kernel reads the parts of a fused projection where they lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("start", "heads", "width"))
@dataclasses.dataclass(frozen=True)
class Columns:
    """``heads`` heads of ``width`` features, side by side from column ``start`` on; an argument of `hstu_attention`.

    Backends that cannot read columns get a copy of them, as if they had been sliced.

    Attributes:
      array: [..., C], with C >= start + heads · width.
      start, heads, width: where the heads lie.
    """

    array: jax.Array
    start: int
    heads: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., H, D], as of the array of these heads alone."""
        return (*self.array.shape[:-1], self.heads, self.width)

    @property
    def ndim(self) -> int:
        return self.array.ndim + 1

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype

    @property
    def lanes(self) -> int:
        """Columns of all heads together."""
        return self.heads * self.width


def flat(x: jax.Array | Columns) -> Columns:
    """[..., H, D] as columns of [..., H · D]."""
    if isinstance(x, Columns):
        return x
    *rows, heads, width = x.shape
    return Columns(x.reshape(*rows, heads * width), 0, heads, width)


def alone(x: Columns) -> Columns:
    """The same heads in an array that holds nothing else."""
    if x.lanes == x.array.shape[-1]:
        return x
    return Columns(x.array[..., x.start : x.start + x.lanes], 0, x.heads, x.width)


def heads_apart(x: jax.Array | Columns) -> jax.Array:
    """[..., H, D] as an array."""
    return alone(x).array.reshape(x.shape) if isinstance(x, Columns) else x
