"""HSTU and SASRec retrieval: properties of their rows (recorded vectors: tests/experiments/test_parity_models.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from genrec_jax.batch import Shape
from genrec_jax.data.schema import Schema
from genrec_jax.errors import UserError
from genrec_jax.layouts import next_item
from genrec_jax.models.hstu_retrieval import HSTURetrievalConfig
from genrec_jax.models.sasrec import SASRecConfig
from genrec_jax.retrieval_loss import Popularity
from tests.models.gr_helpers import change, initialised, jit, pack, random_batch

SHAPE = Shape(history=10, candidates=1)
SCHEMA = Schema(items=30, tasks=("watch",))
TINY = HSTURetrievalConfig(width=16, heads=2, dropout=0.5, negatives=8)
TINIES = {"hstu_retrieval": TINY, "sasrec": SASRecConfig(width=16, heads=2, dropout=0.5, negatives=8)}
both_models = pytest.mark.parametrize("name", TINIES)


@functools.cache
def _jitted(name):
    """The state of a tiny model with dropout, and its jitted (states, users, loss)."""
    graph, state = nnx.split(tiny(name))
    states = jit(lambda s, batch: nnx.merge(graph, s).states(batch, next_item(batch), None))
    users = jit(lambda s, batch: nnx.merge(graph, s).users(batch))
    loss = jit(lambda s, batch, seed: nnx.merge(graph, s).loss(batch, nnx.Rngs(seed)))
    return state, states, users, loss


def states_of(batch, name="hstu_retrieval"):
    state, states, _, _ = _jitted(name)
    return np.asarray(states(state, batch))


def users_of(batch, name="hstu_retrieval"):
    state, _, users, _ = _jitted(name)
    return np.asarray(users(state, batch))


def loss_of(batch, seed=0, name="hstu_retrieval"):
    state, _, _, loss = _jitted(name)
    total, count = loss(state, batch, jax.random.key(seed))
    return float(total), float(count)


def tiny(name="hstu_retrieval", **changes):
    return initialised(dataclasses.replace(TINIES[name], **changes), SHAPE, SCHEMA)


def rows_batch(lengths=((10,), (4,), (1,)), shape=SHAPE):
    return random_batch(shape, [list(r) for r in lengths], schema=SCHEMA)


def test_users_are_the_states_after_the_last_event():
    batch = rows_batch()
    users = users_of(batch)
    assert users.shape == (3, 1, 16)
    np.testing.assert_allclose(users[:, 0], states_of(batch)[np.arange(3), [9, 3, 0]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(users, axis=-1), 1.0, rtol=1e-5)
    items = tiny().items()
    assert items.shape == (30, 16)
    np.testing.assert_allclose(jnp.linalg.norm(items, axis=-1), [0.0] + [1.0] * 29, rtol=1e-5)


def test_a_user_does_not_depend_on_the_target_item_but_on_its_time():
    batch = rows_batch()
    item = change(batch, "candidates", item=batch.candidates.item % 29 + 1)
    later = change(batch, "candidates", time=batch.candidates.time + 10**6)
    np.testing.assert_array_equal(users_of(item), users_of(batch))
    assert np.abs(users_of(later) - users_of(batch)).max() > 1e-7


def test_sasrec_knows_order_but_no_time():
    batch = rows_batch()
    again = random_batch(SHAPE, [[10], [4], [1]], seed=1, schema=SCHEMA)
    other = change(batch, "history", time=again.history.time)
    other = change(other, "candidates", time=again.candidates.time)
    np.testing.assert_array_equal(states_of(other, "sasrec"), states_of(batch, "sasrec"))
    item = batch.history.item.copy()
    item[:, [0, 1]] = item[:, [1, 0]]
    swapped = states_of(change(batch, "history", item=item), "sasrec")
    assert np.abs(swapped - states_of(batch, "sasrec"))[0, 2:].max() > 1e-4


@both_models
def test_packed_users_equal_separate_ones(name):
    separate = rows_batch(((4,), (1,), (3,)))
    packed = pack(separate, Shape(10, 1, 3))
    np.testing.assert_allclose(users_of(packed, name)[0], users_of(separate, name)[:, 0], rtol=0, atol=1e-6)
    assert loss_of(separate, name=name)[1] == loss_of(packed, name=name)[1] == 8


@both_models
def test_later_events_do_not_reach_earlier_states(name):
    batch = rows_batch()
    item, time = batch.history.item.copy(), batch.history.time.copy()
    item[:, 6:], time[:, 7:] = item[:, 6:] % 29 + 1, time[:, 7:] + 9999
    before, after = states_of(batch, name), states_of(change(batch, "history", item=item, time=time), name)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.abs(after[0, 6:] - before[0, 6:]).max() > 1e-5


@both_models
def test_padding_is_irrelevant_and_dropout_is_not(name):
    batch = rows_batch()
    pad = batch.history.segment == 0
    item, time = np.where(pad, 10**6, batch.history.item), np.where(pad, 5, 1) * batch.history.time
    dirty = change(batch, "history", item=item.astype(np.int32), time=time.astype(np.int32))
    np.testing.assert_array_equal(users_of(dirty, name), users_of(batch, name))
    assert loss_of(dirty, name=name) == loss_of(batch, name=name)
    losses = [loss_of(batch, seed, name)[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_negatives_equal_to_the_target_are_left_out():
    batch = rows_batch()
    target = next_item(batch).target
    hits = jnp.broadcast_to(target[..., None], (*target.shape, 3))
    model = tiny()
    total, count = jit(lambda states: model.sampled_loss(states, target, hits))(states_of(batch))
    assert float(total) == pytest.approx(0.0, abs=1e-6)
    assert float(count) == 15


def test_without_next_time_a_user_does_not_depend_on_when_it_is_asked():
    """Its own time is what a row asks at: user vectors equal those of a model whose targets come at the same moment."""
    graph, state = nnx.split(tiny(next_time=False))
    users = jit(lambda s, batch: nnx.merge(graph, s).users(batch))
    batch = rows_batch(((4,), (1,)))
    later = change(batch, "candidates", time=batch.candidates.time + 10**6)
    np.testing.assert_array_equal(users(state, later), users(state, batch))
    # Where all events have one time, the time of the next event is the own one.
    still = change(change(batch, "history", time=0 * batch.history.time), "candidates", time=0 * batch.candidates.time)
    np.testing.assert_array_equal(users(state, still), users_of(still))
    assert np.abs(users(state, batch) - users_of(batch)).max() > 1e-7


def test_true_length_divides_by_the_users_own_events():
    """A row of the full width as published, one block: a model whose constant is a user's length, for each length."""
    batch = rows_batch(((10,), (4,), (1,)))
    found = np.asarray(tiny(true_length=True, depth=1).users(batch))
    for row, length in enumerate((10, 4, 1)):
        model = tiny(depth=1)
        (block,) = model.stack.blocks

        class Divided(type(block)):
            def merge(self, x, gate, attended, *, rngs=None, part=None, factor=block.longest / length):
                return super().merge(x, gate, attended * factor, rngs=rngs, part=part)

        block.__class__ = Divided
        np.testing.assert_allclose(found[row], np.asarray(model.users(batch))[row], rtol=0, atol=1e-6)
    packed = pack(rows_batch(((4,), (1,), (3,))), Shape(10, 1, 3))
    alone = tiny(true_length=True, depth=1).users(rows_batch(((4,), (1,), (3,))))
    np.testing.assert_allclose(tiny(true_length=True, depth=1).users(packed)[0], alone[:, 0], rtol=0, atol=1e-6)
    assert np.abs(found - np.asarray(tiny(depth=1).users(batch))).max() > 1e-4


def test_shared_negatives_are_those_of_the_batch_in_every_piece():
    model = tiny(shared_negatives=True)
    first, second = (model.draw(nnx.Rngs(own, batch=7), (3, 10)) for own in (0, 1))
    assert first.shape == (8,)
    np.testing.assert_array_equal(first, second)
    other = model.draw(nnx.Rngs(0, batch=8), (3, 10))
    assert (np.asarray(first) != np.asarray(other)).any()
    assert tiny().draw(nnx.Rngs(0), (3, 10)).shape == (3, 10, 8)


def test_the_loss_is_that_of_the_options_chosen():
    """The model hands its states, targets and draws to the loss of its options, which has its own oracle."""
    popularity = Popularity(np.arange(30))
    batch = rows_batch()
    target = next_item(batch).target
    for changes in (
        {},
        {"shared_negatives": True},
        {"sampling": "popularity"},
        {"sampling": "popularity", "logq": True},
    ):
        model = tiny(dropout=0.0, **changes)
        model.popularity = popularity
        states = model.states(batch, next_item(batch), None)
        negatives = model.draw(nnx.Rngs(5), target.shape)
        log_q = popularity.log_q() if "logq" in changes else np.zeros(30)
        ids = np.broadcast_to(negatives, (*target.shape, 8))
        chosen = np.concatenate([np.asarray(target)[..., None], ids], axis=-1)
        logits = (
            np.einsum("btd,btrd->btr", states, np.asarray(model.items(), np.float64)[chosen]) / 0.05 - log_q[chosen]
        )
        logits[..., 1:][ids == np.asarray(target)[..., None]] = -np.inf
        losses = np.log(np.exp(logits - logits[..., :1]).sum(-1))[np.asarray(target) > 0]
        total, count = model.loss(batch, nnx.Rngs(5))
        assert float(count) == len(losses) == 15
        assert float(total) == pytest.approx(losses.sum(), rel=1e-5)
    full = tiny(dropout=0.0, negatives=0)
    scores = np.einsum("btd,vd->btv", full.states(batch, next_item(batch), None), np.asarray(full.items())[1:]) / 0.05
    right = np.take_along_axis(scores, np.maximum(np.asarray(target) - 1, 0)[..., None], axis=-1)
    losses = np.log(np.exp(scores - right).sum(-1))[np.asarray(target) > 0]
    assert float(full.loss(batch, nnx.Rngs(5))[0]) == pytest.approx(losses.sum(), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"negatives": -1}, {"logq": True}, {"negatives": 0, "shared_negatives": True}, {"temperature": 0.0}]
)
def test_options_that_contradict_each_other_are_refused(changes):
    with pytest.raises(UserError, match=r"model\."):
        dataclasses.replace(TINY, **changes).check()


@both_models
def test_gradients_are_finite_everywhere_and_loss_falls(name):
    graph, state = nnx.split(tiny(name, dropout=0.0))
    batch = rows_batch(((10,), (8,), (9,)) * 4)
    pattern = (np.arange(10)[None] * 3 + np.arange(12)[:, None]) % 29 + 1  # the next item is three further
    batch = change(batch, "history", item=pattern.astype(np.int32))
    optimizer = optax.adam(1e-2)

    @jit
    def step(state, opt):
        def mean(s):
            total, count = nnx.merge(graph, s).loss(batch, nnx.Rngs(0))
            return total / count

        loss, grads = jax.value_and_grad(mean)(state)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(state, updates), opt, loss, grads

    opt, losses = optimizer.init(state), []
    for _ in range(21):
        state, opt, loss, grads = step(state, opt)
        losses.append(float(loss))
        for path, grad in nnx.to_flat_state(grads):
            assert np.isfinite(grad[...]).all(), path
            assert np.abs(grad[...]).max() > 0, path
    assert losses[-1] < 0.5 * losses[0]


def test_tables_and_biases_start_as_published():
    """Of the two position tables one is Xavier normal, one a normal cut at two deviations; HSTU's b_o is uniform."""
    hstu, sasrec = tiny("hstu_retrieval"), tiny("sasrec")
    places, width = hstu.positions.shape
    xavier = (2 / (places + width)) ** 0.5
    assert float(jnp.std(hstu.positions[...])) == pytest.approx(xavier, rel=0.15)
    assert float(jnp.abs(hstu.positions[...]).max()) > 2.3 * xavier
    assert 1.8 < float(jnp.abs(sasrec.positions[...]).max()) * width**0.5 <= 2
    assert float(jnp.std(sasrec.positions[...])) == pytest.approx(0.88 * width**-0.5, rel=0.15)
    for block in hstu.stack.blocks:
        bias = jnp.abs(block.out.bias[...]) * width**0.5  # W_o reads as many values as the model is wide
        assert 0.6 < float(bias.max()) <= 1
