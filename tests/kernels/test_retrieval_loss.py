"""Softmax losses against loops in float64; how negatives are drawn; what logQ corrects; the full softmax's memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax import retrieval_loss
from genrec_jax.retrieval_loss import (
    Popularity,
    draw_negatives,
    full_softmax,
    l2_normalise,
    log_partition,
    sampled_softmax,
)
from kernels_pallas.target import compiling_for

B, T, D, V, R = 3, 7, 4, 11, 5
TEMPERATURE = 0.3


@pytest.fixture(params=["chunks", "one chunk"])
def chunks(request, monkeypatch):
    """Several chunks of four positions and a short last one; and a single chunk."""
    size = 1000 if request.param == "one chunk" else 4
    monkeypatch.setattr(retrieval_loss, "_CHUNK", size)
    monkeypatch.setattr(retrieval_loss, "_GATHERED_ROWS", size * (1 + R))


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    outputs, items = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(1, V, (B, T))
    negatives = rng.integers(1, V, (B, T, R))
    assert (negatives == targets[..., None]).any()  # collisions occur
    weights = (np.arange(T) < np.array([T, 3, 0])[:, None]).astype(float)
    return outputs, items, targets, weights, negatives


def oracle(outputs, items, targets, weights, negatives, log_q=None):
    """The mean loss by loops, in float64. ``negatives`` [R]: the same for all positions; None: all items but 0."""
    log_q, total = np.zeros(V) if log_q is None else log_q, 0.0
    for b in range(B):
        for t in range(T):
            target = targets[b, t]
            drawn = range(1, V) if negatives is None else negatives if np.ndim(negatives) == 1 else negatives[b, t]
            chosen = [target, *(n for n in drawn if n != target)]
            raised = [math.exp(outputs[b, t] @ items[n] / TEMPERATURE - log_q[n]) for n in chosen]
            total -= weights[b, t] * math.log(raised[0] / sum(raised))
    return total / weights.sum()


def check(loss, expected, outputs, items, weights):
    """Value and gradients of ``loss(outputs, items)`` in float64 against the oracle and its differences."""
    arguments = (jnp.asarray(outputs), jnp.asarray(items))
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    assert abs(float(value) - expected(outputs, items)) < 1e-12
    assert abs(float(loss(*arguments)) - float(value)) < 1e-12
    assert not np.asarray(gradients[0])[weights == 0].any()
    rng = np.random.default_rng(1)
    for place, gradient in enumerate(gradients):
        direction, ends = rng.normal(size=gradient.shape), []
        for sign in (1, -1):
            moved = [outputs, items]
            moved[place] = moved[place] + sign * 1e-6 * direction
            ends.append(expected(*moved))
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope) > 1e-3
        assert abs(float((gradient * direction).sum()) - slope) < 1e-7


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_value_and_gradients(shared, corrected):
    with jax.enable_x64(True):
        outputs, items, targets, weights, negatives = make_case()
        negatives = negatives[0, 0] if shared else negatives
        assert (negatives == targets[..., None]).any()
        log_q = np.random.default_rng(2).normal(size=V) if corrected else None

        def loss(u, v):
            given = None if log_q is None else jnp.asarray(log_q)
            return sampled_softmax(
                u, v, targets, jnp.asarray(weights), jnp.asarray(negatives), temperature=TEMPERATURE, log_q=given
            )

        def expected(u, v):
            return oracle(u, v, targets, weights, negatives, log_q)

        check(loss, expected, outputs, items, weights)


@pytest.mark.parametrize("block", [3, 5, 11, 100])
def test_full_softmax_value_and_gradients(monkeypatch, block):
    """Blocks of items and chunks of positions that divide their number, and that do not."""
    monkeypatch.setattr(retrieval_loss, "_BLOCK", block)
    monkeypatch.setattr(retrieval_loss, "_CHUNK", 4)
    with jax.enable_x64(True):
        outputs, items, targets, weights, _ = make_case()

        def loss(u, v):
            return full_softmax(u, v, targets, jnp.asarray(weights), temperature=TEMPERATURE)

        def expected(u, v):
            return oracle(u, v, targets, weights, None)

        check(loss, expected, outputs, items, weights)
        d_items = jax.grad(loss, 1)(jnp.asarray(outputs), jnp.asarray(items))
        assert not np.asarray(d_items)[0].any()  # padding takes no part


def test_full_softmax_stays_finite_for_large_logits():
    scaled, items = jnp.full((2, 1), 300.0), jnp.array([[9.0], [1.0], [-1.0]])
    value, grads = jax.value_and_grad(lambda u, v: log_partition(u, v).sum(), (0, 1))(scaled, items)
    assert float(value) == pytest.approx(600.0)
    assert all(np.isfinite(g).all() for g in grads)


def test_full_softmax_never_holds_all_logits():
    """By XLA's own account of its buffers: 4,096 positions, 65,536 items, 1 GiB of logits."""
    positions, count, width = 4096, 65536, 16

    def loss(u, v, targets):
        return full_softmax(u[None], v, targets, jnp.ones((1, positions)), temperature=0.05)

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((positions, width), (count, width))]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, jax.ShapeDtypeStruct((1, positions), "int32")).compile()
    table = 4 * count * width
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * table < 4 * positions * count / 30


def test_logq_makes_popular_negatives_consistent():
    """Three items with next-item probabilities P, one negative drawn from Q: over all draws, the gradient of the
    expected loss vanishes at logits log P with the correction, at log P - log Q without."""
    with jax.enable_x64(True):
        p, q = np.array([0, 0.2, 0.3, 0.5]), np.array([1, 0.6, 0.3, 0.1])

        def expected_loss(logits, log_q):
            total, given = 0.0, None if log_q is None else jnp.asarray(log_q)
            for target in (1, 2, 3):
                for drawn in (1, 2, 3):
                    case = (jnp.ones((1, 1, 1)), logits[:, None], jnp.array([[target]]), jnp.ones((1, 1)))
                    loss = sampled_softmax(*case, jnp.array([drawn]), temperature=1.0, log_q=given)
                    total += p[target] * q[drawn] * loss
            return total

        logits = jnp.log(jnp.asarray(np.maximum(p, 1e-9)))
        slope = jax.jit(jax.grad(expected_loss))
        assert np.abs(slope(logits, np.log(q))).max() < 1e-12
        assert np.abs(slope(logits, None)).max() > 0.02
        assert np.abs(slope(logits - np.log(q), None)).max() < 1e-12


def test_popular_negatives_follow_the_counts():
    popularity = Popularity(np.array([1000, 8, 0, 1, 7, 0]))
    drawn = np.asarray(popularity.draw(jax.random.key(0), (4, 500, 16)))
    counts = np.bincount(drawn.ravel(), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    expected = drawn.size * np.array([8, 1, 7]) / 16
    assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 13.8  # chi-square of 2 degrees, p = 0.001
    assert (drawn[:, 1:] != drawn[:, :-1]).mean() > 0.5
    np.testing.assert_allclose(popularity.log_q()[1:], np.log(np.array([8, 0.5, 1, 7, 0.5]) / 16), rtol=1e-6)


@pytest.mark.usefixtures("chunks")
def test_no_supervised_position_is_zero():
    outputs, items, targets, weights, negatives = make_case()
    items, weights = jnp.asarray(items, jnp.float32), jnp.asarray(0 * weights)

    def loss(u):
        return sampled_softmax(u, items, targets, weights, negatives, temperature=TEMPERATURE)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(outputs, jnp.float32))
    assert value == 0
    assert not gradient.any()


def test_negatives_are_uniform_and_differ_by_position():
    drawn = np.asarray(draw_negatives(jax.random.key(0), (4, 500, 40), 10))
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    expected = drawn.size / 10
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 27.9  # chi-square of 9 degrees, p = 0.001
    assert drawn.shape == (4, 500, 40)
    assert (drawn[:, 1:] != drawn[:, :-1]).mean() > 0.85


def test_what_an_accelerator_gathers_at_a_time_is_so_many_numbers(monkeypatch):
    """Whatever the width: of 64 positions with 8 ids, in chunks of 8 and of 2."""
    monkeypatch.setattr(retrieval_loss, "_GATHERED_NUMBERS", 2**12)
    for width, positions in ((64, 8), (256, 2)):
        shapes = [jnp.zeros(shape) for shape in ((2, 32, width), (9, width))]
        ids = jnp.zeros((2, 32), jnp.int32), jnp.ones((2, 32)), jnp.zeros((2, 32, 7), jnp.int32)
        with compiling_for("gpu"):
            traced = str(jax.make_jaxpr(lambda *x: sampled_softmax(*x, temperature=1.0))(*shapes, *ids))
        gathered = {int(found) for found in re.findall(rf"f32\[(\d+),8,{width}\]", traced)}
        assert gathered == {positions}


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
    with pytest.raises(ValueError, match="weights"):
        full_softmax(outputs, items, targets, weights[:-1], temperature=1.0)
