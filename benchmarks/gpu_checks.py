"""Checks one backend on one small batch: error against float64, exact zeros in padding, the same bits every run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_attention import plain_hstu
from benchmarks.gpu_cases import Check, Job
from kernels_pallas.hstu_attention import TIME_BUCKETS, Tokens, hstu_attention, jagged_tokens

HEADS, PADDING, ALPHA, DIVISOR, POSITIONS = 2, 50, 0.1, 40.0, 100
RUNS = 5
# A backend may have this many times the error of the dense definition in the same precision.
_FACTORS = {"out": 2.0, "dq": 5.0, "dk": 5.0, "dv": 5.0, "dposition": 5.0, "dtime": 5.0}

Arrays = dict[str, np.ndarray]


def run_check(job: Job) -> dict[str, Any]:
    """Worst error over the allowed one, and what went wrong, if anything."""
    assert job.check is not None
    check, dtype = job.check, job.dtype
    tokens, inputs = _tokens(check), _inputs(check, dtype)

    def backend(tokens: Tokens, q: jax.Array, k: jax.Array, v: jax.Array, *tables: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(zip(("position_bias", "time_bias"), tables))
        return hstu_attention(
            q, k, v, tokens, max_len=DIVISOR, alpha=ALPHA, implementation=job.implementation, **options
        )

    # In full float32: a GPU would round float32 products to tf32 by default, and rounding is not what is checked.
    with jax.default_matmul_precision("highest"):
        step = jax.jit(_with_gradients(backend)).lower(tokens, *inputs).compile()
        first = _named(step(tokens, *inputs))
        changed = {
            name
            for _ in range(RUNS - 1)
            for name, value in _named(step(tokens, *inputs)).items()
            if value.tobytes() != first[name].tobytes()
        }
    ratios = _error_ratios(first, check, dtype)
    real = np.asarray(tokens.segment != 0)
    dirty = [name for name in ("out", "dq", "dk", "dv") if first[name][~real].any()]
    problems = [f"{name}: error {ratio:.2f} x allowed" for name, ratio in ratios.items() if not ratio <= 1]
    problems += [f"{name}: padding is not zero" for name in dirty]
    problems += [f"{name}: differs from run to run" for name in sorted(changed)]
    return {
        "passed": not problems,
        "worst_error_over_allowed": max(ratios.values()),
        "errors_over_allowed": ratios,
        "runs": RUNS,
        "note": "; ".join(problems),
    }


def _tokens(check: Check) -> Tokens:
    lengths = np.array(check.lengths)
    offsets, total = np.concatenate([[0], lengths.cumsum()]), int(lengths.sum()) + PADDING
    seconds = np.random.default_rng(2).choice([0, 1, 50, 4000, 90_000, 3_000_000], total).cumsum()
    options = {"window": check.window, "full_len": check.full_len, "context_len": check.context_len}
    make = jax.jit(lambda o, s, n: jagged_tokens(o, total, num_targets=n, timestamps=s, **options))
    targets = np.array(check.targets, np.int32) if check.targets else None
    return make(offsets.astype(np.int32), seconds.astype(np.int32), targets)


def _inputs(check: Check, dtype: str, poison: float = float("nan")) -> list[jax.Array]:
    """q, k, v, the cotangent and the tables; padding holds ``poison``."""
    rng = np.random.default_rng(3)
    total = sum(check.lengths)
    arrays = []
    for width in (check.qk_dim, check.qk_dim, check.v_dim, check.v_dim):
        values = np.full((1, total + PADDING, HEADS, width), poison)
        values[:, :total] = rng.normal(size=(1, total, HEADS, width))
        arrays.append(jnp.asarray(values, dtype))
    sizes = (2 * POSITIONS - 1, TIME_BUCKETS) if check.bias else ()
    return [*arrays, *(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)]


def _with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def step(tokens: Tokens, q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, *rest: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(attend, tokens), q, k, v, *rest)
        return (out, *pull(cotangent))

    return step


def _named(values: tuple[jax.Array, ...]) -> Arrays:
    return {name: np.asarray(value) for name, value in zip(_FACTORS, values)}


def _error_ratios(got: Arrays, check: Check, dtype: str) -> dict[str, float]:
    """Largest error of each result over the largest allowed one; NaN where a result holds NaN."""
    exact, plain = _exact(check, dtype), _plain(check, dtype)
    ratios = {}
    for name, value in got.items():
        error, usual = (np.abs(x[name].astype(np.float64) - exact[name]).max() for x in (got, plain))
        # Half a unit in the last place of the largest entry: what the exact result itself loses by being stored.
        stored = 0.5 * float(jnp.finfo(value.dtype).eps) * np.abs(exact[name]).max()
        ratios[name] = float(error / (_FACTORS[name] * max(usual, stored)))
    return ratios


@functools.cache
def _exact(check: Check, dtype: str) -> Arrays:
    """The dense definition in float64 on the CPU, of the inputs as ``dtype`` rounds them."""
    rounded = [np.asarray(x, np.float64) for x in _inputs(check, dtype, poison=0.0)]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return _dense(check, [jnp.asarray(x, jnp.float64) for x in rounded])


@functools.cache
def _plain(check: Check, dtype: str) -> Arrays:
    with jax.default_matmul_precision("highest"):
        return _dense(check, _inputs(check, dtype, poison=0.0))


def _dense(check: Check, inputs: list[jax.Array]) -> Arrays:
    step = _with_gradients(lambda tokens, q, k, v, *tables: plain_hstu(q, k, v, tables, tokens, ALPHA, DIVISOR))
    return _named(jax.jit(step)(_tokens(check), *inputs))
