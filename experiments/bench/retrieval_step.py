"""Times one training step of HSTU retrieval on this machine against the same step in plain JAX.

The shape is the worst case of the ML-1M "large" configuration (8 layers, 2 heads of 25, width 50, 128 negatives, batch
128, all rows 200 long). Two steps run in turns in one process, so that a busy machine slows them alike: the lab's own
model and training step, and a plain one (dense square attention, gathered negatives, everything by autodiff).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genrec_jax.batch import Batch, Candidates, Context, History
from genrec_jax.config import default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.retrieval_loss import l2_normalise
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import init_state, make_step
from kernels_pallas.hstu_attention import TIME_BUCKETS, time_bucket

ROWS, LENGTH, LAYERS, HEADS, WIDTH, ITEMS, NEGATIVES = 128, 200, 8, 2, 50, 3952, 128
PADDED = LENGTH + 11  # the reference's padded length: divisor and table sizes
TEMPERATURE, DROPOUT = 0.05, 0.2
SCHEMA = Schema(items=ITEMS + 1, tasks=())
TRIAL = override(
    default_trial("hstu_retrieval"),
    {
        "data.history": LENGTH,
        "data.candidates": 1,
        "model.width": WIDTH,
        "model.depth": LAYERS,
        "model.heads": HEADS,
        "model.negatives": NEGATIVES,
        "train.batch_rows": ROWS,
        "train.pieces": 8,
        "train.weight_decay": 0.0,
    },
)


def make_batch(key: jax.Array, rows: int = ROWS, length: int = LENGTH, tasks: int = 0) -> Batch:
    """Random items and labels in full rows, and times whose gaps spread from seconds to months."""
    items_key, gaps_key, labels_key = jax.random.split(key, 3)
    item = jax.random.randint(items_key, (rows, length + 1), 1, ITEMS + 1)
    seconds = jnp.exp(3 * jax.random.normal(gaps_key, item.shape) + 4).clip(max=1e6).astype(jnp.int32).cumsum(axis=1)
    ones = jnp.ones_like(item)
    labels = jax.random.bernoulli(labels_key, shape=(*item.shape, tasks)).astype(jnp.uint8)
    place = ones.cumsum(axis=1) - 1
    past, last = slice(None, -1), slice(-1, None)
    seen, real = seconds[:, past], ones[:, past]
    history = History(item[:, past], seen, labels[:, past], real, real > 0, place[:, past], {})
    candidates = Candidates(item[:, last], seconds[:, last], labels[:, last], ones[:, last], place[:, last], {})
    return Batch(jnp.arange(rows)[:, None], Context({}), history, candidates)


class LabStep:
    """The lab's step with its own parameters, to be called again and again."""

    def __init__(self) -> None:
        optimizer = make_optimizer(TRIAL.train, 1000)
        self.state = init_state(init_params(TRIAL, SCHEMA), optimizer, 0)
        self.step = make_step(abstract_model(TRIAL, SCHEMA), optimizer, TRIAL.train.pieces)
        self.batch = make_batch(jax.random.key(1))

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


Params = dict[str, Any]


class PlainStep:
    """The same model and loss written directly."""

    def __init__(self) -> None:
        self.params = plain_init(jax.random.key(0))
        self.optimizer = optax.adamw(1e-3, b2=0.98, weight_decay=0.0)
        self.opt, self.batch, self.count = self.optimizer.init(self.params), make_batch(jax.random.key(1)), 0
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.count += 1
        self.params, self.opt, loss = self.step(self.params, self.opt, self.batch, jax.random.key(self.count))
        return loss

    def _step(self, params: Params, opt: Any, batch: Batch, key: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(plain_loss)(params, batch, key)
        updates, opt = self.optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss


def plain_init(key: jax.Array) -> Params:
    """Parameters of the plain stack; every layer-wise array has the layers as its first axis."""
    shapes = {
        "items": (ITEMS + 1, WIDTH),
        "positions": (PADDED, WIDTH),
        "project": (LAYERS, WIDTH, 4 * WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "out_bias": (LAYERS, WIDTH),
        "position_bias": (LAYERS, 2 * PADDED - 1),
        "time_bias": (LAYERS, TIME_BUCKETS),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: 0.02 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def plain_loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """Dense squares, one gathered row per negative, autodiff throughout."""
    item = batch.history.item
    targets = jnp.concatenate([item[:, 1:], batch.candidates.item], axis=1)
    asked = jnp.concatenate([batch.history.time[:, 1:], batch.candidates.time], axis=1)
    drop_key, negative_key = jax.random.split(key)
    outputs = plain_encode(params, item, time_bucket(asked[:, :, None], batch.history.time[:, None]), drop_key)
    negatives = jax.random.randint(negative_key, (*item.shape, NEGATIVES), 1, ITEMS + 1)
    rows = l2_normalise(params["items"])
    positive = jnp.einsum("btd,btd->bt", outputs, rows[targets])[..., None]
    logits = jnp.einsum("btd,btrd->btr", outputs, rows[negatives]) / TEMPERATURE
    logits = jnp.where(negatives == targets[..., None], -5e4, logits)
    return -jax.nn.log_softmax(jnp.concatenate([positive / TEMPERATURE, logits], axis=-1))[..., 0].mean()


def plain_encode(params: Params, item: jax.Array, buckets: jax.Array, key: jax.Array) -> jax.Array:
    """The HSTU stack: normalised outputs [B, T, D]."""
    index = jnp.arange(LENGTH)
    causal, distance = index[None, :] <= index[:, None], index[None, :] - index[:, None] + PADDED - 1
    keys = jax.random.split(key, LAYERS + 1)
    x = _plain_drop(keys[-1], params["items"][item] * WIDTH**0.5 + params["positions"][:LENGTH])
    for layer in range(LAYERS):
        mixed = jax.nn.silu(_layer_norm(x) @ params["project"][layer])
        u, v, q, k = jnp.split(mixed, 4, axis=-1)
        v, q, k = (part.reshape(*item.shape, HEADS, WIDTH // HEADS) for part in (v, q, k))
        bias = params["position_bias"][layer][distance] + params["time_bias"][layer][buckets]
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) + bias[:, None]
        attended = jnp.einsum("bhij,bjhd->bihd", jax.nn.silu(scores) * causal / PADDED, v).reshape(u.shape)
        gated = _plain_drop(keys[layer], u * _layer_norm(attended))
        x = x + gated @ params["out"][layer] + params["out_bias"][layer]
    return l2_normalise(x)


def _layer_norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)


def _plain_drop(key: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0)


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


def run(repeats: int) -> dict[str, float]:
    """Median step times in ms, their ratio, and the share of this machine's own matmul peak that the lab's reaches.

    ``repeats`` timed rounds; each runs both steps once and a 2048-square product three times.
    """
    square = jax.random.normal(jax.random.key(2), (2048, 2048))
    multiply = jax.jit(jnp.matmul)
    lab, plain = LabStep(), PlainStep()
    times: dict[str, list[float]] = {"lab": [], "plain": [], "matmul": []}
    for round_ in range(repeats + 1):  # the first round compiles
        found = {"lab": _timed(lab), "plain": _timed(plain)}
        found["matmul"] = min(_timed(lambda: multiply(square, square)) for _ in range(3))
        if round_:
            for name, seconds in found.items():
                times[name].append(seconds)
    flops = 3.0 * abstract_model(TRIAL, SCHEMA).cost(TRIAL.data.shape).flops * ROWS
    achieved, peak = flops / statistics.median(times["lab"]), 2 * 2048**3 / statistics.median(times["matmul"])
    return {
        "lab_ms": 1e3 * statistics.median(times["lab"]),
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "plain_over_lab": statistics.median(p / f for p, f in zip(times["plain"], times["lab"], strict=True)),
        "gflop": flops / 1e9,
        "achieved_gflops": achieved / 1e9,
        "peak_gflops": peak / 1e9,
    }
