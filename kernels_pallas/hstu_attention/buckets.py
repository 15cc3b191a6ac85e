"""Logarithmic time buckets by integer thresholds: exact on every backend, and no logarithm at run time.

The definition is ``clamp(floor(ln(max(|d|, 1)) / 0.301), 0, 128)`` for a difference of d seconds (HSTU,
arXiv 2402.17152, public retrieval code). The logarithm of different machines differs in its last bit, which would move
a pair to a neighbouring bucket; comparing integers cannot.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

TIME_BUCKETS = 129
_WIDTH = 0.301
_LARGEST = 2**32 - 1  # the largest distance of two int32 times


def bucket_formula(difference: int) -> int:
    """The defining formula in float64, for one non-negative difference in seconds."""
    return min(max(math.floor(math.log(max(difference, 1)) / _WIDTH), 0), TIME_BUCKETS - 1)


@functools.cache
def thresholds() -> np.ndarray:
    """uint32 array whose entry b is the smallest difference with ``bucket_formula(difference) >= b + 1``.

    Only the 73 buckets that two int32 times can reach have an entry.
    """
    found = []
    for bucket in range(1, bucket_formula(_LARGEST) + 1):
        low, high = 1, _LARGEST  # invariant: formula(low) < bucket <= formula(high), except low == 1 at the start
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if bucket_formula(middle) >= bucket else (middle + 1, high)
        found.append(low)
    return np.array(found, np.uint32)


REACHABLE = bucket_formula(_LARGEST) + 1  # buckets 0..73; no two int32 times reach a later one
_CELL_SHIFT = 20  # a cell is what a float32's exponent and the three leading bits of its fraction tell of a distance
_FIRST_CELL = 127 << (23 - _CELL_SHIFT)  # of 1.0


@functools.cache
def cells() -> tuple[np.ndarray, np.ndarray]:
    """For each cell of distances: the bucket of its smallest one (int32), and that bucket's largest distance (uint32).

    A cell ends at most 1/8 above its beginning and a bucket 35 % above it, so that a cell meets at most one threshold.
    """
    exponent, eighth = np.divmod(np.arange(32 * 8 + 1), 8)
    begins = np.ldexp(1 + eighth / 8, exponent)
    smallest = np.ceil(begins * (1 - 2.0**-24))  # a float32 may round up into its cell by half a unit of its last place
    bucket = np.searchsorted(thresholds(), smallest, side="right")
    largest = np.append(thresholds() - 1, np.uint32(_LARGEST))[bucket]
    return bucket.astype(np.int32), largest


def time_distance(query_time: jax.Array, key_time: jax.Array) -> jax.Array:
    """Distance of two int32 times, elementwise: in uint32, where it cannot overflow even between the ends of int32."""
    later = jnp.maximum(query_time, key_time).astype(jnp.uint32)
    return later - jnp.minimum(query_time, key_time).astype(jnp.uint32)


def time_bucket(query_time: jax.Array, key_time: jax.Array) -> jax.Array:
    """Bucket (int32, 0..73) of the distance of two int32 times in seconds, elementwise with broadcasting.

    The distance's cell leaves two neighbouring buckets, and the threshold between them decides.
    """
    distance = jnp.maximum(time_distance(query_time, key_time), 1)
    bits = jax.lax.bitcast_convert_type(distance.astype(jnp.float32), jnp.int32)
    cell = (bits >> _CELL_SHIFT) - _FIRST_CELL
    bucket, largest = (jnp.asarray(x).at[cell].get(mode="promise_in_bounds") for x in cells())
    return bucket + (distance > largest)
