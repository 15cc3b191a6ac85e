"""Times one training step of HSTU retrieval on this machine against the same step in plain JAX.

The shape is the worst case of the ML-1M "large" configuration (8 layers, 2 heads of 25, width 50, 128 negatives, batch
128, all rows 200 long). Three steps run in turns in one process, so that a busy machine slows them alike: the step
built from the blocked attention and the sampled softmax of this project with independent negatives, the same with
negatives shared by a row, and the plain one (dense square attention, gathered negatives, everything by autodiff).

Run ``python -m experiments.bench.retrieval_step``; it takes about a minute.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from genrec_jax.retrieval_loss import Negatives, draw_negatives, l2_normalise, sampled_softmax
from kernels_pallas.dense import dense
from kernels_pallas.hstu_attention import TIME_BUCKETS, Plan, Tokens, hstu_attention, plan, time_bucket

Params = dict[str, Any]
Step = Callable[[Params, optax.OptState, "Batch", jax.Array], tuple[Params, optax.OptState, jax.Array]]


class Shape(NamedTuple):
    """The size of the benchmark; the defaults are the ones reported."""

    batch: int = 128
    length: int = 200
    padded: int = 211  # sizes the tables and the divisor only
    layers: int = 8
    heads: int = 2
    head_width: int = 25
    items: int = 3952
    negatives: int = 128
    temperature: float = 0.05
    dropout: float = 0.2

    @property
    def width(self) -> int:
        return self.heads * self.head_width


DEFAULT = Shape()


class Batch(NamedTuple):
    """ids, targets int [B, T] and times int [B, T + 1] in seconds; every position is supervised."""

    ids: jax.Array
    targets: jax.Array
    times: jax.Array


def training_flops(shape: Shape) -> float:
    """Analytic FLOPs of one step: multiply-add = 2, half the square for causal attention, training = 3 x forward."""
    tokens = shape.batch * shape.length
    linear = 2 * tokens * (4 * shape.width * shape.width + shape.width * shape.width)
    attention = 2 * shape.batch * shape.length**2 / 2 * shape.heads * 2 * shape.head_width
    loss = 2 * tokens * shape.width * (shape.negatives + 1)
    return 3 * (shape.layers * (linear + attention) + loss)


def init(shape: Shape, key: jax.Array) -> Params:
    """Parameters of the stack; every layer-wise array has the layers as its first axis."""
    keys = iter(jax.random.split(key, 6))
    d, count = shape.width, shape.layers

    def normal(*size: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), size)

    return {
        "items": normal(shape.items + 1, d),
        "positions": normal(shape.padded, d),
        "project": normal(count, d, 4 * d),
        "out": normal(count, d, d),
        "out_bias": jnp.zeros((count, d)),
        "position_bias": normal(count, 2 * shape.padded - 1),
        "time_bias": normal(count, TIME_BUCKETS),
    }


def make_batch(shape: Shape, key: jax.Array) -> Batch:
    """Random ids, and times whose gaps spread from seconds to months."""
    ids_key, gaps_key = jax.random.split(key)
    ids = jax.random.randint(ids_key, (shape.batch, shape.length + 1), 1, shape.items + 1)
    gaps = jnp.exp(3 * jax.random.normal(gaps_key, ids.shape) + 4).clip(max=1e6).astype(jnp.int32)
    return Batch(ids[:, :-1], ids[:, 1:], jnp.cumsum(gaps, axis=1))


def _layer_norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)


def _tokens(batch: Batch) -> Tokens:
    """One segment per row; a query uses the time of the next event."""
    order = jnp.broadcast_to(jnp.arange(batch.ids.shape[1], dtype=jnp.int32), batch.ids.shape)
    return Tokens(jnp.ones_like(batch.ids), order, batch.times[:, 1:], batch.times[:, :-1])


def _fast_drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Dropout from 16 random bits per entry; the rate is rounded to a multiple of 2**-16."""
    bits = jax.random.bits(key, (-(-x.size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(halves >= round(rate * 2**16), x / (1 - rate), 0)


def _plain_drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def encode(
    shape: Shape, params: Params, ids: jax.Array, key: jax.Array, attend: Attend, drop: Any, product: Any
) -> jax.Array:
    """The HSTU stack: normalised outputs [B, T, D]."""
    keys = jax.random.split(key, shape.layers + 1)
    x = params["items"][ids] * shape.width**0.5 + params["positions"][: shape.length]
    x = drop(keys[-1], x, shape.dropout)
    for layer in range(shape.layers):
        mixed = jax.nn.silu(product(_layer_norm(x), params["project"][layer]))
        u, v, q, k = jnp.split(mixed, 4, axis=-1)
        v, q, k = (a.reshape(*ids.shape, shape.heads, shape.head_width) for a in (v, q, k))
        attended = attend(q, k, v, params["position_bias"][layer], params["time_bias"][layer])
        gated = drop(keys[layer], u * _layer_norm(attended.reshape(u.shape)), shape.dropout)
        x = x + product(gated, params["out"][layer]) + params["out_bias"][layer]
    return l2_normalise(x)


def fast_loss(shape: Shape, kind: Negatives, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """The step's loss with the blocked attention; the pairs are planned once for all layers."""
    pairs: Plan = plan(_tokens(batch), positions=shape.padded, buckets=TIME_BUCKETS)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, seconds: jax.Array) -> jax.Array:
        return hstu_attention(q, k, v, pairs, divisor=shape.padded, position_bias=position, time_bias=seconds)

    drop_key, negative_key = jax.random.split(key)
    outputs = encode(shape, params, batch.ids, drop_key, attend, _fast_drop, dense)
    negatives = draw_negatives(negative_key, batch.targets, shape.negatives, shape.items, kind)
    items = l2_normalise(params["items"])
    ones = jnp.ones(batch.ids.shape)
    return sampled_softmax(outputs, items, batch.targets, ones, negatives, temperature=shape.temperature)


def plain_loss(shape: Shape, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """The same loss written directly: dense squares, one gathered row per negative, autodiff throughout."""
    index = jnp.arange(shape.length)
    causal = index[None, :] <= index[:, None]
    buckets = time_bucket(batch.times[:, 1:, None], batch.times[:, None, :-1])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, seconds: jax.Array) -> jax.Array:
        bias = position[index[None, :] - index[:, None] + shape.padded - 1] + seconds[buckets]
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) + bias[:, None]
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.silu(scores) * causal / shape.padded, v)

    drop_key, negative_key = jax.random.split(key)
    outputs = encode(shape, params, batch.ids, drop_key, attend, _plain_drop, jnp.matmul)
    size = (*batch.ids.shape, shape.negatives)
    negatives = jax.random.randint(negative_key, size, 1, shape.items + 1)
    items = l2_normalise(params["items"])
    positive = jnp.einsum("btd,btd->bt", outputs, items[batch.targets])[..., None]
    logits = jnp.einsum("btd,btrd->btr", outputs, items[negatives])
    logits = jnp.where(negatives == batch.targets[..., None], -5e4, logits / shape.temperature)
    logits = jnp.concatenate([positive / shape.temperature, logits], axis=-1)
    return -jax.nn.log_softmax(logits)[..., 0].mean()


def make_step(loss: Callable[[Params, Batch, jax.Array], jax.Array], optimiser: Any, pieces: int = 1) -> Step:
    """One jitted AdamW step that gives its inputs' memory to its outputs.

    ``pieces`` > 1 sums the gradient over that many equal parts of the batch, one after another. On a CPU this is a
    matter of speed: a part's activations stay in the caches, a whole batch's (1 GB) go through memory, freshly
    mapped by the kernel page by page in every step.
    """

    def gradient(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Params]:
        parts = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total = jax.lax.scan(add, zero, (parts, jax.random.split(key, pieces)))[0]
        return jax.tree.map(lambda x: x / pieces, total)

    def step(
        params: Params, state: optax.OptState, batch: Batch, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, grads = gradient(params, batch, key)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


class _Training:
    """A step with its own parameters, to be called again and again."""

    def __init__(self, shape: Shape, loss: Callable[[Params, Batch, jax.Array], jax.Array], pieces: int = 1):
        self.params = init(shape, jax.random.key(0))
        optimiser = optax.adamw(1e-3, b2=0.98, weight_decay=0.0)
        self.state, self.step = optimiser.init(self.params), make_step(loss, optimiser, pieces)
        self.batch, self.count = make_batch(shape, jax.random.key(1)), 0

    def __call__(self) -> jax.Array:
        self.count += 1
        key = jax.random.key(self.count)
        self.params, self.state, loss = self.step(self.params, self.state, self.batch, key)
        return loss


def run(repeats: int, shape: Shape = DEFAULT, pieces: int = 8) -> dict[str, float]:
    """Median step times in ms, their ratio, and the fraction of this machine's own matrix-product peak.

    Args:
      repeats: timed rounds; each round runs every step once and the 2048-square product three times.
      shape: sizes of the model and the batch.
      pieces: parts the batch is worked on in, in the two steps of this project; the plain step has one.
    """
    steps: dict[str, Callable[[], Any]] = {
        "independent": _Training(shape, lambda *a: fast_loss(shape, "independent", *a), pieces),
        "shared": _Training(shape, lambda *a: fast_loss(shape, "shared", *a), pieces),
        "plain": _Training(shape, lambda *a: plain_loss(shape, *a)),
    }
    square = jax.random.normal(jax.random.key(2), (2048, 2048))
    multiply = jax.jit(jnp.matmul)
    steps["matmul"] = lambda: multiply(square, square)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):  # the first round compiles
        for name, action in steps.items():
            taken = min(_timed(action) for _ in range(3)) if name == "matmul" else _timed(action)
            if round_:
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = 2 * 2048**3 / min(times["matmul"])
    achieved = training_flops(shape) / median["independent"]
    return {
        **{f"{name}_ms": 1e3 * median[name] for name in ("independent", "shared", "plain")},
        **{f"{name}_best_ms": 1e3 * min(times[name]) for name in ("independent", "shared", "plain")},
        "plain_over_independent": statistics.median(p / f for p, f in zip(times["plain"], times["independent"])),
        "training_gflop": training_flops(shape) / 1e9,
        "achieved_gflops": achieved / 1e9,
        "peak_gflops": peak / 1e9,
        "fraction_of_peak": achieved / peak,
    }


if __name__ == "__main__":
    print(json.dumps(run(7), indent=2))
