"""Interactions against numpy loops over the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.nn.interaction import Cross, dot_interaction, dot_interaction_cost


def test_pairwise_dots():
    v = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    expected = [[[np.dot(r[i], r[j]) for i in range(5) for j in range(i)] for r in row] for row in v]
    np.testing.assert_allclose(dot_interaction(jnp.asarray(v, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_pairwise_dots_cost_by_hand():
    assert dot_interaction_cost(3, 5, 4).flops == 3 * 10 * 2 * 4


@pytest.mark.parametrize("rank", [0, 3])
def test_cross_equation(rank):
    cross = Cross(6, 3, rank=rank, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for up in cross.up:
        up.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    x0 = rng.normal(size=(2, 4, 6))
    x = x0
    for layer in range(3):
        u, b = np.float64(cross.up[layer].kernel[...]), np.float64(cross.up[layer].bias[...])
        inner = x @ np.float64(cross.down[layer].kernel[...]) if rank else x
        x = x0 * (inner @ u + b) + x
    np.testing.assert_allclose(cross(jnp.asarray(x0, jnp.float32)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "flops", "params"), [(0, 2 * 2 * 36, 2 * 42), (2, 2 * 4 * 6 * 2, 2 * (24 + 6))])
def test_cross_cost_by_hand(rank, flops, params):
    cross = Cross(6, 2, rank=rank, rngs=nnx.Rngs(0))
    assert cross.cost(7).flops == 7 * flops
    assert cross.cost(7).dense_params == params == sum(x.size for x in jax.tree.leaves(nnx.state(cross)))
