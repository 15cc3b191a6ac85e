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


def time_bucket(query_time: jax.Array, key_time: jax.Array) -> jax.Array:
    """Bucket (int32, 0..73) of the distance of two int32 times in seconds, elementwise with broadcasting.

    The distance is taken in uint32, where it cannot overflow even between the two ends of int32. A float32 logarithm
    guesses the bucket to within one, and the thresholds on either side of the guess decide.
    """
    later = jnp.maximum(query_time, key_time).astype(jnp.uint32)
    earlier = jnp.minimum(query_time, key_time).astype(jnp.uint32)
    distance = jnp.maximum(later - earlier, 1)
    last = len(thresholds())
    guess = (jnp.log(distance.astype(jnp.float32)) * (1 / _WIDTH)).astype(jnp.int32)
    guess = jnp.clip(guess, 0, last)
    entries = np.concatenate([[0], thresholds(), [_LARGEST]]).astype(np.uint32)  # bucket b begins at entries[b]
    begins = jnp.asarray(entries)
    too_high = distance < begins.at[guess].get(mode="promise_in_bounds")
    too_low = distance >= begins.at[guess + 1].get(mode="promise_in_bounds")
    return jnp.minimum(guess - too_high + too_low, last)
