"""The sampled softmax: its ways of computing one loss agree with loops, and the negatives are uniform."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax import retrieval_loss
from genrec_jax.retrieval_loss import draw_negatives, l2_normalise, sampled_softmax

B, T, D, V, R = 3, 7, 4, 11, 5
TEMPERATURE = 0.3


@pytest.fixture(params=["dense", "gathered", "one chunk"])
def way(request, monkeypatch):
    """The two ways of computing the loss, with several chunks and a short last one; and a single chunk."""
    monkeypatch.setattr(retrieval_loss, "_CHUNK", 1000 if request.param == "one chunk" else 4)
    monkeypatch.setattr(retrieval_loss, "_DENSE_ITEMS_PER_NEGATIVE", 0 if request.param == "gathered" else 64)


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    outputs, items = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(1, V, (B, T))
    negatives = rng.integers(1, V, (B, T, R))
    assert (negatives == targets[..., None]).any()  # collisions occur
    weights = (np.arange(T) < np.array([T, 3, 0])[:, None]).astype(float)
    return outputs, items, targets, weights, negatives


def oracle(outputs, items, targets, weights, negatives):
    """The mean loss by loops, in float64."""
    total = 0.0
    for b in range(B):
        for t in range(T):
            logits = [outputs[b, t] @ items[targets[b, t]]]
            logits += [outputs[b, t] @ items[n] for n in negatives[b, t] if n != targets[b, t]]
            raised = [math.exp(x / TEMPERATURE) for x in logits]
            total -= weights[b, t] * math.log(raised[0] / sum(raised))
    return total / weights.sum()


@pytest.mark.usefixtures("way")
def test_value_and_gradients():
    with jax.enable_x64(True):
        outputs, items, targets, weights, negatives = make_case()

        def loss(u, v):
            return sampled_softmax(u, v, targets, jnp.asarray(weights), negatives, temperature=TEMPERATURE)

        arguments = (jnp.asarray(outputs), jnp.asarray(items))
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
        assert abs(float(value) - oracle(outputs, items, targets, weights, negatives)) < 1e-12
        assert abs(float(loss(*arguments)) - float(value)) < 1e-12
        assert not np.asarray(gradients[0])[weights == 0].any()
        rng = np.random.default_rng(1)
        for place, gradient in enumerate(gradients):
            direction, ends = rng.normal(size=gradient.shape), []
            for sign in (1, -1):
                moved = [outputs, items]
                moved[place] = moved[place] + sign * 1e-6 * direction
                ends.append(oracle(*moved, targets, weights, negatives))
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(slope) > 1e-3
            assert abs(float((gradient * direction).sum()) - slope) < 1e-7


@pytest.mark.usefixtures("way")
def test_no_supervised_position_is_zero():
    outputs, items, targets, weights, negatives = make_case()
    items, weights = jnp.asarray(items, jnp.float32), jnp.asarray(0 * weights)

    def loss(u):
        return sampled_softmax(u, items, targets, weights, negatives, temperature=TEMPERATURE)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(outputs, jnp.float32))
    assert value == 0
    assert not gradient.any()


def test_negatives_are_uniform_and_differ_by_position():
    targets = jnp.zeros((4, 500), jnp.int32)
    drawn = np.asarray(draw_negatives(jax.random.key(0), targets, 40, 10))
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    expected = drawn.size / 10
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 27.9  # chi-square of 9 degrees, p = 0.001
    assert drawn.shape == (4, 500, 40)
    assert (drawn[:, 1:] != drawn[:, :-1]).mean() > 0.85


def test_normalise_is_safe_at_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(l2_normalise(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: l2_normalise(x).sum())(x)).all()


def test_wrong_shapes_are_refused():
    outputs, items, targets, weights, negatives = (jnp.asarray(x) for x in make_case())
    with pytest.raises(ValueError, match="negatives must be"):
        sampled_softmax(outputs, items, targets, weights, negatives[:, :-1], temperature=1.0)
    with pytest.raises(ValueError, match="weights"):
        sampled_softmax(outputs, items, targets, weights[:-1], negatives, temperature=1.0)
