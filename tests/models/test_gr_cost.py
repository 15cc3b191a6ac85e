"""The accounts of the generative models: by hand, against their parameters, and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax import retrieval_loss
from genrec_jax.batch import Filled, Shape
from genrec_jax.config import DataConfig, TrainConfig, Trial
from genrec_jax.data.schema import Schema
from genrec_jax.layouts import CONTEXT_HISTORY_CANDIDATES, INTERLEAVED, ITEMS, next_item
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.models.hstu_retrieval import HSTURetrievalConfig
from genrec_jax.models.sasrec import SASRecConfig
from genrec_jax.train.estimate import flops_per_candidate
from kernels_pallas.hstu_attention import api
from tests.models.gr_helpers import RANKERS, SCHEMA, random_batch

RETRIEVERS = {
    "hstu_retrieval": HSTURetrievalConfig(width=16, heads=2, negatives=8),
    "sasrec": SASRecConfig(width=16, heads=2, negatives=8),
}
MODELS = {**RANKERS, **RETRIEVERS}


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


# Two blocks of width 16 over 6 events and 3 candidates, all of it counted by hand from the equations. SCHEMA has two
# tasks, one user feature, and item features of 6 and 5 ids, so 8 + 2 x 2 + (2 + 2) x 2 = 20 numeric request features.
SIX_AND_THREE = Shape(history=6, candidates=3)
MLP_U = 2 * (16 * 16 + 16 * 16)  # the user feature's row through two layers
PREFIX = (1 + 6) * (1 + 6 + 1) / 2  # pairs of [context | history]: a triangle
DIRL_PAIRS = PREFIX + 3 * (1 + 6 + 1)  # each candidate sees the prefix and itself
PREFIX_TWICE = (1 + 12) * (1 + 12 + 1) / 2  # [context | item, action, item, ...]
HSTU_PAIRS = PREFIX_TWICE + 3 * (1 + 12 + 1)
# An HSTU block maps a token to U, V, Q, K and one of them back, a Transformer's to Q, K, V, back, and through 4 x 16;
# a pair costs a dot product of width 16 and adds a value of width 16.
SASREC_TOKEN = 2 * (16 * 48 + 16 * 16 + 16 * 16 + 16 * 16)  # Q, K, V, back, and through a layer of 16
HSTU_TOKEN, SOFTMAX_TOKEN, PAIR = 2 * (16 * 64 + 16 * 16), 2 * (16 * 48 + 16 * 16 + 16 * 64 + 64 * 16), 2 * (16 + 16)
CANDIDATE = (
    2 * (36 * 16 + 16 * 16)  # MLP_c of item and request features
    + 2 * 4 * 16 * 8  # two shared experts and one for each task
    + 2 * 2 * 16 * 3  # each task's gate over its three experts
    + 2 * 2 * 3 * 8  # each task's sum of three experts
    + 2 * 2 * 8  # each task's linear tower
)
# 1 + 2 numbers of 6 events: two sums, and counts of 6 genres and 5 makers.
REQUEST = 2 * 6 * 3 * (2 + 6 + 5)
LINEAR_HEAD = 2 * (6 + 3) * 16 * 2  # at every item, past or candidate
BY_HAND = {
    "hstu": MLP_U + 2 * ((1 + 12 + 3) * HSTU_TOKEN + HSTU_PAIRS * PAIR) + LINEAR_HEAD,
    "dirl": MLP_U + REQUEST + 2 * ((1 + 6 + 3) * HSTU_TOKEN + DIRL_PAIRS * PAIR) + 3 * CANDIDATE,
    "softmax": MLP_U + REQUEST + 2 * ((1 + 6 + 3) * SOFTMAX_TOKEN + DIRL_PAIRS * PAIR) + 3 * CANDIDATE,
    "softmax_interleaved": MLP_U + 2 * ((1 + 12 + 3) * SOFTMAX_TOKEN + HSTU_PAIRS * PAIR) + LINEAR_HEAD,
    # No context, no candidates among the tokens; the loss compares each state with its target and 8 negatives.
    "hstu_retrieval": 2 * (6 * HSTU_TOKEN + 6 * 7 / 2 * PAIR) + 2 * 6 * 16 * (1 + 8),
    "sasrec": 2 * (6 * SASREC_TOKEN + 6 * 7 / 2 * PAIR) + 2 * 6 * 16 * (1 + 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_by_hand(name):
    cost = build(name, SIX_AND_THREE).cost(SIX_AND_THREE)
    assert cost.flops == BY_HAND[name]
    assert cost.loss_flops == (2 * 6 * 16 * 9 if name in RETRIEVERS else 0)


def test_flops_of_a_packed_row_by_hand():
    """Two users of 3 events each: two context tokens, and pairs within a user alone."""
    shape = Shape(history=6, candidates=3, segments=2)
    pairs = 2 * ((1 + 3) * (1 + 3 + 1) / 2 + 3 * (1 + 3 + 1))
    stack = 2 * ((2 + 6 + 6) * HSTU_TOKEN + pairs * PAIR)
    assert build("dirl", shape).cost(shape).flops == 2 * MLP_U + REQUEST + stack + 6 * CANDIDATE


def test_pairs_of_what_is_really_packed_by_hand():
    """Rows of segments of 5 and 1 events, and of one segment of 6; on average 1.5 segments, 6 events, 31 squared."""
    shape = Shape(6, 3, segments=2, filled=Filled(segments=1.5, events=6, squares=(25 + 1 + 36) / 2))

    def alone(events, context, per_event, candidates):
        prefix = context + per_event * events
        return prefix * (prefix + 1) / 2 + candidates * (prefix + 1)

    for layout, sizes in ((CONTEXT_HISTORY_CANDIDATES, (1, 1, 3)), (INTERLEAVED, (1, 2, 3)), (ITEMS, (0, 1, 0))):
        assert layout.pairs(shape) == sum(alone(n, *sizes) for n in (5, 1, 6)) / 2
    equal = dataclasses.replace(shape, filled=Filled(2, 6, 18))
    assert INTERLEAVED.pairs(equal) == INTERLEAVED.pairs(dataclasses.replace(shape, filled=None))


def test_active_parameters_are_at_most_those_held():
    """A row looks up far more negatives than a small table has rows, and a part of a large one."""
    shape = Shape(history=6, candidates=1)
    small = build("hstu_retrieval", shape, negatives=1000).cost(shape)
    assert small.embedding_params == 40 * 16
    assert small.embedding_reads == 6 * (2 + 1000) * 16
    assert small.active_params == small.dense_params + 40 * 16
    large = build("hstu_retrieval", shape, Schema(items=1000, tasks=("a",))).cost(shape)
    assert large.active_params == large.dense_params + 6 * (2 + 8) * 16


def test_scoring_a_candidate_does_not_pay_for_the_training_loss():
    """A ranker's request is shared by its K candidates; a retriever scores the 39 items for one embedded user."""
    for name in MODELS:
        trial = Trial(DataConfig("unread", history=6, candidates=3), MODELS[name], TrainConfig())
        scored = flops_per_candidate(trial, build(name, SIX_AND_THREE))
        if name in RETRIEVERS:
            token = HSTU_TOKEN if name == "hstu_retrieval" else SASREC_TOKEN
            assert scored == pytest.approx(2 * (6 * token + 21 * PAIR) / 39 + 2 * 16)
        else:
            assert scored == pytest.approx(BY_HAND[name] / 3)


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
    """Within 5 % on a case where products dominate: features of users and items, numeric ones, and retrieval's loss.

    The reference attention multiplies the whole square, so XLA's count is lowered by the pairs that no query sees.
    Layers are unrolled here, the reference has no kernel that XLA could not look into, and the loss is one chunk of a
    loop whose body XLA counts once.
    """
    monkeypatch.setattr(api, "_names", lambda implementation: ("reference",))
    monkeypatch.setattr(retrieval_loss, "_GATHERED_ROWS", 2**19)
    shape, width = Shape(history=24, candidates=16), 256
    sizes = {"width": width, "heads": 1, "expert_width": width, "negatives": 1024}
    model = build(name, shape, **{key: size for key, size in sizes.items() if hasattr(MODELS[name], key)})
    graph, state = nnx.split(model)
    batch = random_batch(shape, [[24]])

    def forward(state, batch, negatives):
        model = nnx.merge(graph, state)
        if name not in RETRIEVERS:
            return model(batch)
        rows = next_item(batch)
        return model.sampled_loss(model.states(batch, rows, None), rows.target, negatives)

    negatives = np.ones((1, 24, 1024), np.int32)
    counted = jax.jit(forward).lower(state, batch, negatives).compile().cost_analysis()["flops"]
    interleaved = name in ("hstu", "softmax_interleaved")
    layout = ITEMS if name in RETRIEVERS else INTERLEAVED if interleaved else CONTEXT_HISTORY_CANDIDATES
    unseen = layout.row_tokens(shape) ** 2 - layout.pairs(shape)
    square = 2 * 4 * width * unseen  # two layers, 2 (dqk + dv) per pair
    np.testing.assert_allclose(model.cost(shape).flops, counted - square, rtol=0.05)
