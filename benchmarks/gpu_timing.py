"""Wall-clock timing of device work, and the machine's own ceilings.

Each timing enqueues a program many times and waits once, so that neither dispatch nor the wait counts: the device
works through its queue while Python fills it. The programs are ordinary compiled functions whose outputs are all
written; a loop inside the program would leave the compiler free to hoist, alias or copy what is measured. Short
operations are put into one program several times, each on inputs of its own, which also keeps them out of the cache.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Effort(NamedTuple):
    """samples: timings wanted; sample_seconds: length of each; limit: stop early after so many seconds."""

    samples: int = 50
    sample_seconds: float = 0.006
    limit: float = 1.5
    fewest: int = 4


QUICK = Effort(samples=3, sample_seconds=0.001, limit=0.3, fewest=2)


class Times(NamedTuple):
    """Seconds of one program: the tenth percentile and the median of ``samples`` means over ``runs`` runs each.

    dispatch: seconds of this process's own work to enqueue one; on a CPU the program's own time, which is not
    asynchronous there.
    """

    p10: float
    median: float
    samples: int
    runs: int
    dispatch: float


def measure(run: Callable[[], Any], effort: Effort) -> Times:
    """Times ``run``, which enqueues one program and returns its outputs."""
    warm = time.perf_counter() + min(0.1, effort.limit / 4)  # clocks and caches settle under load
    jax.block_until_ready(run())
    while time.perf_counter() < warm:
        jax.block_until_ready(run())
    start = time.perf_counter()
    queued = [run() for _ in range(2)]
    dispatch = (time.perf_counter() - start) / len(queued)
    jax.block_until_ready(queued)
    del queued
    runs = max(1, min(2000, round(effort.sample_seconds / _sample(run, 2))))
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < effort.samples:
        if len(found) >= effort.fewest and time.perf_counter() - begin > effort.limit:
            break
        found.append(_sample(run, runs))
    return Times(sorted(found)[len(found) // 10], statistics.median(found), len(found), runs, dispatch)


def _sample(run: Callable[[], Any], runs: int) -> float:
    """Seconds per run. A device works in order, so the last output is ready after all others."""
    start = time.perf_counter()
    for _ in range(runs):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / runs


def ceilings(quick: bool) -> dict[str, Any]:
    """The machine's matmul and copy rates, what one dispatch costs, and which machine it is."""
    if not quick and jax.default_backend() != "gpu":
        raise NotImplementedError("there is no GPU here; --quick runs tiny cases on any machine")
    effort = QUICK if quick else Effort()
    size, elements = (512, 2**20) if quick else (8192, 2**29)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(jnp.matmul)
    product = measure(lambda: multiply(a, b), effort)
    x = jax.random.normal(jax.random.key(1), (elements,), jnp.bfloat16)
    negate = jax.jit(jnp.negative)  # reads and writes every element, and cannot be answered with the input itself
    copy = measure(lambda: negate(x), effort)
    one = jnp.ones(8)
    dispatch = measure(lambda: negate(one), effort)
    device = jax.devices()[0]
    matmul, bandwidth = 2.0 * size**3 / product.p10 / 1e12, 2.0 * x.nbytes / copy.p10 / 1e12
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "matmul_size": size,
        "matmul_tflops": matmul,
        "copy_tb_s": bandwidth,
        "dispatch_us": 1e6 * dispatch.dispatch,
        "note": f"{size}-square bf16 product {matmul:.4g} TFLOP/s; copy {bandwidth:.3g} TB/s, read and written",
    }
