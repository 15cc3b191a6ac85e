"""Which entries dropout keeps."""

import math

import jax
import jax.numpy as jnp


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """bool of ``shape``, False with probability ``rate``, which is rounded to a multiple of 2^-16.

    An entry costs 16 random bits, half of what a uniform float does.
    """
    size = math.prod(shape)
    bits = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:size].reshape(shape)
    # Drawn once: XLA's CPU would draw the bits again in every fusion that reads the mask, forward and backward.
    return jax.lax.optimization_barrier(halves >= round(rate * 2**16))
