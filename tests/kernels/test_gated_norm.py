"""The gated norm against float64 by hand, its derivative against finite differences, and what it keeps in between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.gated_norm import BACKENDS, Part, gated_norm, keep_mask

KEY = jax.random.key(7)
SHAPES = [(1, 1, 8), (3, 5, 6), (2, 37, 50), (70, 129)]
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def interpreted():
    """TPU kernels run interpreted, with memory that nobody wrote as NaN and reads out of bounds as errors."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def draw(shape, dtype=np.float32, seed=0):
    """attended (small beside its mean, as attention's outputs can be), gate and cotangent."""
    rng = np.random.default_rng(seed)
    a = 1e-2 * rng.normal(size=shape) + 0.3
    return [jnp.asarray(x, dtype) for x in (a, rng.normal(size=shape), rng.normal(size=shape))]


def by_hand(a, u, rate=0.0, eps=1e-6):
    """The definition in float64 numpy."""
    a, u = (np.asarray(x, np.float64) for x in (a, u))
    normal = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + eps)
    keep = np.asarray(keep_mask(KEY, a.shape, rate)) if rate else True
    return np.where(keep, u * normal / (1 - rate), 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(backend, rate, a, u, d_y):
    """Output, and the cotangents of a and u."""
    key = KEY if rate else None
    out, pull = jax.vjp(lambda a, u: gated_norm(a, u, rate=rate, key=key, implementation=backend), a, u)
    return out, *pull(d_y)


def largest(got, want):
    return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()


@BACKEND
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_definition(shape, rate, backend):
    a, u, d_y = draw(shape)
    want = by_hand(a, u, rate)
    assert largest(both(backend, rate, a, u, d_y)[0], want) <= 5e-5 * np.abs(want).max()


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_gradients_match_finite_differences(backend, rate):
    with jax.enable_x64(True):
        a, u, d_y = draw((3, 7), np.float64)
        _, *gradients = both(backend, rate, a, u, d_y)
        for place, gradient in enumerate(gradients):
            assert gradient.dtype == np.float64
            direction = np.random.default_rng(place).normal(size=a.shape)
            ends = []
            for sign in (1, -1):
                moved = [np.asarray(a), np.asarray(u)]
                moved[place] = moved[place] + sign * 1e-6 * direction
                ends.append((by_hand(*moved, rate) * np.asarray(d_y)).sum())
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(slope) > 1e-2
            assert abs(float((gradient * direction).sum()) - slope) < 1e-5 * abs(slope)


@pytest.mark.parametrize("backend", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_definitions(shape, rate, backend):
    """Against autodiff of the definition in float64."""
    arrays = draw(shape)
    got = both(backend, rate, *arrays)
    with jax.enable_x64(True):
        want = both("reference", rate, *(jnp.asarray(np.asarray(x), jnp.float64) for x in arrays))
    for g, w in zip(got, want):
        assert largest(g, w) <= 5e-5 * max(np.abs(w).max(), 1e-3)


@pytest.mark.parametrize("backend", ["xla", "mosaic_tpu"])
def test_bfloat16_keeps_the_error_rule(backend):
    """At most twice (outputs) and five times (gradients) the error of the same written in bfloat16."""

    def plain(a, u):
        centred = a - a.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + jnp.bfloat16(1e-6)) * u

    a, u, d_y = (x.astype(jnp.bfloat16) for x in draw((2, 33, 40)))
    out, pull = jax.vjp(plain, a, u)
    with jax.enable_x64(True):
        want = both("reference", 0.0, *(jnp.asarray(np.asarray(x, np.float64)) for x in (a, u, d_y)))
    got = both(backend, 0.0, a, u, d_y)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for g, p, w, times in zip(got, (out, *pull(d_y)), want, (2, 5, 5)):
        assert largest(g, w) <= times * largest(p, w)


@BACKEND
def test_a_row_depends_on_itself_alone(backend):
    """NaN in one row stays there; rows that end a block see none of what lies past the array."""
    a, u, d_y = draw((70, 129))
    clean = both(backend, 0.0, a, u, d_y)
    dirty = both(backend, 0.0, a.at[69].set(jnp.nan), u, d_y)
    for c, d in zip(clean, dirty):
        assert np.isfinite(c).all()
        np.testing.assert_array_equal(c[:69], d[:69])
        assert np.isnan(d[69]).any()


def test_several_blocks_of_rows(monkeypatch):
    from kernels_pallas.gated_norm import mosaic_tpu

    monkeypatch.setattr(mosaic_tpu, "_BLOCK_ELEMENTS", 32 * 24)
    arrays = draw((3, 41, 24))
    for g, w in zip(both("mosaic_tpu", 0.5, *arrays), both("xla", 0.5, *arrays)):
        assert largest(g, w) <= 1e-5 * np.abs(w).max()


def test_all_share_one_mask():
    """The same key drops the same entries everywhere, in the expected number."""
    a, u, d_y = draw((64, 50))
    dropped = [np.asarray(both(backend, 0.25, a, u, d_y)[0]) == 0 for backend in BACKENDS]
    for other in dropped[1:]:
        np.testing.assert_array_equal(other, dropped[0])
    assert abs(dropped[0].mean() - 0.25) < 0.03
    assert not np.array_equal(keep_mask(jax.random.key(8), (64, 50), 0.25), keep_mask(KEY, (64, 50), 0.25))


@pytest.mark.parametrize(("inner", "own"), [((6,), 4), ((5, 2), 3), ((3,), 4), ((5, 5), 2), ((), 5)])
def test_a_part_of_a_mask_is_that_part_of_the_whole(inner: tuple[int, ...], own: int) -> None:
    """Even widths, which are hashed in place, and odd ones, cut from the whole; beyond the end it is arbitrary."""
    whole = np.asarray(keep_mask(KEY, (3, 10, *inner), 0.4))
    cut = jax.jit(lambda start: keep_mask(KEY, (3, own, *inner), 0.4, Part(start, 10)))
    for start in range(0, 10, own):
        part, expected = np.asarray(cut(jnp.int32(start))), whole[:, start : start + own]
        assert np.array_equal(part[:, : expected.shape[1]], expected)
        assert part.shape == (3, own, *inner)


def test_little_is_kept_for_the_backward_pass():
    """Two arrays and a byte per entry, where autodiff of the definition keeps more."""
    a, u, _ = draw((256, 64))

    def kept(backend):
        def forward(a, u):
            return jax.vjp(lambda a, u: gated_norm(a, u, rate=0.5, key=KEY, implementation=backend), a, u)

        residuals = jax.tree.leaves(jax.eval_shape(forward, a, u)[1])
        return sum(x.size * x.dtype.itemsize for x in residuals)

    assert kept("xla") == kept("mosaic_tpu") == a.size * (4 + 4 + 1)
    assert kept("reference") > kept("xla")


@BACKEND
def test_under_scan(backend):
    a, u, _ = draw((4, 9, 16))
    call = functools.partial(gated_norm, implementation=backend)
    np.testing.assert_allclose(jax.lax.map(lambda x: call(*x), (a, u)), call(a, u), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_under_vmap_and_remat(backend):
    """Not for the TPU kernels: their interpreter can do neither, the compiler both."""
    a, u, _ = draw((4, 9, 16))
    call = functools.partial(gated_norm, implementation=backend)
    np.testing.assert_allclose(jax.vmap(call)(a, u), call(a, u), atol=1e-5)
    gradient = jax.grad(lambda a: (call(a, u) ** 2).sum())(a)
    np.testing.assert_allclose(jax.grad(lambda a: (jax.checkpoint(call)(a, u) ** 2).sum())(a), gradient, rtol=1e-5)


def test_calls_that_cannot_be_served():
    a, u, _ = draw((3, 8))
    assert gated_norm(a[:0], u[:0]).shape == (0, 8)
    with pytest.raises(ValueError, match="share one shape"):
        gated_norm(a, u[:2])
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        gated_norm(a, u, rate=1.0)
    with pytest.raises(ValueError, match="unknown implementation"):
        gated_norm(a, u, implementation="cuda")
    with pytest.raises(NotImplementedError, match="mosaic_tpu: takes bfloat16 or float32"):
        gated_norm(a.astype(jnp.float16), u, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="wider than 4096"):
        gated_norm(jnp.zeros((1, 5000)), jnp.zeros((1, 5000)), implementation=("mosaic_tpu",))
    wide = jnp.ones((1, 5000)).at[0, 0].set(0)
    assert np.isfinite(gated_norm(wide, wide, implementation=("mosaic_tpu", "xla"))).all()
