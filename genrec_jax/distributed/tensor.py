"""Tensor parallelism: devices divide a block's heads, its hidden units and a head's experts among them.

As in Shoeybi et al., "Megatron-LM", 2019: the map into the heads is divided by its outputs, the map out of them by its
inputs, and what the devices have of its result is summed, once per block and pass. A normalisation over all heads sums
its two statistics. What stands between (residual, normalisations of it, embeddings, loss) every device repeats.

Parameters are stored along an axis that is not theirs to compute with: each device holds rows of a matrix of whose
columns it needs some, and they exchange them at the start of a step (`Tensor.taken`). So a parameter looks the same on
every mesh, whatever stands side by side in its columns, and no device ever holds a whole one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genrec_jax.distributed import crossing
from genrec_jax.nn.cost import Cost, Exchange
from kernels_pallas.gated_norm import Part, keep_mask

# Which axis of a parameter its device's heads, hidden units or experts are along: by the last names of its place in a
# model, of which None stands for any number. All other parameters are used whole by every device.
AXES: tuple[tuple[tuple[str | int | None, ...], int], ...] = (
    (("blocks", None, "project", "kernel"), 1),
    (("blocks", None, "project", "bias"), 0),
    (("blocks", None, "out", "kernel"), 0),
    (("blocks", None, "inner", "kernel"), 1),
    (("blocks", None, "inner", "bias"), 0),
    (("blocks", None, "outer", "kernel"), 0),
    (("blocks", None, "ffn", "layers", 0, "kernel"), 1),
    (("blocks", None, "ffn", "layers", 0, "bias"), 0),
    (("blocks", None, "ffn", "layers", 1, "kernel"), 0),
    (("levels", None, "experts", None, "kernel"), 0),
    (("levels", None, "experts", None, "bias"), 0),
)


class Division(NamedTuple):
    """How devices take a parameter apart: along ``axis``, each a part of every one of ``sections`` (their lengths)."""

    axis: int
    sections: tuple[int, ...]


def place(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys of a tree's path."""
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)


def axis_of(path: tuple[Any, ...]) -> int | None:
    """Of a parameter, or of what an optimiser keeps of it, by its tree path or its keys; None if it is used whole."""
    names = place(path)
    for rule, axis in AXES:
        end = names[-len(rule) :]
        if len(end) == len(rule) and all(_fits(name, want) for name, want in zip(end, rule, strict=True)):
            return axis
    return None


def _fits(name: Any, want: str | int | None) -> bool:
    return isinstance(name, int) if want is None else name == want


class Tensor(NamedTuple):
    """The mesh axis that divides heads, hidden units and experts, and how many devices it has; with one, nothing is
    done."""

    axis: str = ""
    size: int = 1

    def share(self, number: int) -> int:
        """How many of the ``number`` of heads, units or experts are a device's."""
        return number // self.size

    def enter(self, x: jax.Array) -> jax.Array:
        """x, the same on every device, where the devices go their own ways."""
        return x if self.size == 1 else crossing.shared(x, self.axis)

    def leave(self, x: jax.Array) -> jax.Array:
        """The sum of the devices' parts, where their ways meet again."""
        return x if self.size == 1 else crossing.reduced(x, self.axis)

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """The device's part of x, the same on every device, of whose entries along ``axis`` each needs its own."""
        return x if self.size == 1 else crossing.own(x, self.axis, axis)

    def together(self, x: jax.Array, axis: int) -> jax.Array:
        """The devices' heads, units or experts, put together along ``axis``, where their ways meet again."""
        return x if self.size == 1 else crossing.whole(x, self.axis, axis)

    def mean(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """The mean over ``axes`` of all devices' parts, for each to go on with; the axes stay, with length 1."""
        own = x.mean(axes, keepdims=True)
        return own if self.size == 1 else jax.lax.psum(own, self.axis) / self.size

    def part(self, number: int) -> Part | None:
        """Which of the ``number`` of heads or units are the device's; None for all."""
        return None if self.size == 1 else Part(self._index() * self.share(number), number)

    def cost(self, sum_bytes: float, *, forward: int, backward: int) -> Cost:
        """Of as many sums over the devices, each of so many bytes, in either pass."""
        if self.size == 1:
            return Cost()
        return Cost(exchanges=(Exchange("all-reduce", self.axis, forward * sum_bytes, backward * sum_bytes),))

    def keep(self, key: jax.Array, shape: tuple[int, ...], rate: float, part: Part | None = None) -> jax.Array:
        """The mask of dropout [B, T, units] of the device's units: that part of the mask of all units; ``part``: which
        of a row's tokens, None for all."""
        if self.size == 1:
            return keep_mask(key, shape, rate, part)
        *rows, own = shape
        if part is None:  # entry by entry, at the cost of these alone
            return keep_mask(key, (math.prod(rows), 1, own), rate, Part(self._index(), self.size)).reshape(shape)
        mask = keep_mask(key, (*rows, own * self.size), rate, part)
        return jax.lax.dynamic_slice_in_dim(mask, self._index() * own, own, len(rows))

    def taken(self, x: jax.Array, division: Division | None, stored: int | None) -> jax.Array:
        """What the device computes with of a parameter: its part, or all of it without a ``division``. x: its share
        along an axis, ``stored``, that is not the division's; the whole parameter if that is None."""
        if division is None:
            return x if stored is None else crossing.whole(x, self.axis, stored)
        dealt = self._dealt(x, division)
        if stored is None:
            return crossing.own(dealt, self.axis, division.axis)
        return jax.lax.all_to_all(dealt, self.axis, split_axis=division.axis, concat_axis=stored, tiled=True)

    def _dealt(self, x: jax.Array, division: Division) -> jax.Array:
        """x with the first device's part of every section, then the second's, and so on."""
        axis, sections = division
        if len(sections) == 1:
            return x
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        starts = [sum(sections[:n]) for n in range(1, len(sections))]
        parts = [part.reshape(*before, self.size, -1, *after) for part in jnp.split(x, starts, axis)]
        return jnp.concatenate(parts, axis + 1).reshape(x.shape)

    def _index(self) -> jax.Array:
        return jax.lax.axis_index(self.axis)


UNDIVIDED = Tensor()
