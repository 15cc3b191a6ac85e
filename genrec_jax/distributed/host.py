"""What lies in the memory of the host between steps, and how a step works on it.

A step sees from an array's type where it lies, so no function has to be told. What is dense is brought to the device
whole, and taken back. Of arrays with a row for every row of a table the host itself picks out the rows of a step and
puts them back; nothing else of them travels.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compute_on import compute_on

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"  # of memory, as a sharding calls it


def on_host(x: jax.Array) -> bool:
    """Whether an array, or what is traced of it, lies in the host's memory."""
    return jax.typeof(x).memory_space == HOST


def at_host(work: Callable[..., jax.Array], gives: Any) -> Callable[..., jax.Array]:
    """``work`` done by the host, to whose memory its arguments are taken; its result lies in ``gives``, HOST or DEVICE.

    Only for traced functions. The compiler of a TPU works in place on an argument of a jitted function that is given
    up, and on what a loop hands on; in other places it may copy the whole array.
    """
    by_host = compute_on(work, compute_type="device_host", out_memory_spaces=gives)
    return lambda *given: by_host(*(x if on_host(x) else jax.device_put(x, HOST) for x in given))


def fetched(x: jax.Array, after: Any = ()) -> jax.Array:
    """The array, on the device; not before the arrays ``after`` are there."""
    return jax.device_put(jax.lax.optimization_barrier((x, after))[0], DEVICE) if on_host(x) else x


def as_before(x: jax.Array, before: jax.Array) -> jax.Array:
    """The array, where ``before`` lies."""
    return jax.device_put(x, HOST) if on_host(before) else x
