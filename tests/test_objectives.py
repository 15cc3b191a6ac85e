"""The multi-task cross-entropy against hand-computed values, and at extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax.objectives import bce


def test_hand_computed():
    logits = jnp.array([[[0.0, np.log(3.0)], [5.0, -7.0]]])
    labels = jnp.array([[[1, 1], [0, 1]]], jnp.uint8)
    loss, count = bce(logits, labels, jnp.array([[True, False]]))
    assert float(loss) == pytest.approx((np.log(2) - np.log(0.75)) / 2, rel=1e-6)
    assert float(count) == 1


def test_sum_and_count_over_all_targets():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 2)), rng.integers(0, 2, (3, 4, 2)).astype(np.uint8)
    mask = rng.random((3, 4)) < 0.6
    p = 1 / (1 + np.exp(-logits))
    expected = -np.where(labels == 1, np.log(p), np.log(1 - p)).mean(-1)[mask].sum()
    loss, count = bce(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(mask))
    assert loss.dtype == count.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(count) == mask.sum()


def test_extreme_logits_and_masked_rows_stay_finite():
    logits, labels = jnp.array([[1e4], [-1e4], [np.nan]]), jnp.array([[0], [1], [1]], jnp.uint8)
    mask = jnp.array([True, True, False])
    loss, gradient = jax.value_and_grad(lambda x: bce(x, labels, mask)[0])(logits)
    assert float(loss) == pytest.approx(2e4)
    np.testing.assert_allclose(gradient[:2, 0], [1, -1])


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((4096, 1), jnp.bfloat16)
    loss, _ = bce(logits, jnp.ones((4096, 1), jnp.uint8), jnp.ones(4096, bool))
    assert float(loss) == pytest.approx(4096 * np.log(2), rel=1e-5)
