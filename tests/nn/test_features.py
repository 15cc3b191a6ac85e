"""Request features and fields against a loop over one request at a time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.batch import Batch, Candidates, Context, History, Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.nn import features
from genrec_jax.nn.features import Fields, request_feature_count, request_features

GENRES = Feature("genres", 12, 3, "item")
BRAND = Feature("brand", 40, 1, "item")
COUNTRY = Feature("country", 5, 1, "user")
SCHEMA = Schema(items=30, tasks=("like", "long"), features=(COUNTRY, GENRES, BRAND))
DAY = 86_400


def random_requests(count, *, candidates=3, seed=0, lengths=(0, 5, 1, 12)):
    """Requests as plain dictionaries; the first has no history."""
    rng = np.random.default_rng(seed)

    def items(n):
        ids = rng.integers(0, 12, (n, 3)) * (rng.random((n, 3)) < 0.7)
        return {"genres": ids.astype(np.int32), "brand": rng.integers(0, 6, n).astype(np.int32)}

    requests = []
    for i in range(count):
        n = lengths[i % len(lengths)]
        times = np.sort(rng.integers(0, 40 * DAY, n + 1)).astype(np.int32)
        requests.append(
            {
                "user": i,
                "country": int(rng.integers(0, 5)),
                "item": rng.integers(1, 30, n).astype(np.int32),
                "time": times[:-1],
                "labels": rng.integers(0, 2, (n, 2)).astype(np.uint8),
                "features": items(n),
                "request_time": times[-1],
                "candidates": rng.integers(1, 30, candidates).astype(np.int32),
                "candidate_features": items(candidates),
                "candidate_labels": rng.integers(0, 2, (candidates, 2)).astype(np.uint8),
            }
        )
    return requests


def pack(requests, *, segments, history, padding=0):
    """A Batch of ``segments`` requests per row; ``padding`` fills every slot that belongs to none."""
    k, b = len(requests[0]["candidates"]), math.ceil(len(requests) / segments)

    def empty(*shape, dtype=np.int32):
        return np.full((b, *shape), padding, dtype)

    n, c = (history,), (segments * k,)
    past = History(
        empty(*n),
        empty(*n),
        empty(*n, 2, dtype=np.uint8),
        np.zeros((b, *n), np.int32),
        np.zeros((b, *n), bool),
        {"genres": empty(*n, 3), "brand": empty(*n)},
    )
    slots = Candidates(
        empty(*c),
        empty(*c),
        empty(*c, 2, dtype=np.uint8),
        np.zeros((b, *c), np.int32),
        {"genres": empty(*c, 3), "brand": empty(*c)},
    )
    user, country, used = np.full((b, segments), -1, np.int32), empty(segments), [0] * b
    for i, r in enumerate(requests):
        row, s = divmod(i, segments)
        h, v = slice(used[row], used[row] + len(r["item"])), slice(s * k, (s + 1) * k)
        used[row] = h.stop
        past.item[row, h], past.time[row, h], past.labels[row, h] = r["item"], r["time"], r["labels"]
        past.segment[row, h], slots.segment[row, v] = s + 1, s + 1
        slots.item[row, v], slots.time[row, v] = r["candidates"], r["request_time"]
        slots.labels[row, v] = r["candidate_labels"]
        for name in ("genres", "brand"):
            past.features[name][row, h] = r["features"][name]
            slots.features[name][row, v] = r["candidate_features"][name]
        user[row, s], country[row, s] = r["user"], r["country"]
    return jax.tree.map(jnp.asarray, Batch(user, Context({"country": country}), past, slots))


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
