"""Properties that every generative ranker must have, whatever its layout and blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from genrec_jax.batch import Shape
from tests.models.gr_helpers import RANKERS, change, initialised, jit, pack, random_batch

SHAPE = Shape(history=10, candidates=3)
LENGTHS = [[10], [4], [0], [3]]

every_ranker = pytest.mark.parametrize("name", RANKERS)
generative = pytest.mark.parametrize("name", [n for n, c in RANKERS.items() if c.rows == "windows"])


@functools.cache
def _jitted(name):
    """The state of a ranker with dropout, and its jitted scores, event scores and losses."""
    graph, state = nnx.split(initialised(RANKERS[name], SHAPE))
    score = jit(lambda s, batch: nnx.merge(graph, s)(batch))
    events = jit(lambda s, batch: _event_logits(nnx.merge(graph, s), batch))
    loss = jit(lambda s, batch, key: nnx.merge(graph, s).loss(batch, None if key is None else nnx.Rngs(key)))
    return state, score, events, loss


def _event_logits(ranker, batch):
    ranker = getattr(ranker, "ranker", ranker)
    return ranker.logits(ranker.states(batch, None)[0])


def scores(name, batch, state=None):
    own, score, _, _ = _jitted(name)
    return np.asarray(score(own if state is None else state, batch))


def event_scores(name, batch):
    state, _, events, _ = _jitted(name)
    return np.asarray(events(state, batch))


def loss_of(name, batch, key=None):
    """(loss, targets), without dropout unless there is a key."""
    state, _, _, loss = _jitted(name)
    total, count = loss(state, batch, key)
    return float(total), float(count)


def batch():
    return random_batch(SHAPE, LENGTHS)


def candidate_fields(c, index):
    """The candidates at slots ``index`` of every row."""
    fields = {f: getattr(c, f)[:, index] for f in ("item", "time", "labels", "segment", "before")}
    return {**fields, "features": {k: v[:, index] for k, v in c.features.items()}}


@every_ranker
def test_logits_are_float32_per_task(name):
    out = scores(name, batch())
    assert out.shape == (4, 3, 2)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


@every_ranker
def test_permuting_candidates_permutes_logits(name):
    index = [2, 0, 1]
    moved = change(batch(), "candidates", **candidate_fields(batch().candidates, index))
    np.testing.assert_allclose(scores(name, moved), scores(name, batch())[:, index], rtol=0, atol=2e-6)


@every_ranker
def test_a_candidate_does_not_see_the_others(name):
    item = batch().candidates.item.copy()
    item[:, 1] = item[:, 1] % 39 + 1
    before, after = scores(name, batch()), scores(name, change(batch(), "candidates", item=item))
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (np.abs(after[:, 1] - before[:, 1]) > 1e-5).all()


@every_ranker
def test_one_candidate_per_row_scores_the_same(name):
    one = change(batch(), "candidates", **candidate_fields(batch().candidates, [1]))
    np.testing.assert_allclose(scores(name, one), scores(name, batch())[:, 1:2], rtol=0, atol=2e-6)


@every_ranker
def test_packed_segments_score_as_separate_rows(name):
    separate = random_batch(SHAPE, [[4], [0], [3], [3]])
    packed = pack(separate, Shape(history=10, candidates=3, segments=4))
    expected = scores(name, separate).reshape(1, 12, 2)
    np.testing.assert_allclose(scores(name, packed), expected, rtol=0, atol=2e-6)


@generative
def test_packed_segments_have_the_same_loss(name):
    separate = random_batch(SHAPE, [[4], [0], [3], [3]])
    packed = pack(separate, Shape(history=10, candidates=3, segments=4))
    (total, count), (packed_total, packed_count) = loss_of(name, separate), loss_of(name, packed)
    assert packed_total == pytest.approx(total, rel=1e-5)
    assert packed_count == count == 10 + 12


@generative
def test_one_encoding_predicts_what_an_impression_for_each_event_would(name):
    """Row t holds the first t events of the full row as history and event t as its one candidate."""
    full = random_batch(SHAPE, [[10]])
    h = full.history
    times = np.arange(10)[:, None]
    rows = jax.tree.map(lambda x: np.repeat(x, 10, axis=0), full)
    rows = change(rows, "history", segment=(np.arange(10) < times).astype(np.int32))
    first = {f: np.repeat(getattr(h, f)[0][:, None], 3, axis=1) for f in ("item", "time", "labels", "before")}
    features = {k: np.repeat(v[0][:, None], 3, axis=1) for k, v in h.features.items()}
    alone = (np.arange(3) == 0) + np.zeros((10, 1), np.int32)
    impressions = change(rows, "candidates", **first, features=features, segment=alone.astype(np.int32))
    np.testing.assert_allclose(scores(name, impressions)[:, 0], event_scores(name, full)[0], rtol=0, atol=2e-6)


@every_ranker
def test_candidate_labels_do_not_reach_scores(name):
    flipped = change(batch(), "candidates", labels=1 - batch().candidates.labels)
    np.testing.assert_array_equal(scores(name, flipped), scores(name, batch()))


@generative
def test_an_event_is_predicted_before_its_own_action(name):
    labels = batch().history.labels.copy()
    labels[:, 3] = 1 - labels[:, 3]
    before, after = event_scores(name, batch()), event_scores(name, change(batch(), "history", labels=labels))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    changed = np.abs(after - before).max(-1) > 1e-6
    assert changed[0, 4:].all()  # a full row: every later event saw it


@generative
def test_labels_of_events_shown_together_do_not_reach_each_other(name):
    """Events 2 to 5 of the full row are one request, which goes on in its candidates."""
    together = batch().history.before.copy()
    together[0, 2:6] = 2
    shown = change(batch(), "history", before=together)
    labels = shown.history.labels.copy()
    labels[0, 2:5] = 1 - labels[0, 2:5]
    changed = change(shown, "history", labels=labels)
    before, after = event_scores(name, shown), event_scores(name, changed)
    np.testing.assert_array_equal(after[0, :6], before[0, :6])
    assert (np.abs(after[0, 6:] - before[0, 6:]).max(-1) > 1e-6).all()
    cut = np.array([[2], [4], [0], [3]], np.int32) + np.zeros((1, 3), np.int32)
    apart = [scores(name, change(b, "candidates", before=cut)) for b in (shown, changed)]
    np.testing.assert_array_equal(apart[1], apart[0])
    assert (np.abs(scores(name, changed) - scores(name, shown))[0].max(-1) > 1e-6).all()


@generative
def test_the_future_does_not_reach_events(name):
    """Later items, times and candidates leave earlier predictions alone."""
    h = batch().history
    item, time = h.item.copy(), h.time.copy()
    item[:, 6:], time[:, 6:] = item[:, 6:] % 39 + 1, time[:, 6:] + 10_000
    later = change(change(batch(), "history", item=item, time=time), "candidates", time=batch().candidates.time + 10**6)
    np.testing.assert_array_equal(event_scores(name, later)[0, :6], event_scores(name, batch())[0, :6])


@every_ranker
def test_padding_content_is_irrelevant(name):
    clean = batch()
    h = clean.history
    pad = h.segment == 0
    poison = {f: np.where(pad, 10**6, getattr(h, f)) for f in ("item", "time")}
    labels = np.where(pad[..., None], 255, h.labels)
    features = {k: np.where(pad.reshape(*pad.shape, *[1] * (v.ndim - 2)), 10**6, v) for k, v in h.features.items()}
    dirty = change(clean, "history", **poison, labels=labels.astype(np.uint8), features=features)
    dirty = change(dirty, "candidates", segment=np.where(np.arange(3) < 2, dirty.candidates.segment, 0))
    dirty = change(dirty, "candidates", item=np.where(np.arange(3) < 2, dirty.candidates.item, 10**6))
    np.testing.assert_array_equal(scores(name, dirty)[:, :2], scores(name, clean)[:, :2])
    supervised = change(dirty, "history", supervised=np.ones_like(pad))
    loss, count = loss_of(name, supervised)
    assert np.isfinite(loss)
    assert count == (17 if RANKERS[name].rows == "windows" else 0) + 8


COMPONENTS = {
    "history items": lambda b: change(b, "history", item=b.history.item % 39 + 1),
    "history order": lambda b: change(b, "history", item=b.history.item[:, ::-1].copy()),
    "history times": lambda b: change(b, "history", time=b.history.time // 50),
    "request time": lambda b: change(b, "candidates", time=b.candidates.time + 10**5),
    "actions": lambda b: change(b, "history", labels=1 - b.history.labels),
    "item features": lambda b: change(
        b, "candidates", features={k: (v + 1) % 5 for k, v in b.candidates.features.items()}
    ),
    "context": lambda b: change(b, "context", features={k: v % 3 + 1 for k, v in b.context.features.items()}),
}


@every_ranker
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_input_matters(name, component):
    before, after = scores(name, batch()), scores(name, COMPONENTS[component](batch()))
    assert np.abs(after - before)[0].max() > 1e-5  # the row with a full history


@every_ranker
@pytest.mark.parametrize("table", ["position", "time"])
def test_every_bias_table_matters(name, table):
    state = jax.tree.map(lambda x: x, _jitted(name)[0])
    flat = [(path, p) for path, p in nnx.to_flat_state(state) if path[-2:] == ("bias", table)]
    assert len(flat) == 2  # one per block
    for path, _ in flat:
        changed = nnx.from_flat_state(
            [
                (p, v.replace(v[...] + jnp.linspace(-1, 1, v.size)) if p == path else v)
                for p, v in nnx.to_flat_state(state)
            ]
        )
        assert np.abs(scores(name, batch(), changed) - scores(name, batch())).max() > 1e-5


@every_ranker
def test_dropout_acts_in_training_only(name):
    """Scores of this same model are exact in every other test."""
    losses = [loss_of(name, batch(), jax.random.key(seed))[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@every_ranker
def test_bfloat16_keeps_float32_logits(name):
    graph, state = nnx.split(initialised(RANKERS[name], SHAPE, dtype="bfloat16"))
    out = jit(lambda s: nnx.merge(graph, s)(batch()))(state)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, scores(name, batch()), rtol=0, atol=0.15)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state))


@every_ranker
def test_gradients_reach_every_parameter_and_loss_falls(name):
    data = random_batch(SHAPE, [[10], [9], [4], [6]])
    for part in ("history", "candidates"):
        labels = getattr(data, part).item[..., None] % np.array([2, 3]) == 0  # learnable: a function of the item
        data = change(data, part, labels=labels.astype(np.uint8))
    graph = nnx.graphdef(initialised(dataclasses.replace(RANKERS[name], dropout=0.0), SHAPE))
    state, optimizer = _jitted(name)[0], optax.adam(1e-2)

    @jit
    def step(state, opt):
        def mean(s):
            total, count = nnx.merge(graph, s).loss(data, nnx.Rngs(0))
            return total / count

        loss, grads = jax.value_and_grad(mean)(state)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(state, updates), opt, loss, grads

    opt, losses = jit(optimizer.init)(state), []
    for _ in range(21):
        state, opt, loss, grads = step(state, opt)
        losses.append(float(loss))
        if len(losses) == 2:  # past the zeros that some biases start from
            for path, grad in nnx.to_flat_state(grads):
                assert np.isfinite(grad[...]).all(), path
                assert np.abs(grad[...]).max() > 1e-9, path
    assert losses[-1] < 0.6 * losses[0]


def test_interleaved_rows_are_windows():
    assert RANKERS["softmax"].rows == "requests"
    assert RANKERS["softmax_interleaved"].rows == "windows"
    assert dataclasses.asdict(RANKERS["softmax"]).keys() >= {"layout", "width", "experts"}
