"""What this machine is and can do: its own matrix-multiply rate is the yardstick of achieved FLOP/s."""

import functools
import os
import platform
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp


def device_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What trials run on: the accelerator's kind, or the processor and how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.M) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{named[1] if named else platform.machine()}, {cores} core{'s' if cores > 1 else ''}"


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
