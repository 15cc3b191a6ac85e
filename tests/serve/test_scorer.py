"""Cached scores are the model's own on whole rows, whatever is cached, appended, packed or asked together."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from genrec_jax.batch import Shape
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build
from genrec_jax.serve import Scorer
from tests.models.gr_helpers import RANKERS, SCHEMA, change, random_batch
from tests.serve.helpers import HISTORY, model_of, requests_of, scorer_of

both = pytest.mark.parametrize("name", ["hstu", "dirl"])
SHAPE = Shape(history=HISTORY, candidates=7)
LENGTHS = [[40], [17], [0], [33], [1]]
TOLERANCE = 1e-5  # of a logit, in float32


def batch():
    return random_batch(SHAPE, LENGTHS)


def wanted(name, batch):
    """Logits [R, K, A] of every request by the model's own call on the whole Batch."""
    logits = model_of(name)[2](batch)
    return logits.reshape(-1, SHAPE.candidates, logits.shape[-1])


def assert_scores(got, want):
    assert np.abs(want).max() > 0.1
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def part(request, start, stop, *, append=True):
    """The request with only the events from ``start`` to ``stop``."""
    return dataclasses.replace(request, events=request.events[start:stop], append=append)


def picked(request, index):
    features = {name: x[index] for name, x in request.features.items()}
    return dataclasses.replace(request, item=request.item[index], features=features)


@both
def test_cached_scores_are_the_models(name):
    """Ragged histories, an empty one, microbatches that do not divide the candidates; again from what is cached."""
    scorer, want = scorer_of(name), wanted(name, batch())
    requests = requests_of(batch())
    assert_scores(scorer.logits(requests), want)
    assert_scores(scorer.logits(requests), want)
    assert len(scorer.cache) == len(requests)
    probabilities = scorer.score(requests[0])
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-want[0])), atol=1e-6)
    assert probabilities.shape == (7, 2)


@both
@pytest.mark.parametrize("microbatch", [1, 64])
def test_any_microbatch(name, microbatch):
    scorer = scorer_of(name, microbatch=microbatch)
    for i in (1, 2):
        assert_scores(scorer.logits(requests_of(batch())[i : i + 1]), wanted(name, batch())[i : i + 1])


@both
def test_packed_rows_are_the_same_requests(name):
    """Three users, with contexts of their own, in one row of the model."""
    packed = random_batch(Shape(HISTORY, 7, segments=3), [[12, 0, 20], [3, 30, 5]])
    assert_scores(scorer_of(name).logits(requests_of(packed)), wanted(name, packed))


@both
def test_one_at_a_time_and_in_any_order(name):
    scorer, want = scorer_of(name), wanted(name, batch())
    order = np.random.default_rng(0).permutation(7)
    for request, logits in zip(requests_of(batch()), want):
        single = [picked(request, slice(i, i + 1)) for i in range(7)]
        assert_scores(np.concatenate(scorer.logits(single))[None], logits[None])
        assert_scores(scorer.logits([picked(request, order)]), logits[order][None])
        assert scorer.score(picked(request, slice(0, 0))).shape == (0, 2)


@both
def test_appended_events_are_as_if_they_had_been_there(name):
    """One by one, in pieces of any size, and as a longer whole history."""
    want = wanted(name, batch())
    for cuts in ([0, 9, 10, 31, 40], [0, 33, 40], [0, *range(36, 41)]):
        scorer = scorer_of(name)
        request = requests_of(batch())[0]
        for start, stop in itertools.pairwise(cuts):
            got = scorer.logits([part(request, start, stop, append=start > 0)])
        assert_scores(got, want[:1])
    scorer.logits([dataclasses.replace(request, user="other", events=request.events[:22])])
    assert_scores(scorer.logits([dataclasses.replace(request, user="other")]), want[:1])


@both
def test_a_growing_history_moves_to_the_next_capacity(name):
    scorer, request = scorer_of(name, lanes=1, smallest=8), requests_of(batch())[0]
    for start, stop, capacity in ((0, 30, 32), (30, 40, 40)):
        got = scorer.logits([part(request, start, stop, append=start > 0)])
        assert scorer.cache.get(request.user).capacity == capacity
    assert_scores(got, wanted(name, batch())[:1])
    assert scorer.shapes.capacities == (8, 16, 32, 40)


@both
def test_increments_of_one_user_in_one_call_take_their_turn(name):
    request = requests_of(batch())[0]
    pieces = [part(request, 0, 20, append=False), part(request, 20, 38), part(request, 38, 40)]
    assert_scores(scorer_of(name).logits(pieces)[-1:], wanted(name, batch())[:1])


@both
def test_events_shown_together(name):
    """Also where an increment goes on with the request that the last one ended in."""
    ids = np.repeat(np.arange(1, 21), 2)
    together = np.where(np.arange(HISTORY) < 5, 0, ids)  # the first five each by itself
    shown = batch()
    first = [next(i for i in range(HISTORY) if together[i] == together[j]) for j in range(HISTORY)]
    before = np.where(together == 0, np.arange(HISTORY), first).astype(np.int32)
    shown = change(shown, "history", before=np.where(shown.history.segment > 0, before, 0))
    want = wanted(name, shown)
    assert np.abs(want - wanted(name, batch())).max() > 1e-4
    requests = requests_of(shown, [together] * len(LENGTHS))
    assert_scores(scorer_of(name).logits(requests), want)
    scorer = scorer_of(name)
    scorer.logits([part(requests[0], 0, 24, append=False)])
    scorer.logits([part(requests[0], 24, 27)])
    assert together[26] == together[27]
    assert_scores(scorer.logits([part(requests[0], 27, 40)]), want[:1])


@both
def test_a_sliding_window_forgets_what_left_it(name):
    """N events count: when the oldest drop out the rest is encoded anew, for their states had seen them."""
    long = random_batch(Shape(HISTORY + 6, 7), [[HISTORY + 6]])
    full = requests_of(long)[0]
    last = dataclasses.replace(full, events=full.events[6:], user=None)
    fresh = scorer_of(name).logits([last])
    scorer = scorer_of(name)
    scorer.logits([part(full, 0, HISTORY, append=False)])
    assert_scores(scorer.logits([part(full, HISTORY, HISTORY + 6)]), fresh)
    assert len(scorer.cache.get(full.user).events) == HISTORY
    assert_scores(scorer_of(name).logits([full]), fresh)
    h = long.history
    window = jax.tree.map(lambda x: x[:, 6:], h)
    window = dataclasses.replace(window, before=np.arange(HISTORY, dtype=np.int32)[None])
    candidates = dataclasses.replace(long.candidates, before=np.full((1, 7), HISTORY, np.int32))
    assert_scores(fresh, wanted(name, dataclasses.replace(long, history=window, candidates=candidates)))


@both
def test_another_context_is_another_prefix(name):
    scorer, request = scorer_of(name), requests_of(batch())[1]
    scorer.logits([request])
    other = dataclasses.replace(request, context={k: (v + 1) % 4 for k, v in request.context.items()})
    features = {k: v.copy() for k, v in batch().context.features.items()}
    for values in features.values():
        values[1] = (values[1] + 1) % 4
    want = wanted(name, change(batch(), "context", features=features))
    assert_scores(scorer.logits([other]), want[1:2])
    assert np.abs(want[1] - wanted(name, batch())[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "kind", "bound"), [("hstu", "bfloat16", 0.01), ("hstu", "int8", 0.02), ("dirl", "int8", 0.02)]
)
def test_narrow_caches_cost_little(name, kind, bound):
    """The largest error of a logit is within ``bound`` of the logits' spread; appending loses no more than encoding."""
    want, request = wanted(name, batch())[0], requests_of(batch())[0]
    scorer, wide = scorer_of(name, kind=kind), scorer_of(name)
    whole = scorer.logits([request])[0]
    assert 0 < np.abs(whole - want).max() <= bound * want.std()
    wide.logits([request])
    assert scorer.cache.nbytes < 0.75 * wide.cache.nbytes
    for start, stop in ((0, 35), (35, 36), (36, 40)):
        pieces = scorer.logits([dataclasses.replace(part(request, start, stop, append=start > 0), user="pieces")])[0]
    assert np.abs(pieces - want).max() <= bound * want.std()


@both
@pytest.mark.parametrize("budget", [0, 3000, 60_000, 200_000])
def test_a_small_budget_changes_no_score(name, budget):
    scorer, want = scorer_of(name, cache_bytes=budget), wanted(name, batch())
    for _ in range(2):
        for request, logits in zip(requests_of(batch()), want):
            assert_scores(scorer.logits([request]), logits[None])
            assert scorer.cache.nbytes <= budget


def test_nothing_compiles_anew():
    """New lengths, users and numbers of candidates meet programs that are there."""
    scorer = scorer_of("hstu")
    requests = requests_of(batch())
    scorer.logits(requests)
    scorer.logits(requests[:1])
    compiled = scorer.compiled
    sizes = compiled.score._cache_size(), compiled.extend._cache_size()
    for length, count in ((5, 2), (19, 7), (31, 1)):
        request = picked(requests[0], slice(0, count))
        scorer.logits([dataclasses.replace(request, events=request.events[:length], user=length)])
    assert (compiled.score._cache_size(), compiled.extend._cache_size()) == sizes


def test_a_restarted_scorer_agrees():
    """The same stream gives the same bits; a whole history to a new scorer the same scores."""
    request = requests_of(batch())[0]
    stream = [part(request, 0, 30, append=False), *(part(request, i, i + 1) for i in range(30, 40))]
    first, again = (scorer_of("hstu").logits(stream) for _ in range(2))
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)
    assert_scores(scorer_of("hstu").logits([request]), first[-1:])


def of(request, **changes):
    return dataclasses.replace(request, **changes)


REFUSED = {
    "needs a user": lambda r: of(r, append=True, user=None),
    "no history here": lambda r: of(r, append=True, user="stranger"),
    "candidate items must be": lambda r: of(r, item=r.item + 100),
    "history items must be": lambda r: of(r, events=of(r.events, item=0 * r.events.item)),
    "times run backwards": lambda r: of(r, events=of(r.events, time=r.events.time[::-1])),
    "labels must be": lambda r: of(r, events=of(r.events, labels=r.events.labels[:, :1])),
    "as many times": lambda r: of(r, events=of(r.events, time=r.events.time[1:])),
    "before its last event": lambda r: of(r, time=int(r.events.time[-1]) - 1),
    "request's feature 'age'": lambda r: of(r, context={}),
    "candidates' feature 'genre'": lambda r: of(r, features={**r.features, "genre": r.features["maker"]}),
    "history's feature 'maker'": lambda r: of(
        r, events=of(r.events, features={**r.events.features, "maker": r.events.item + 9})
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_bad_request_is_refused_and_has_no_effect(words):
    scorer = scorer_of("hstu")
    good, bad = requests_of(batch())[1], REFUSED[words](requests_of(batch())[0])
    with pytest.raises(UserError, match=words):
        scorer.logits([good, bad])
    assert not len(scorer.cache)


def test_an_increment_from_the_past_is_refused():
    scorer, request = scorer_of("hstu"), requests_of(batch())[0]
    scorer.logits([part(request, 0, 30, append=False)])
    with pytest.raises(UserError, match="begin before the last one known"):
        scorer.logits([part(request, 20, 25)])
    assert_scores(scorer.logits([part(request, 30, 40)]), wanted("hstu", batch())[:1])


def test_models_without_cached_attention_are_refused():
    build = Build(SCHEMA, SHAPE, np.dtype("float32"))
    model = nnx.eval_shape(lambda: registry.build(RANKERS["softmax"], build, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="cannot be served"):
        Scorer.of(model, {}, SCHEMA, HISTORY)
    model, params, _ = model_of("hstu")
    with pytest.raises(UserError, match="at least 1"):
        Scorer.of(model, params, SCHEMA, HISTORY, microbatch=0)
