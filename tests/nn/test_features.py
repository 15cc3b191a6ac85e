"""Request features and fields against a loop over one request at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.batch import Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.nn import features
from genrec_jax.nn.cost import Cost
from genrec_jax.nn.features import Fields, request_feature_count, request_features, request_features_cost
from tests.models.gr_helpers import random_batch
from tests.requests import DAY, pack, random_requests

GENRES = Feature("genres", 12, 3, "item")
BRAND = Feature("brand", 40, 1, "item")
COUNTRY = Feature("country", 5, 1, "user")
SCHEMA = Schema(items=30, tasks=("like", "long"), features=(COUNTRY, GENRES, BRAND))


read = jax.jit(functools.partial(request_features, schema=SCHEMA))


def random_fields():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Fields(SCHEMA, 4, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    return nnx.merge(graph, params), jax.jit(lambda b: nnx.merge(graph, params)(b))


def log_odds(p):
    return np.log(p / (1 - p))


def oracle(r, c):
    """The features of candidate ``c`` of one request, event by event."""
    n, y = len(r["item"]), r["labels"].astype(float)
    rate = (y.sum(0) + 1) / (n + 2)

    def lift(rows):
        return log_odds((y[rows].sum(0) + 2 * rate) / (len(rows) + 2)) - log_odds(rate)

    out = [np.log1p(n) / np.log(65), *log_odds(rate), *lift(list(range(n))[-8:])]
    for name in ("genres", "brand"):
        ids = [g for g in np.atleast_1d(r["candidate_features"][name][c]) if g > 0]
        rows = [[j for j in range(n) if g in np.atleast_1d(r["features"][name][j])] for g in ids]
        if not ids:
            out += [0.0] * 4
            continue
        out.append(np.mean([np.log1p(len(x)) for x in rows]) / np.log(65))
        out.append(np.mean([len(x) / max(n, 1) for x in rows]))
        out += list(np.mean([lift(x) for x in rows], axis=0))
    gaps = [r["request_time"] - r["time"][-1], r["request_time"] - r["time"][0]] if n else [0, 0]
    out += list(np.log1p(gaps) / np.log1p(DAY))
    out.append(float(r["candidates"][c] in r["item"]))
    for period in (DAY, 7 * DAY):
        phase = 2 * np.pi * (r["request_time"] % period) / period
        out += [np.sin(phase), np.cos(phase)]
    return out


@pytest.fixture(params=["table", "comparison"])
def counting(request, monkeypatch):
    """Both ways of counting matches; the feature's vocabulary chooses between them."""
    monkeypatch.setattr(features, "COUNTED_VOCAB", 256 if request.param == "table" else 0)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("segments", [1, 3])
def test_matches_a_loop_over_events(segments):
    requests = random_requests(6)
    batch = pack(requests, segments=segments, history=12 if segments == 1 else 20, padding=1)
    got = np.asarray(jax.jit(lambda b: request_features(b, SCHEMA))(batch))
    assert got.dtype == np.float32
    assert got.shape[-1] == request_feature_count(SCHEMA)
    expected = [[oracle(r, c) for c in range(3)] for r in requests]
    np.testing.assert_allclose(got.reshape(6, 3, -1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("counting")
def test_padding_slots_read_zero_and_their_content_is_ignored():
    requests = random_requests(4)[:3]
    fresh = jax.jit(lambda b: request_features(b, SCHEMA))
    clean, poisoned = (fresh(pack(requests, segments=2, history=16, padding=p)) for p in (0, 1))
    np.testing.assert_array_equal(clean, poisoned)
    assert not np.any(clean[1, 3:])


def test_empty_history_is_finite_and_bare():
    got = np.asarray(read(pack(random_requests(4), segments=1, history=12)))[:1]
    assert np.isfinite(got).all()
    assert not got[..., :-4].any()


def test_labels_of_candidates_do_not_leak():
    batch = pack(random_requests(4), segments=1, history=12)
    flipped = dataclasses.replace(
        batch, candidates=dataclasses.replace(batch.candidates, labels=1 - batch.candidates.labels)
    )
    np.testing.assert_array_equal(read(batch), read(flipped))


def test_a_dataset_without_features():
    schema = Schema(items=30, tasks=("like",))
    batch = pack(random_requests(2), segments=1, history=12)
    batch = dataclasses.replace(
        batch,
        history=dataclasses.replace(batch.history, labels=batch.history.labels[..., :1], features={}),
        candidates=dataclasses.replace(batch.candidates, features={}),
    )
    assert jax.eval_shape(lambda b: request_features(b, schema), batch).shape == (2, 3, request_feature_count(schema))


def test_request_features_cost_by_hand(monkeypatch):
    """10 events of 1 + 2 numbers: two sums, counts of 12 genres and 40 brands, or of 3 x 3 and 3 ids to compare."""
    for shape in (Shape(history=10, candidates=3), Shape(history=10, candidates=3, segments=2)):
        assert request_features_cost(SCHEMA, shape) == Cost(flops=2 * 10 * 3 * (2 + 12 + 40))
    monkeypatch.setattr(features, "COUNTED_VOCAB", 12)
    assert request_features_cost(SCHEMA, Shape(10, 3)).flops == 2 * 10 * 3 * (2 + 12 + 3)
    monkeypatch.setattr(features, "COUNTED_VOCAB", 0)
    assert request_features_cost(SCHEMA, Shape(10, 3)).flops == 2 * 10 * 3 * (2 + 9 + 3)


@pytest.mark.usefixtures("counting")
def test_request_features_cost_agrees_with_xla():
    """With many tasks, so that products outweigh the comparisons that find what to count."""
    tasks, shape = 256, Shape(history=1024, candidates=64)
    schema = Schema(items=30, tasks=tuple(map(str, range(tasks))), features=(Feature("kind", 128, 1, "item"),))
    batch = random_batch(shape, [[1024]], schema=schema)
    compiled = jax.jit(lambda b: request_features(b, schema)).lower(batch).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(request_features_cost(schema, shape).flops, rel=0.05)


@pytest.mark.parametrize("segments", [1, 3])
def test_fields_match_a_loop(segments):
    requests = random_requests(6)
    fields, run = random_fields()
    batch = pack(requests, segments=segments, history=20, padding=1)
    got = np.asarray(run(batch)).reshape(6, 3, -1, 4)
    assert got.shape[2] == fields.count == 1 + 3 + 3

    def row(table, ids):
        ids = [i for i in np.atleast_1d(ids) if i > 0]
        return np.mean([np.asarray(table.rows_table[...])[i] for i in ids], axis=0) if ids else np.zeros(4)

    for i, r in enumerate(requests):
        bags = [r["item"], *(r["item"][r["labels"][:, a] == 1] for a in range(2))]
        for c in range(3):
            expected = [
                row(fields.contexts.tables["country"], r["country"]),
                row(fields.items, r["candidates"][c]),
                row(fields.sides.tables["genres"], r["candidate_features"]["genres"][c]),
                row(fields.sides.tables["brand"], r["candidate_features"]["brand"][c]),
                *(row(fields.items, ids) for ids in bags),
            ]
            np.testing.assert_allclose(got[i, c], expected, atol=1e-6)


def test_fields_cost_by_hand():
    fields, _ = random_fields()
    cost = fields.cost(Shape(history=10, candidates=3, segments=2))
    assert cost.embedding_params == 4 * (30 + 5 + 12 + 40)
    assert cost.embedding_reads == 4 * ((6 + 10) + 2 + 6 * 3 + 6)
    assert cost.flops == 2 * 10 * 3 * 4
    assert cost.dense_params == 0
