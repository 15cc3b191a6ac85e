"""Which entries dropout keeps."""

import math
from typing import NamedTuple

import jax
import jax.extend.random
import jax.numpy as jnp


class Part(NamedTuple):
    """Where along axis 1 an array lies in a larger one, and how long that one is there: a device's share."""

    start: jax.Array
    whole: int


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float, part: Part | None = None) -> jax.Array:
    """bool of ``shape``, False with probability ``rate``, which is rounded to a multiple of 2^-16.

    An entry costs 16 random bits, half of what a uniform float does. With a ``part`` of a larger array the mask is that
    part of the larger mask (what lies past its end is arbitrary), at the cost of the part's entries alone if it can be.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32) if part is None else _words(key, shape, part)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size].reshape(shape)
    # Drawn once: XLA's CPU would draw the bits again in every fusion that reads the mask, forward and backward.
    return jax.lax.optimization_barrier(halves >= round(rate * 2**16))


def _words(key: jax.Array, shape: tuple[int, ...], part: Part) -> jax.Array:
    """The random words of the entries of a part: word n of `jax.random.bits` is a hash of n and the key alone."""
    batch, own, *inner = shape
    width = math.prod(inner)
    entries = batch * part.whole * width
    if width % 2 or entries >= 2**33:  # a word across rows, or a number of more than 32 bits
        words = jax.random.bits(key, (-(-entries // 2),), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:entries].reshape(batch, -1, width)
        some = jax.lax.dynamic_slice_in_dim(jnp.pad(halves, ((0, 0), (0, own), (0, 0))), part.start, own, 1)
        flat = jnp.pad(some.reshape(-1), (0, some.size % 2))
        return jax.lax.bitcast_convert_type(flat.reshape(-1, 2), jnp.uint32)
    row = jnp.arange(batch, dtype=jnp.uint32)[:, None, None] * jnp.uint32(part.whole * width // 2)
    place = (jnp.arange(own, dtype=jnp.uint32) + part.start.astype(jnp.uint32))[:, None] * jnp.uint32(width // 2)
    count = (row + place + jnp.arange(width // 2, dtype=jnp.uint32)).reshape(-1)
    pair = jax.extend.random.threefry_2x32(jax.random.key_data(key), jnp.concatenate([jnp.zeros_like(count), count]))
    return pair[: len(count)] ^ pair[len(count) :]
