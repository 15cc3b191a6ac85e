"""Times training steps of HSTU retrieval in bf16, on random histories."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases import Job
from benchmarks.gpu_timing import QUICK, Effort, measure
from genrec_jax.batch import Batch, Candidates, Context, History
from genrec_jax.config import default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import init_state, make_step
from kernels_pallas.hstu_attention import Tokens, plan

ITEMS = 4095


class Size(NamedTuple):
    rows: int
    length: int
    width: int
    depth: int
    heads: int


SIZES = {
    "tiny": Size(rows=2, length=32, width=32, depth=1, heads=1),
    "middle": Size(rows=32, length=1024, width=512, depth=8, heads=4),
    # NVIDIA's profile of a step has these heads, this depth and this length (at batch 32).
    "large": Size(rows=8, length=4096, width=1024, depth=8, heads=4),
}


def time_training(job: Job) -> dict[str, Any]:
    """Milliseconds of a step and its FLOP/s by the model's own account (three times the forward pass)."""
    size = SIZES[job.case]
    schema = Schema(items=ITEMS + 1, tasks=())
    trial = override(
        default_trial("hstu_retrieval"),
        {
            "data.history": size.length,
            "data.candidates": 1,
            "model.width": size.width,
            "model.depth": size.depth,
            "model.heads": size.heads,
            "train.batch_rows": size.rows,
            "train.precision": "bfloat16",
        },
    )
    optimizer = make_optimizer(trial.train, 10_000)
    model = abstract_model(trial, schema)
    state = init_state(init_params(trial, schema), optimizer, 0)
    step, batch = make_step(model, optimizer), make_batch(size, jax.random.key(1))
    losses = []

    def run() -> Any:
        # The state is donated and handed on, so steps follow one another as in training.
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    losses.append(float(run()))
    effort = QUICK if job.quick else Effort(samples=20, sample_seconds=0.5, limit=12.0, fewest=5)
    times = measure(run, effort)
    losses.append(float(run()))
    flops = 3.0 * model.cost(trial.data.shape).flops * size.rows
    return {
        "batch": size.rows,
        "size": size._asdict(),
        "backend": "/".join(_default_backends()),
        "ms_p10": 1e3 * times.p10,
        "ms_median": 1e3 * times.median,
        "tflops": flops / times.median / 1e12,
        "flops": flops,
        "losses": losses,
        "tokens_per_s": size.rows * size.length / times.median,
        "note": f"loss {losses[0]:.3f} -> {losses[1]:.3f}",
    }


def make_batch(size: Size, key: jax.Array) -> Batch:
    """Random items in full rows, and times whose gaps spread from seconds to days."""
    items_key, gaps_key = jax.random.split(key)
    item = jax.random.randint(items_key, (size.rows, size.length + 1), 1, ITEMS + 1)
    gaps = jnp.exp(3 * jax.random.normal(gaps_key, item.shape) + 4).clip(max=1e5)
    seconds = gaps.astype(jnp.int32).cumsum(axis=1)
    ones, labels = jnp.ones_like(item), jnp.zeros((*item.shape, 0), jnp.uint8)
    place = ones.cumsum(axis=1) - 1
    past, last = slice(None, -1), slice(-1, None)
    real = ones[:, past]
    history = History(item[:, past], seconds[:, past], labels[:, past], real, real > 0, place[:, past], {})
    candidates = Candidates(item[:, last], seconds[:, last], labels[:, last], ones[:, last], place[:, last], {})
    return Batch(jnp.arange(size.rows)[:, None], Context({}), history, candidates)


def _default_backends() -> tuple[str, ...]:
    """The backends that a model's own plan tries on this machine, in order."""
    return plan(Tokens(*(jnp.zeros((1, 1), jnp.int32) for _ in range(4)))).backends
