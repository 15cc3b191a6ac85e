"""The accounts of the generative models: by hand, against their parameters, and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.batch import Shape
from genrec_jax.data.schema import Schema
from genrec_jax.layouts import CONTEXT_HISTORY_CANDIDATES, INTERLEAVED, ITEMS
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.hstu_retrieval import HSTURetrievalConfig
from kernels_pallas.hstu_attention import api
from tests.models.gr_helpers import RANKERS, SCHEMA, random_batch

MODELS = {**RANKERS, "hstu_retrieval": HSTURetrievalConfig(width=16, heads=2, negatives=8)}


def build(name, shape, schema=SCHEMA, **changes):
    """A model without arrays: costs need sizes only."""
    config = dataclasses.replace(MODELS[name], **changes)
    return nnx.eval_shape(lambda: registry.build(config, Build(schema, shape, jnp.dtype("float32")), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly(name):
    shape = Shape(history=6, candidates=2)
    model = build(name, shape)
    cost = model.cost(shape)
    sizes = {path: p.size for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    tables = sum(size for path, size in sizes.items() if path[-1] == "rows_table")
    assert cost.embedding_params == tables
    assert cost.dense_params == sum(sizes.values()) - tables


def test_hstu_flops_by_hand():
    """n = 1 + 2 x 6 + 3 tokens; per layer 10 n d^2, and 4 d per visible pair; a linear head on 6 + 3 states."""
    schema = Schema(items=9, tasks=("a", "b"))
    shape, d, n = Shape(history=6, candidates=3), 16, 16
    pairs = 13 * 14 / 2 + 3 * 14
    assert INTERLEAVED.pairs(shape) == pairs
    expected = 2 * (10 * n * d * d + 4 * pairs * d) + 2 * 9 * d * 2
    assert build("hstu", shape, schema).cost(shape).flops == expected


def test_transformer_flops_by_hand():
    """n = 1 + 6 + 3 tokens; per layer 24 n d^2 and 4 d per visible pair; then the candidates' MLP and the experts."""
    schema = Schema(items=9, tasks=("a", "b"))
    shape, d, n = Shape(history=6, candidates=3), 16, 10
    model = build("softmax", shape, schema)
    pairs = 7 * 8 / 2 + 3 * 8
    stack = 2 * (24 * n * d * d + 4 * pairs * d)
    rest = model.ranker.cross.cost(3).flops + model.ranker.head.cost(3).flops
    assert model.cost(shape).flops == stack + rest


def test_retrieval_flops_by_hand():
    shape, d, n = Shape(history=6, candidates=1), 16, 6
    expected = 2 * (10 * n * d * d + 4 * 21 * d) + 2 * n * d * (1 + 8)
    assert build("hstu_retrieval", shape).cost(shape).flops == expected


def test_candidates_share_the_history():
    one, many = (build("dirl", Shape(64, 1)).cost(Shape(64, k)).flops for k in (1, 16))
    assert one < many < 3 * one


def test_packing_saves_attention_only():
    model = build("dirl", Shape(64, 2))
    packed, single = model.cost(Shape(64, 2, 4)), model.cost(Shape(64, 8, 1))
    assert packed.dense_params == single.dense_params
    assert CONTEXT_HISTORY_CANDIDATES.pairs(Shape(64, 2, 4)) < CONTEXT_HISTORY_CANDIDATES.pairs(Shape(64, 8, 1)) / 2


@pytest.mark.parametrize("name", MODELS)
def test_flops_agree_with_xla(name, monkeypatch):
    """Within 5 % on a case where products dominate.

    The reference attention multiplies the whole square, so XLA's count is lowered by the pairs that no query sees.
    Layers are unrolled here, and the reference has no kernel that XLA could not look into.
    """
    monkeypatch.setattr(api, "_DEFAULT", ("reference",))
    shape, width = Shape(history=24, candidates=16), 256
    schema = dataclasses.replace(SCHEMA, features=())
    changes = {"width": width, "heads": 1} | ({"expert_width": width} if "experts" in vars(MODELS[name]) else {})
    model = build(name, shape, schema, **changes)
    graph, state = nnx.split(model)
    batch = random_batch(shape, [[24]], schema=schema)
    loss = 0.0 if name != "hstu_retrieval" else 2 * 24 * width * (1 + model.negatives)

    def forward(state, batch):
        model = nnx.merge(graph, state)
        return model(batch) if name != "hstu_retrieval" else model.users(batch)

    counted = jax.jit(forward).lower(state, batch).compile().cost_analysis()["flops"]
    interleaved = name in ("hstu", "softmax_interleaved")
    layout = ITEMS if name == "hstu_retrieval" else INTERLEAVED if interleaved else CONTEXT_HISTORY_CANDIDATES
    unseen = layout.row_tokens(shape) ** 2 - layout.pairs(shape)
    square = 2 * 4 * width * unseen  # two layers, 2 (dqk + dv) per pair
    np.testing.assert_allclose(model.cost(shape).flops - loss, counted - square, rtol=0.05)
