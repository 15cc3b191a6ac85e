"""CGC against a loop over experts in float64, for every published head it covers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.errors import UserError
from genrec_jax.nn.experts import CGC

HEADS = {
    "shared-bottom": {"shared": 1, "specific": 0},
    "mmoe": {"shared": 3, "specific": 0},
    "dirl": {"shared": 3, "specific": 1},
    "ple": {"shared": 2, "specific": 2, "levels": 3},
    "separate": {"shared": 0, "specific": 1},
}


def head(name, *, inputs=6, tasks=3, widths=(7, 5), tower=(4,), dtype=None):
    """A head with random parameters, biases too: at their initial zero a forgotten one would not show."""

    def build():
        return CGC(inputs, tasks, widths=widths, tower=tower, dtype=dtype, rngs=nnx.Rngs(0), **HEADS[name])

    rng = np.random.default_rng(5)
    graph, shapes = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes))


def jitted(module):
    graph, params = nnx.split(module)
    return functools.partial(jax.jit(lambda p, z: nnx.merge(graph, p)(z)), params)


def slice_of(param, n):
    return np.asarray(param[...], np.float64)[n]


def relu_layers(layers, n, x):
    for layer in layers:
        x = np.maximum(x @ slice_of(layer.kernel, n) + slice_of(layer.bias, n), 0)
    return x


def gated(gate, n, x, values):
    scores = x @ slice_of(gate.kernel, n) + slice_of(gate.bias, n)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    assert len(weights) == len(values)
    return sum(w * v for w, v in zip(weights, values))


def oracle(module, z, shared, specific, tasks):
    """One vector at a time, one expert at a time."""
    x = [z] * (tasks + 1)
    for level in module.levels:
        own = [[relu_layers(level.experts, t * specific + i, x[t]) for i in range(specific)] for t in range(tasks)]
        common = [relu_layers(level.experts, tasks * specific + i, x[tasks]) for i in range(shared)]
        out = []
        for t in range(tasks):
            seen = own[t] + common
            out.append(seen[0] if len(seen) == 1 else gated(level.gates, t, x[t], seen))
        if level.shared_gate is not None:
            out.append(gated(level.shared_gate, 0, x[tasks], [e for group in own for e in group] + common))
        x = out
    logits = []
    for t in range(tasks):
        *hidden, last = module.towers
        m = relu_layers(hidden, t, x[t])
        logits.append((m @ slice_of(last.kernel, t) + slice_of(last.bias, t))[0])
    return logits


@pytest.mark.parametrize("name", HEADS)
def test_matches_a_loop_over_experts(name):
    module = head(name)
    z = np.random.default_rng(1).normal(size=(2, 4, 6))
    logits = jitted(module)(jnp.asarray(z, jnp.float32))
    assert logits.shape == (2, 4, 3)
    assert logits.dtype == jnp.float32
    sizes = {k: HEADS[name][k] for k in ("shared", "specific")}
    expected = [[oracle(module, v, tasks=3, **sizes) for v in row] for row in z]
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_changes_the_output(name):
    module = head(name)
    z = jax.random.normal(jax.random.key(0), (32, 6))
    graph, params = nnx.split(module)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(z)))))(params)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.abs(np.asarray(leaf[...])).max() > 0, path


def test_shared_bottom_has_no_gate_and_ple_no_last_shared_gate():
    assert head("shared-bottom").levels[0].gates is None
    levels = head("ple").levels
    assert [level.shared_gate is None for level in levels] == [False, False, True]


@pytest.mark.parametrize("name", HEADS)
def test_cost_counts_every_parameter(name):
    module = head(name)
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
    assert module.cost(10).dense_params == held
    assert module.cost(20).flops == 2 * module.cost(10).flops


def test_flops_by_hand():
    # DirL: 2 tasks, experts 3 + 2 of 8 -> 16, gates 8 -> 4, mixes of 4 experts, towers 16 -> 1.
    module = CGC(8, 2, shared=3, specific=1, widths=(16,), rngs=nnx.Rngs(0))
    assert module.cost(1).flops == 2 * (5 * 8 * 16 + 2 * 8 * 4 + 2 * 4 * 16 + 2 * 16)


@pytest.mark.parametrize("name", HEADS)
def test_flops_match_the_compiler(name):
    module = head(name, inputs=64, widths=(128, 64), tower=(32,))
    graph, params = nnx.split(module)
    z = jnp.zeros((64, 64))
    counted = jax.jit(lambda p, z: nnx.merge(graph, p)(z)).lower(params, z).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(module.cost(64).flops, rel=0.05)


def test_bfloat16_is_close_and_returns_float32():
    z = jax.random.normal(jax.random.key(0), (16, 6))
    low = jitted(head("ple", dtype=jnp.bfloat16))(z)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, jitted(head("ple"))(z), atol=0.1)


@pytest.mark.parametrize(
    "sizes",
    [
        {"shared": 0, "specific": 0},
        {"shared": -1, "specific": 2},
        {"shared": 2, "specific": 0, "levels": 2},
        {"shared": 1, "specific": 1, "levels": 0},
        {"shared": 1, "specific": 1, "widths": ()},
    ],
)
def test_impossible_heads_are_refused(sizes):
    with pytest.raises(UserError):
        CGC(4, 2, **{"widths": (4,), **sizes}, rngs=nnx.Rngs(0))
