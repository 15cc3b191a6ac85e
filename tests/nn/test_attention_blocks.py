"""The sequence blocks against their equations, written token by token in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.nn.hstu import RANKING, RESEARCH, HSTUBlock, Variant
from genrec_jax.nn.sasrec import SASRecBlock
from genrec_jax.nn.transformer_block import TransformerBlock
from kernels_pallas.hstu_attention import TIME_BUCKETS, Tokens, plan, time_bucket, visible

LONGEST, WIDTH, HEADS = 9, 8, 2
FLOAT = jnp.dtype("float32")


def row():
    """Two packed segments and padding; in the first, the last two tokens are candidates."""
    segment = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
    order = np.array([[0, 1, 2, 3, 3, 0, 1, 0]], np.int32)
    time = np.array([[5, 9, 4000, 90_000, 90_000, 3, 77, 0]], np.int32)
    return Tokens(segment, order, time + 50, time)


def moved(block):
    """The block with every parameter moved off its initial value, and its parameters as numpy arrays by path."""
    draw = np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(block))
    flat = [(path, p.replace(p[...] + jnp.asarray(0.3 * draw.normal(size=p.shape), jnp.float32))) for path, p in flat]
    nnx.update(block, nnx.from_flat_state(flat))
    return {path: np.asarray(p[...], np.float64) for path, p in flat}


def normalised(x, scale=1.0, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))


def rab(p, tokens):
    """[T, T]: w_pos[order_k - order_q + n - 1] + w_time[bucket]."""
    order = tokens.order[0]
    bucket = np.asarray(time_bucket(tokens.query_time[0][:, None], tokens.key_time[0][None]))
    return p["bias", "position"][order[None] - order[:, None] + LONGEST - 1] + p["bias", "time"][bucket]


def heads(x):
    return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(1, 8, WIDTH)).astype(np.float32)


def run(block, x, *, biased=True):
    pairs = plan(row(), positions=LONGEST, buckets=TIME_BUCKETS) if biased else plan(row())
    return np.asarray(jax.jit(lambda x: block(x, pairs))(x))[0, :7]


VARIANTS = {
    "research": RESEARCH,
    "affine": Variant(affine=True),
    "project_bias": Variant(project_bias=True),
    "gate_only": Variant(gate_only=True),
    "no relative bias": Variant(relative_bias=False),
    "concat": Variant(concat=True),
    "group_norm": Variant(group_norm=True),
    "ranking": RANKING,
    "ranking, group norm": dataclasses.replace(RANKING, group_norm=True),
}


def hstu_block(variant, **changes):
    options = {"qk_width": 3, "v_width": 5, "longest": LONGEST, "dropout": 0.5, "dtype": FLOAT, "rngs": nnx.Rngs(0)}
    options |= {"project_init": jax.nn.initializers.normal(0.1), "variant": variant}
    return HSTUBlock(WIDTH, HEADS, **options | changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_hstu_block_is_its_equations(name, x):
    variant = VARIANTS[name]
    changes = {"alpha": 0.6, "out_bias": None} if name.startswith("ranking") else {}
    block = hstu_block(variant, **changes)
    p = moved(block)
    mixed = normalised(x[0], p.get(("norm", "scale"), 1.0), p.get(("norm", "bias"), 0.0)) @ p["project", "kernel"]
    mixed = mixed + p.get(("project", "bias"), 0.0)
    u, v, q, k = np.split(mixed if variant.gate_only else silu(mixed), [10, 20, 26], axis=-1)
    u = silu(u) if variant.gate_only else u
    scores = changes.get("alpha", 1.0) * heads(q) @ heads(k).transpose(0, 2, 1)
    scores = scores + (rab(p, row()) if variant.relative_bias else 0)
    weights = np.where(np.asarray(visible(row()))[0], silu(scores), 0) / LONGEST
    attended = weights @ heads(v)  # [H, T, Dv]
    flat = attended.transpose(1, 0, 2).reshape(8, 10)
    scale, bias = p.get(("out_norm", "scale"), np.ones(1)), p.get(("out_norm", "bias"), np.zeros(1))
    if variant.group_norm:
        each = normalised(attended) * scale[:, None, None] + bias[:, None, None]
        normal = each.transpose(1, 0, 2).reshape(8, 10)
    else:
        normal = normalised(flat, scale, bias)
    joined = np.concatenate([u, flat, u * normal], axis=-1) if variant.concat else u * normal
    expected = x[0] + joined @ p["out", "kernel"] + p.get(("out", "bias"), 0.0)
    np.testing.assert_allclose(run(block, x, biased=variant.relative_bias), expected[:7], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_hstu_variants_are_counted(name):
    """Parameters exactly; a concatenated output takes two more products of the values' width per token."""
    block = hstu_block(VARIANTS[name])
    sizes = {path: p.size for path, p in nnx.to_flat_state(nnx.state(block, nnx.Param))}
    cost = block.cost(8, 20.0)
    assert cost.dense_params == sum(sizes.values())
    joined = 10 * (3 if VARIANTS[name].concat else 1)
    assert cost.flops == 2 * 8 * WIDTH * 32 + 2 * 20 * (6 + 10) + 2 * 8 * joined * WIDTH
    activated = 10 if VARIANTS[name].gate_only else 32
    assert cost.activation_bytes == 8 * 4 * (WIDTH + WIDTH + 32 + activated + 10 + joined)
    extra = {("norm", "scale"), ("norm", "bias"), ("out_norm", "scale"), ("out_norm", "bias"), ("project", "bias")}
    has = {path for path in sizes if path in extra}
    affine = {path for path in extra if path[0] != "project"} if VARIANTS[name].affine else set()
    assert has == affine | ({("project", "bias")} if VARIANTS[name].project_bias else set())


def test_dropout_of_a_concatenated_output(x):
    """Falls on all three parts, and on nothing else: with an output map that copies the parts it can be read off."""
    block = hstu_block(RANKING, v_width=4, out_bias=None)  # U, A V and the gated norm are as wide as the model
    gate, attended = (jnp.abs(jnp.asarray(np.random.default_rng(i).normal(size=(64, WIDTH)))) + 1 for i in (2, 3))
    attended, residual = attended.reshape(64, HEADS, 4), jnp.zeros((64, WIDTH))
    for part in range(3):
        block.out.kernel[...] = jnp.eye(3 * WIDTH)[:, part * WIDTH : (part + 1) * WIDTH]
        plain, left = (np.asarray(block.merge(residual, gate, attended, rngs=r)) for r in (None, nnx.Rngs(0)))
        np.testing.assert_allclose(left, np.where(left == 0, 0, 2 * plain), rtol=1e-5)
        assert abs((left == 0).mean() - 0.5) < 5 * 0.5 / left.size**0.5
        moved_on = np.asarray(block.merge(residual + 3, gate, attended, rngs=nnx.Rngs(0)))
        np.testing.assert_allclose(moved_on, left + 3, rtol=1e-5)


def test_transformer_block_is_its_equations(x):
    block = TransformerBlock(WIDTH, HEADS, scale=0.3, longest=LONGEST, dropout=0.5, dtype=FLOAT, rngs=nnx.Rngs(0))
    p = moved(block)
    mixed = normalised(x[0], p["norm", "scale"], p["norm", "bias"]) @ p["project", "kernel"] + p["project", "bias"]
    q, k, v = np.split(mixed, 3, axis=-1)
    scores = 0.3 * heads(q) @ heads(k).transpose(0, 2, 1) + rab(p, row())
    weights = np.where(np.asarray(visible(row()))[0], np.exp(scores), 0)[:, :7]
    weights /= weights.sum(-1, keepdims=True)
    attended = (weights @ heads(v)).transpose(1, 0, 2).reshape(7, WIDTH)
    y = x[0, :7] + attended @ p["out", "kernel"] + p["out", "bias"]
    inner = normalised(y, p["norm_ffn", "scale"], p["norm_ffn", "bias"]) @ p["ffn", "layers", 0, "kernel"]
    inner = np.asarray(jax.nn.gelu(jnp.asarray(inner + p["ffn", "layers", 0, "bias"])))
    expected = y + inner @ p["ffn", "layers", 1, "kernel"] + p["ffn", "layers", 1, "bias"]
    np.testing.assert_allclose(run(block, x), expected, rtol=0, atol=2e-5)


def test_sasrec_block_is_its_equations(x):
    block = SASRecBlock(WIDTH, HEADS, dropout=0.5, dtype=FLOAT, rngs=nnx.Rngs(0))
    p = moved(block)
    normal, real = normalised(x[0]), np.asarray(visible(row()))[0]
    kernels, biases = np.split(p["project", "kernel"], 3, axis=1), np.split(p["project", "bias"], 3)
    q, k, v = (y @ kernel + bias for y, kernel, bias in zip((normal, x[0], x[0]), kernels, biases))
    weights = np.where(real, np.exp(heads(q) @ heads(k).transpose(0, 2, 1) / 2.0), 0)[:, :7]
    weights /= weights.sum(-1, keepdims=True)
    attended = (weights @ heads(v)).transpose(1, 0, 2).reshape(7, WIDTH)
    z = normalised(normal[:7] + attended @ p["out", "kernel"] + p["out", "bias"])
    inner = np.maximum(z @ p["inner", "kernel"] + p["inner", "bias"], 0)
    expected = z + inner @ p["outer", "kernel"] + p["outer", "bias"]
    np.testing.assert_allclose(run(block, x, biased=False), expected, rtol=0, atol=2e-5)


def test_sasrec_block_starts_as_published():
    """Xavier normal over the joint Q, K, V matrix, zero biases in attention, U(±1 / sqrt(D)) in the feed-forward."""
    width = 256
    p = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(
        SASRecBlock(width, 1, dropout=0.0, dtype=FLOAT, rngs=nnx.Rngs(0))))}  # fmt: skip
    deviations = {"project": (2 / (4 * width)) ** 0.5, "out": width**-0.5, "inner": width**-0.5, "outer": width**-0.5}
    for name, deviation in deviations.items():
        assert p[name, "kernel"].std() == pytest.approx(deviation, rel=0.02)
        assert np.abs(p[name, "kernel"]).max() > 3.5 * deviation  # not cut
    assert not p["project", "bias"].any()
    assert not p["out", "bias"].any()
    for name in ("inner", "outer"):
        bias = np.abs(p[name, "bias"]) * width**0.5
        assert 0.9 < bias.max() <= 1
        assert bias.mean() == pytest.approx(0.5, abs=0.1)
