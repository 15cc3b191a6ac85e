"""Batches and models small enough to reason about, shared by the tests of the generative models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genrec_jax.batch import Batch, Candidates, Context, History, Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.dirl import DirLConfig
from genrec_jax.models.hstu import HSTUConfig
from genrec_jax.models.registry import Model
from genrec_jax.models.transformer import TransformerConfig

SCHEMA = Schema(
    items=40,
    tasks=("click", "like"),
    features=(
        Feature("genre", vocab=6, width=2, level="item"),
        Feature("maker", vocab=5, width=1, level="item"),
        Feature("age", vocab=4, width=1, level="user"),
    ),
)
SIZES = {"width": 16, "depth": 2, "heads": 2, "dropout": 0.5}
RANKERS: dict[str, ModelConfig] = {
    "hstu": HSTUConfig(**SIZES),
    "dirl": DirLConfig(**SIZES, experts=2, expert_width=8),
    "softmax": TransformerConfig(**SIZES, expert_width=8),
    "softmax_interleaved": TransformerConfig(**SIZES, layout="interleaved"),
}


# Tiny cases spend their time in the compiler, not in the code it makes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def initialised(config: ModelConfig, shape: Shape, schema: Schema = SCHEMA, dtype: str = "float32") -> Model:
    """A freshly initialised model."""

    def build() -> Model:
        return registry.build(config, Build(schema, shape, jnp.dtype(dtype)), rngs=nnx.Rngs(0))

    graph = nnx.graphdef(nnx.eval_shape(build))
    return nnx.merge(graph, _initial_state(config, shape, schema))


@functools.cache
def _initial_state(config: ModelConfig, shape: Shape, schema: Schema) -> nnx.State:
    build = Build(schema, shape, jnp.dtype("float32"))
    return jit(lambda: nnx.state(registry.build(config, build, rngs=nnx.Rngs(0))))()


def random_batch(shape: Shape, lengths: list[list[int]], seed: int = 0, schema: Schema = SCHEMA) -> Batch:
    """One row per entry of ``lengths``: history lengths of its segments; every segment has K candidates."""
    draw = np.random.default_rng(seed)
    rows, n, c = len(lengths), shape.history, shape.slots
    tasks = len(schema.tasks)

    def features(level_item: bool, *size: int) -> dict[str, np.ndarray]:
        chosen = schema.item_features if level_item else schema.context_features
        return {
            f.name: draw.integers(0, f.vocab, (*size, f.width) if f.width > 1 else size, dtype=np.int32) for f in chosen
        }

    history_segment = np.zeros((rows, n), np.int32)
    history_before = np.zeros((rows, n), np.int32)
    candidate_before = np.zeros((rows, c), np.int32)
    history_time = draw.integers(0, 10**6, (rows, n), dtype=np.int32)
    candidate_segment = np.zeros((rows, c), np.int32)
    candidate_time = draw.integers(0, 10**6, (rows, c), dtype=np.int32)
    for r, row in enumerate(lengths):
        at = 0
        for s, length in enumerate(row):
            history_segment[r, at : at + length] = s + 1
            history_before[r, at : at + length] = np.arange(length)
            history_time[r, at : at + length] = np.cumsum(draw.integers(1, 5000, length))
            slots = slice(s * shape.candidates, (s + 1) * shape.candidates)
            candidate_segment[r, slots] = s + 1
            candidate_before[r, slots] = length
            candidate_time[r, slots] = (history_time[r, at + length - 1] if length else 0) + draw.integers(1, 5000)
            at += length
    history = History(
        item=draw.integers(1, schema.items, (rows, n), dtype=np.int32),
        time=history_time,
        labels=draw.integers(0, 2, (rows, n, tasks), dtype=np.uint8),
        segment=history_segment,
        supervised=history_segment > 0,
        before=history_before,
        features=features(True, rows, n),
    )
    candidates = Candidates(
        item=draw.integers(1, schema.items, (rows, c), dtype=np.int32),
        time=candidate_time,
        labels=draw.integers(0, 2, (rows, c, tasks), dtype=np.uint8),
        segment=candidate_segment,
        before=candidate_before,
        features=features(True, rows, c),
    )
    user = np.full((rows, shape.segments), -1, np.int32)
    for r, row in enumerate(lengths):
        user[r, : len(row)] = np.arange(len(row))
    return Batch(user, Context(features(False, rows, shape.segments)), history, candidates)


def change(batch: Batch, part: str, **arrays) -> Batch:
    """The batch with fields of ``history``, ``candidates`` or ``context`` replaced."""
    return dataclasses.replace(batch, **{part: dataclasses.replace(getattr(batch, part), **arrays)})


def pack(batch: Batch, shape: Shape) -> Batch:
    """All rows (S = 1) of a batch as the segments of one row of ``shape``; events keep their order, padding last."""
    h, c = batch.history, batch.candidates
    keep = [(r, i) for r in range(len(h.item)) for i in range(h.item.shape[1]) if h.segment[r, i]]
    rows, index = (np.array(x, int) for x in zip(*keep))

    def past(x: np.ndarray) -> np.ndarray:
        out = np.zeros((1, shape.history, *x.shape[2:]), x.dtype)
        out[0, : len(rows)] = x[rows, index]
        return out

    segment = np.where(h.segment > 0, 1 + np.arange(len(h.item), dtype=np.int32)[:, None], 0)
    history = History(
        past(h.item),
        past(h.time),
        past(h.labels),
        past(segment),
        past(h.supervised),
        past(h.before),
        {k: past(v) for k, v in h.features.items()},
    )

    def joined(x: np.ndarray) -> np.ndarray:
        return x.reshape(1, -1, *x.shape[2:])

    candidates = Candidates(
        joined(c.item),
        joined(c.time),
        joined(c.labels),
        joined(np.where(c.segment > 0, 1 + np.arange(len(c.item), dtype=np.int32)[:, None], 0)),
        joined(c.before),
        {k: joined(v) for k, v in c.features.items()},
    )
    context = Context({k: joined(v) for k, v in batch.context.features.items()})
    return Batch(batch.user.reshape(1, -1), context, history, candidates)
