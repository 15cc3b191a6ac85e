"""What this machine can do: its own matrix-multiply rate, the yardstick of achieved FLOP/s."""

import functools
import time

import jax
import jax.numpy as jnp


@functools.cache
def matmul_peak(dtype: str = "float32") -> float:
    """FLOP/s of a large square matmul on the default device: the median of five, measured once per process."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    multiply = jax.jit(lambda x: x @ x)
    multiply(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / sorted(seconds)[2]
