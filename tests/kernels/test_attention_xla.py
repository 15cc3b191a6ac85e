"""The XLA backend: short rows whole, long rows tile by tile, both against the suite, and what only they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import hstu_attention, padded_tokens, plan, softmax_attention, xla, xla_tiles
from tests.kernels.attention_suite import HSTUSuite, assert_close


class TestRows(HSTUSuite):
    """Rows no longer than `xla.LONGEST_ROW`."""

    implementation = "xla"


class TestTiles(HSTUSuite):
    """The same cases with every row taken for a long one, in tiles they straddle."""

    implementation = "xla"
    block = 32

    @pytest.fixture(autouse=True)
    def tiles(self, monkeypatch):
        use_tiles(monkeypatch, self.block)


def use_tiles(monkeypatch, block):
    monkeypatch.setattr(xla, "LONGEST_ROW", 0)
    monkeypatch.setattr(xla_tiles, "BLOCK", block)


def rows(seed, shape, dtype=np.float32):
    """q, k, v and a cotangent of one shape, a position table and a time table."""
    rng = np.random.default_rng(seed)
    shapes = [*[shape] * 4, (79,), (129,)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def both_passes(operation, inputs, tokens, backend):
    """The output and the gradients of q, k, v and both tables."""
    q, k, v, cotangent, position, time = inputs

    def call(q, k, v, position, time):
        tables = {"position_bias": position, "time_bias": time, "implementation": backend}
        if operation == "hstu":
            return hstu_attention(q, k, v, tokens, max_len=7.0, **tables)
        return softmax_attention(q, k, v, tokens, scale=0.6, **tables)

    out, pull = jax.vjp(jax.jit(call), q, k, v, position, time)
    return [out, *pull(cotangent)]


def some_tokens():
    times = np.cumsum(np.random.default_rng(7).choice([0, 1, 50, 4000, 90_000], (3, 50)), axis=1).astype(np.int32)
    return padded_tokens(jnp.array([50, 0, 33]), 50, num_targets=jnp.array([5, 0, 9]), timestamps=jnp.asarray(times))


@pytest.mark.parametrize("operation", ["hstu", "softmax"])
def test_tiles_match_the_reference_in_float64(monkeypatch, operation):
    """Both operations, to the last digits: the running softmax and the tiles lose nothing but rounding."""
    use_tiles(monkeypatch, 16)
    with jax.enable_x64(True):
        inputs, tokens = rows(0, (3, 50, 2, 5), np.float64), some_tokens()
        want = both_passes(operation, inputs, tokens, "reference")
        for g, w in zip(both_passes(operation, inputs, tokens, "xla"), want, strict=True):
            assert g.dtype == np.float64
            assert np.abs(w).max() > 0
            assert_close(g, w, 1e-13)


def test_tiles_keep_nan_padding_out_of_softmax(monkeypatch):
    use_tiles(monkeypatch, 16)
    inputs, tokens = rows(0, (3, 50, 2, 5)), some_tokens()
    padding = np.asarray(tokens.segment == 0)[:, :, None, None]
    zeros, nans = ([jnp.where(padding, fill, x) for x in inputs[:4]] + inputs[4:] for fill in (0, np.nan))
    clean, poisoned = (both_passes("softmax", x, tokens, "xla") for x in (zeros, nans))
    for got, want in zip(poisoned, clean):
        np.testing.assert_array_equal(got, want)
    for x in poisoned[:4]:
        assert not np.asarray(x)[np.broadcast_to(padding, x.shape)].any()


def dropped(inputs, tokens, backend, rate=0.25, key=3):
    q, k, v, cotangent, position, time = inputs

    def call(q, k, v, position, time):
        tables = {"position_bias": position, "time_bias": time, "implementation": backend}
        return softmax_attention(q, k, v, tokens, scale=0.6, rate=rate, key=jax.random.key(key), **tables)

    out, pull = jax.vjp(jax.jit(call), q, k, v, position, time)
    return [out, *pull(cotangent)]


def test_dropped_softmax_weights_match_the_reference_in_float64():
    with jax.enable_x64(True):
        inputs, tokens = rows(0, (3, 50, 2, 5), np.float64), some_tokens()
        for got, want in zip(dropped(inputs, tokens, "xla"), dropped(inputs, tokens, "reference"), strict=True):
            assert_close(got, want, 1e-13)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_dropout_zeroes_weights_and_grows_the_others(backend):
    """With unit vectors as values the output is the weights themselves; 70 tokens are two blocks."""
    tokens = padded_tokens(jnp.array([70, 70]), 70)
    inputs = rows(0, (2, 70, 2, 70))
    inputs[2] = jnp.broadcast_to(jnp.eye(70)[None, :, None], inputs[2].shape)
    q, k, v = inputs[:3]
    plain = np.asarray(softmax_attention(q, k, v, tokens, scale=0.1, implementation=backend))
    options = {"scale": 0.1, "rate": 0.25, "implementation": backend}
    left, again, other = (
        np.asarray(softmax_attention(q, k, v, tokens, key=jax.random.key(seed), **options)) for seed in (0, 0, 1)
    )
    kept, seen = left > 0, plain > 0
    np.testing.assert_allclose(left, np.where(kept, plain / 0.75, 0), rtol=1e-5)
    np.testing.assert_array_equal(left, again)
    assert not np.array_equal(kept, other > 0)
    share = kept.sum() / seen.sum()
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / seen.sum())
    for axis in (0, 2):  # rows and heads draw on their own
        assert not np.array_equal(kept.take(0, axis), kept.take(1, axis))


def test_weights_of_long_rows_are_not_dropped(monkeypatch):
    use_tiles(monkeypatch, 16)
    with pytest.raises(NotImplementedError, match="drops weights of rows up to 0 tokens, got 50"):
        dropped(rows(0, (3, 50, 2, 5)), some_tokens(), "xla")
    with pytest.raises(ValueError, match=r"rate of dropout must be in \[0, 1\)"):
        dropped(rows(0, (3, 50, 2, 5)), some_tokens(), "xla", rate=1.0)


def test_tokens_may_differ_under_vmap(monkeypatch):
    """Each mapped batch has its own lengths, so its own number of tiles."""
    use_tiles(monkeypatch, 16)
    q, k, v, cotangent, position, time = rows(0, (1, 50, 2, 5))

    def gradients(length):
        tokens = padded_tokens(length[None], 50, timestamps=jnp.arange(50, dtype=jnp.int32)[None])
        return both_passes("hstu", [q, k, v, cotangent, position, time], tokens, "xla")

    lengths = jnp.array([50, 3])
    mapped = jax.jit(jax.vmap(gradients))(lengths)
    for i, length in enumerate(lengths):
        for got, want in zip(mapped, jax.jit(gradients)(length)):
            assert_close(got[i], want, 1e-6)


def temporary_bytes(length):
    tokens = padded_tokens(jnp.array([length]), length, timestamps=jnp.arange(length, dtype=jnp.int32)[None])
    inputs = rows(0, (1, length, 2, 8))
    step = jax.jit(lambda tokens, *inputs: both_passes("hstu", inputs, tokens, "xla"))
    return step.lower(tokens, *inputs).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_long_rows_is_linear():
    """Four times the tokens take four times the memory; squares of 8,192 pairs alone would be 256 MiB."""
    lengths = (2048, 8192)
    assert min(lengths) > xla.LONGEST_ROW
    small, large = map(temporary_bytes, lengths)
    assert large < 4.2 * small
    assert large < 32 * 2**20


def test_only_long_rows_are_tiled():
    for length, tiled in ((xla.LONGEST_ROW, False), (xla.LONGEST_ROW + 1, True)):
        found = jax.eval_shape(lambda n=length: plan(padded_tokens(jnp.array([n]), n), implementation="xla"))
        assert isinstance(found.prepared["xla"], xla_tiles.Tiles) == tiled
