"""DLRM, DCN-v2 and DIN against their papers' equations in numpy, and what every pointwise ranker must satisfy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.batch import Context, Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.errors import UserError
from genrec_jax.models.base import Build
from genrec_jax.models.dcn import DCN, DCNConfig
from genrec_jax.models.din import DIN, DINConfig
from genrec_jax.models.dlrm import DLRM, DLRMConfig
from genrec_jax.nn.features import request_features
from genrec_jax.objectives import bce
from tests.requests import pack, random_requests

FEATURES = (Feature("country", 5, 1, "user"), Feature("genres", 12, 3, "item"), Feature("brand", 40, 1, "item"))
SCHEMA = Schema(items=30, tasks=("like", "long"), features=FEATURES)
SHAPE = Shape(history=12, candidates=3)
MODELS = {"dlrm": (DLRM, DLRMConfig), "dcn": (DCN, DCNConfig), "din": (DIN, DINConfig)}
SMALL = {
    "dlrm": {"embedding": 6, "bottom": (8,), "width": 10},
    "dcn": {"embedding": 6, "cross": 2, "width": 10},
    "dcn-low-rank": {"embedding": 6, "cross": 2, "rank": 4, "width": 10},
    "din": {"embedding": 6, "attention": (7, 5), "width": 10},
}


@functools.cache
def build(case, *, dtype=jnp.float32, **sizes):
    """The model's graph and random parameters, none of them at the zero a bias starts from."""
    model, config = MODELS[case.split("-")[0]]
    settings = config(**{**SMALL[case], **sizes})
    there = Build(SCHEMA, SHAPE, jnp.dtype(dtype))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(settings, there, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(7)
    return graph, jax.tree.map(lambda x: jnp.asarray(0.25 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def scorer(case):
    """A small model, its parameters, and its jitted (params, batch) -> logits."""
    graph, params = build(case)
    return nnx.merge(graph, params), params, jax.jit(lambda p, b: nnx.merge(graph, p)(b))


def score(case, batch):
    _, params, run = scorer(case)
    return np.asarray(run(params, batch))


REQUESTS = random_requests(6)
every_model = pytest.mark.parametrize("case", SMALL)


@functools.cache
def batches():
    """The same six requests, one per row and three per row with poisoned padding."""
    return pack(REQUESTS, segments=1, history=12), pack(REQUESTS, segments=3, history=20, padding=1)


def mlp(layers, x, activation):
    for i, layer in enumerate(layers):
        x = x @ np.float64(layer.kernel[...]) + (0 if layer.bias is None else np.float64(layer.bias[...]))
        x = activation(x) if i + 1 < len(layers) else x
    return x


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def inputs(case):
    """The model with its fields [6, 3, F, d] and dense features of the requests in float64 (tested on their own)."""
    model, params, _ = scorer(case)
    graph = nnx.graphdef(model)
    run = jax.jit(lambda p, b: (nnx.merge(graph, p).fields(b), request_features(b, SCHEMA)))
    fields, dense = run(params, batches()[0])
    return model, np.float64(fields), np.float64(dense)


def test_dlrm_equations():
    model, fields, dense = inputs("dlrm")
    batch = batches()[0]
    b = relu(mlp(model.bottom.layers, dense, relu))
    v = np.concatenate([b[:, :, None], fields], axis=2)
    dots = [np.sum(v[:, :, i] * v[:, :, j], -1) for i in range(v.shape[2]) for j in range(i)]
    z = np.concatenate([b, np.stack(dots, -1)], -1)
    np.testing.assert_allclose(score("dlrm", batch), mlp(model.top.layers, z, relu), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["dcn", "dcn-low-rank"])
def test_dcn_equations(case):
    model, fields, dense = inputs(case)
    batch = batches()[0]
    x0 = np.concatenate([fields.reshape(*fields.shape[:2], -1), dense], -1)
    x = x0
    for layer, up in enumerate(model.cross.up):
        inner = x @ np.float64(model.cross.down[layer].kernel[...]) if "rank" in case else x
        x = x0 * (inner @ np.float64(up.kernel[...]) + np.float64(up.bias[...])) + x
    np.testing.assert_allclose(score(case, batch), mlp(model.deep.layers, x, relu), rtol=1e-4, atol=1e-4)


def test_din_equations():
    """The activation unit in the paper's form: one matrix over [e, v, e - v, e * v], here with zeros for e - v."""
    model, fields, dense = inputs("din")
    batch = batches()[0]
    unit = model.unit
    kernels = [np.float64(x.kernel[...]) for x in (unit.event, unit.target, unit.product)]
    first = np.concatenate([kernels[0], kernels[1], np.zeros_like(kernels[0]), kernels[2]])
    labels = np.float64(batch.history.labels) @ np.float64(model.actions.kernel[...])
    events = np.float64(model.fields.history(batch)) + labels
    targets = fields[:, :, 1:4].reshape(6, 3, -1)  # after the country: item, genres, brand
    u = np.zeros_like(targets)
    for r, c in np.ndindex(*u.shape[:2]):
        for e in events[r, : len(REQUESTS[r]["item"])]:
            v = targets[r, c]
            hidden = silu(np.concatenate([e, v, e - v, e * v]) @ first + np.float64(unit.event.bias[...]))
            u[r, c] += mlp(unit.rest.layers, hidden, silu) * e / 12  # the divisor is the row's 12 slots
    x = np.concatenate([u, fields.reshape(*fields.shape[:2], -1), dense], -1)
    np.testing.assert_allclose(score("din", batch), mlp(model.deep.layers, x, silu), rtol=1e-4, atol=1e-4)


@every_model
def test_packed_equals_separate_and_padding_is_ignored(case):
    one, three = batches()
    logits = score(case, one)
    assert logits.shape == (6, 3, 2)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()  # the first request has no history
    np.testing.assert_allclose(score(case, three).reshape(6, 3, 2), logits, rtol=1e-4, atol=1e-5)
    poisoned = pack(REQUESTS, segments=1, history=12, padding=1)
    np.testing.assert_allclose(score(case, poisoned), logits, rtol=1e-6)


@every_model
def test_candidates_are_scored_independently_of_order_and_labels(case):
    batch = batches()[0]
    turned = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), batch.candidates)
    turned = dataclasses.replace(turned, labels=1 - turned.labels)
    rolled = score(case, dataclasses.replace(batch, candidates=turned))
    np.testing.assert_allclose(rolled, np.roll(score(case, batch), 1, axis=1), rtol=1e-4, atol=1e-5)


def changes(batch):
    """One change to each thing a ranker may look at, in the request of row 3 (12 past events)."""
    history, candidates = batch.history, batch.candidates

    def past(**values):
        return dataclasses.replace(batch, history=dataclasses.replace(history, **values))

    def slots(**values):
        return dataclasses.replace(batch, candidates=dataclasses.replace(candidates, **values))

    def bumped(features, name, vocab):
        return {**features, name: features[name].at[3].set((features[name][3] + 1) % vocab)}

    country = (batch.context.features["country"] + 1) % 5
    yield "context", dataclasses.replace(batch, context=Context({"country": country}))
    yield "history item", past(item=history.item.at[3, 4].set(history.item[3, 4] % 29 + 1))
    yield "history label", past(labels=history.labels.at[3, 4].set(1 - history.labels[3, 4]))
    yield "history time", past(time=history.time.at[3].set(history.time[3, 0]))
    yield "history feature", past(features=bumped(history.features, "genres", 12))
    yield "candidate item", slots(item=candidates.item.at[3].set(candidates.item[3] % 29 + 1))
    yield "candidate feature", slots(features=bumped(candidates.features, "brand", 40))
    yield "request time", slots(time=candidates.time.at[3].add(7200))


@every_model
def test_every_input_changes_the_logits_of_its_own_row_only(case):
    batch = batches()[0]
    before = score(case, batch)
    for name, changed in changes(batch):
        moved = np.abs(score(case, changed) - before).max(axis=(1, 2))
        assert moved[3] > 1e-5, name
        if name != "context":
            assert moved[[0, 1, 2, 4, 5]].max() < 1e-6, name


@every_model
def test_loss_is_masked_bce_and_reaches_every_parameter(case):
    model, params, _ = scorer(case)
    batch = batches()[1]
    batch = dataclasses.replace(
        batch, candidates=dataclasses.replace(batch.candidates, segment=batch.candidates.segment.at[0, :3].set(0))
    )
    graph = nnx.graphdef(model)
    run = jax.jit(jax.value_and_grad(lambda p, b: nnx.merge(graph, p).loss(b, nnx.Rngs(0)), has_aux=True))
    (loss, count), gradient = run(params, batch)
    mask = np.asarray(batch.candidates.segment) > 0
    assert float(count) == mask.sum() == 15
    expected, _ = bce(score(case, batch), batch.candidates.labels, mask)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for path, leaf in nnx.to_flat_state(gradient):
        values = np.asarray(leaf[...])
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path
        if path[-1] == "rows_table":
            assert not values[0].any(), path


@pytest.mark.parametrize("case", MODELS)
def test_dropout_acts_on_the_loss(case):
    (graph, params), batch = build(case, dropout=0.5), batches()[0]
    loss = jax.jit(lambda p, b, key: nnx.merge(graph, p).loss(b, nnx.Rngs(key))[0])
    assert len({float(loss(params, batch, jax.random.key(seed))) for seed in (0, 1)}) == 2


@pytest.mark.parametrize("case", MODELS)
def test_bfloat16_is_close_and_scoring_has_no_dropout(case):
    (graph, params), batch = build(case, dtype=jnp.bfloat16, dropout=0.5), batches()[0]
    low = jax.jit(lambda p, b: nnx.merge(graph, p)(b))(params, batch)
    assert low.dtype == jnp.float32
    high = score(case, batch)
    assert 0 < np.abs(low - high).max() < 0.05 * np.abs(high).max()


@every_model
def test_cost_counts_every_parameter(case):
    model = scorer(case)[0]
    cost = model.cost(SHAPE)
    assert cost.dense_params + cost.embedding_params == sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert cost.embedding_params == 6 * (30 + 5 + 12 + 40)


FIELDS, DENSE = 7, 8 + 2 * 2 + 4 * 2
# 12 events: 3 bags of 6-vectors; an event's 1 + 2 numbers into 2 sums and into counts of 12 genres and of 40 brands.
INPUTS = 2 * 12 * 3 * 6 + 2 * 12 * 3 * (2 + 12 + 40)
BY_HAND = {
    "dlrm": INPUTS + 3 * 2 * (DENSE * 8 + 8 * 6 + 28 * 6 + (6 + 28) * 10 + 10 * 10 + 10 * 2),
    "dcn": INPUTS + 3 * 2 * (2 * 62**2 + 62 * 10 + 10 * 10 + 10 * 2),
    "dcn-low-rank": INPUTS + 3 * 2 * (2 * 2 * 62 * 4 + 62 * 10 + 10 * 10 + 10 * 2),
    "din": INPUTS
    + 2 * 12 * (2 * 18 + 18 * 7)  # labels -> e_j; e_j's part of the unit's first layer
    + 2 * 3 * 18 * 7  # v's part
    + 2 * 36 * (18 * 7 + 7 * 5 + 5 + 18)  # products, rest of the unit and weighted sum per pair
    + 3 * 2 * ((18 + 62) * 10 + 10 * 10 + 10 * 2),
}


@every_model
def test_flops_by_hand(case):
    assert FIELDS * 6 + DENSE == 62
    assert scorer(case)[0].cost(SHAPE).flops == BY_HAND[case]


LARGE = {
    "dlrm": {"embedding": 16, "bottom": (128,), "width": 512, "depth": 3},
    "dcn": {"embedding": 48, "width": 256},
    "dcn-low-rank": {"embedding": 48, "rank": 128, "width": 512},
    "din": {"embedding": 48, "attention": (128, 64), "width": 256},
}


@every_model
def test_flops_match_the_compiler(case):
    (graph, params), batch = build(case, **LARGE[case]), batches()[0]
    compiled = jax.jit(lambda p, b: nnx.merge(graph, p)(b)).lower(params, batch).compile()
    counted = 6 * nnx.merge(graph, params).cost(SHAPE).flops
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("dlrm", {"width": 0}),
        ("dlrm", {"bottom": (0,)}),
        ("dcn", {"cross": 0}),
        ("dcn", {"rank": -1}),
        ("din", {"attention": ()}),
        *((name, {"dropout": 1.0}) for name in MODELS),
    ],
)
def test_impossible_sizes_name_the_key(case, sizes):
    with pytest.raises(UserError, match=f"model.{next(iter(sizes))}"):
        MODELS[case][1](**sizes).check()
