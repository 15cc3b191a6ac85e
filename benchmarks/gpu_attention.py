"""Times one attention operation, forward or backward, of one implementation on one shape."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases import Job, Shape
from benchmarks.gpu_timing import QUICK, Effort, measure
from kernels_pallas.hstu_attention import TIME_BUCKETS, Plan, Tokens, hstu_attention, jagged_tokens, padded_tokens, plan
from kernels_pallas.hstu_attention.reference import relative_bias
from kernels_pallas.hstu_attention.tokens import visible

_DENSE = ("dense", "reference")  # these hold all T × T scores of a batch
_DENSE_BYTES = 16e9  # for scores; they take what B, H, T, a float32 and the arrays kept at once make of it
_DENSE_FORWARD, _DENSE_BACKWARD = 3, 8
_CACHE_BYTES = 1.5e8  # three times the second-level cache of a Hopper GPU
_MOST_BYTES = 2e9
_MOST_REPEATS = 8
_PROGRAM_SECONDS = 4e-4
_EXPECTED = 300e12  # FLOP/s, to guess how often an operation goes into a program; a guess only

Arrays = tuple[jax.Array, ...]
Call = Callable[..., jax.Array]  # q, k, v and the tables -> output


class Unsupported(Exception):
    """This implementation is not made for this case; the message says why."""


def plain_hstu(
    q: jax.Array, k: jax.Array, v: jax.Array, tables: Arrays, tokens: Tokens, alpha: float, divisor: float
) -> jax.Array:
    """The definition, dense, products in the inputs' precision: the baseline of speed and of rounding error."""
    real = (tokens.segment != 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    scores = alpha * jnp.einsum("bihd,bjhd->bhij", q, k)
    if tables:
        position, seconds = tables
        bias = relative_bias(tokens, position, seconds, jnp.promote_types(q.dtype, jnp.float32))
        scores += bias[:, None].astype(q.dtype)
    weights = jnp.where(visible(tokens)[:, None], jax.nn.silu(scores), 0) / divisor
    return jnp.where(real, jnp.einsum("bhij,bjhd->bihd", weights, v), 0)


def time_attention(job: Job) -> dict[str, Any]:
    """Times and rate of the job's call: forward given the plan, "planned" the same with the plan made in the program,
    backward given what the forward pass kept."""
    assert job.shape is not None
    assert job.direction
    shape, note = _fitted(job.shape, job)
    effort = QUICK if job.quick else Effort()
    tokens = make_tokens(shape)
    shared = tokens if job.direction == "planned" else _prepare(tokens, shape, job.implementation)
    repeats = _repeats(shape, job)
    sets = [make_arrays(shape, seed) for seed in range(repeats)]
    # The plan is an argument: as a constant of the program it would be folded, and is no part of what is timed. All
    # arguments are flat, which dispatches faster.
    program, arguments = _program(job, shape, shared, sets)
    leaves, tree = jax.tree.flatten(arguments)
    start = time.perf_counter()
    compiled = jax.jit(lambda *leaves: program(*jax.tree.unflatten(tree, leaves))).lower(*leaves).compile()
    compile_seconds = time.perf_counter() - start
    times = measure(lambda: compiled(*leaves), effort)
    flops = shape.flops(job.direction)
    return {
        "batch": shape.batch,
        "ms_p10": 1e3 * times.p10 / repeats,
        "ms_median": 1e3 * times.median / repeats,
        "tflops": flops * repeats / times.p10 / 1e12,
        "flops": flops,
        "samples": times.samples,
        "operations_per_program": repeats,
        "programs_per_sample": times.runs,
        "program_us": 1e6 * times.p10,
        "dispatch_us": 1e6 * times.dispatch,
        "compile_s": compile_seconds,
        "note": note,
    }


def _fitted(shape: Shape, job: Job) -> tuple[Shape, str]:
    """The shape with the batch that fits where all scores are held, and a word on the change; or a refusal."""
    if job.implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Unsupported("not available: no GPU")
    if job.implementation == "cudnn" and (shape.bias or shape.layout == "packed"):
        raise Unsupported("takes no tables of relative bias and no packed rows")
    if job.implementation not in _DENSE:
        return shape, ""
    rows, length = shape.rows
    row = 4.0 * shape.heads * length**2 * (_DENSE_BACKWARD if job.direction == "backward" else _DENSE_FORWARD)
    fitting = int(_DENSE_BYTES / row)
    if fitting >= rows:
        return shape, ""
    if fitting == 0 or shape.layout != "uniform":
        raise Unsupported(f"all scores of {rows} x {length} tokens do not fit in memory")
    return dataclasses.replace(shape, batch=fitting), f"batch {shape.batch} -> {fitting}: memory"


def make_tokens(shape: Shape) -> Tokens:
    """The sequences of a shape with times whose gaps spread from seconds to weeks."""
    rows, length = shape.rows
    gaps = np.exp(3 * np.random.default_rng(1).normal(size=(rows, length)) + 4).clip(max=1e5)
    if shape.layout == "packed":
        offsets = np.concatenate([[0], np.cumsum(shape.lengths)])
        seconds = gaps[0].cumsum()
        seconds -= np.repeat(seconds[offsets[:-1]], shape.lengths)  # times count from each sequence's own start
        packed = jax.jit(lambda offsets, seconds: jagged_tokens(offsets, length, timestamps=seconds))
        return packed(offsets.astype(np.int32), seconds.astype(np.int32))
    padded = jax.jit(lambda lengths, seconds: padded_tokens(lengths, length, timestamps=seconds))
    return padded(shape.lengths.astype(np.int32), gaps.cumsum(axis=1).astype(np.int32))


def make_arrays(shape: Shape, seed: int) -> Arrays:
    """q, k, v and the output's cotangent in bf16; the two bias tables in float32 where the shape has them."""
    full = (*shape.rows, shape.heads, shape.dim)
    sizes = (2 * shape.length - 1, TIME_BUCKETS) if shape.bias else ()
    return _random_arrays(seed, full, sizes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_arrays(seed: int, full: tuple[int, ...], sizes: tuple[int, ...]) -> Arrays:
    keys = jax.random.split(jax.random.key(seed), 6)
    arrays = [jax.random.normal(key, full, jnp.bfloat16) for key in keys[:4]]
    return (*arrays, *(0.1 * jax.random.normal(key, (size,)) for key, size in zip(keys[4:], sizes)))


def _prepare(tokens: Tokens, shape: Shape, implementation: str) -> Tokens | Plan:
    if implementation in ("dense", "cudnn"):
        return tokens
    positions, buckets = (shape.length, TIME_BUCKETS) if shape.bias else (0, 0)
    return jax.jit(lambda t: plan(t, positions=positions, buckets=buckets, implementation=implementation))(tokens)


def _caller(job: Job, shape: Shape, shared: Any) -> Call:
    """The operation of q, k, v and the tables."""
    alpha, divisor = 1 / math.sqrt(shape.dim), float(shape.length)
    if job.implementation == "dense":
        return lambda q, k, v, *tables: plain_hstu(q, k, v, tables, shared, alpha, divisor)
    if job.implementation == "cudnn":
        return _cudnn(shape, alpha)

    def call(q: jax.Array, k: jax.Array, v: jax.Array, *tables: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(zip(("position_bias", "time_bias"), tables))
        return hstu_attention(
            q, k, v, shared, max_len=divisor, alpha=alpha, implementation=job.implementation, **options
        )

    return call


def _cudnn(shape: Shape, scale: float) -> Call:
    """Causal softmax attention by cuDNN: the same products, another weight."""
    lengths = jnp.asarray(shape.lengths, jnp.int32) if shape.layout == "padded" else None

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )

    return call


def _program(job: Job, shape: Shape, shared: Any, sets: list[Arrays]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that does the operation once per set of inputs, and its arguments.

    The operation is a jitted function of its own, so that it is traced and lowered once however often it is called.
    """

    @jax.jit
    def once(shared: Any, arrays: Arrays) -> jax.Array:
        q, k, v, _, *tables = arrays
        return _caller(job, shape, shared)(q, k, v, *tables)

    if job.direction != "backward":
        return lambda shared, sets: [once(shared, arrays) for arrays in sets], (shared, sets)

    @jax.jit
    def kept(shared: Any, arrays: Arrays) -> Any:
        q, k, v, _, *tables = arrays
        return jax.vjp(_caller(job, shape, shared), q, k, v, *tables)[1]

    pulls = [kept(shared, arrays) for arrays in sets]
    cotangents = [arrays[3] for arrays in sets]
    pulled = jax.jit(lambda pull, d: pull(d))
    return lambda pulls, cotangents: [pulled(*x) for x in zip(pulls, cotangents)], (pulls, cotangents)


def _repeats(shape: Shape, job: Job) -> int:
    """How many operations, each on its own inputs, go into one program."""
    if job.direction == "planned":
        return 1  # several copies of one plan would be merged into one
    if job.quick:
        return 2
    if job.implementation in ("xla", *_DENSE):
        return 1  # slow to compile, and long enough
    rows, length = shape.rows
    size = 8.0 * rows * length * shape.heads * shape.dim  # q, k, v and d_out
    wanted = max(_PROGRAM_SECONDS * _EXPECTED / shape.flops(job.direction or "forward"), _CACHE_BYTES / size)
    return max(1, min(_MOST_REPEATS, math.ceil(wanted), int(_MOST_BYTES / size)))
