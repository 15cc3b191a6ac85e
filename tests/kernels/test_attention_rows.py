"""Rows of tokens with segments and orders, for HSTU attention and its softmax control, on the backends that serve both.

What holds of HSTU attention alone, on jagged and padded sequences, is in attention_suite.py.
"""

import functools
import math
import operator
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import (
    BACKENDS,
    TIME_BUCKETS,
    Plan,
    Tokens,
    hstu_attention,
    hstu_attention_padded,
    plan,
    softmax_attention,
    time_bucket,
    visible,
)
from kernels_pallas.hstu_attention.buckets import bucket_formula, thresholds

BACKEND = pytest.mark.parametrize("backend", ["reference", "xla"])
OPERATION = pytest.mark.parametrize("operation", ["hstu", "softmax"])
SOFTMAX = pytest.mark.parametrize("operation", ["softmax"])
DIVISOR, SCALE = 7.0, 0.6


def attend(operation, q, k, v, tokens, position=None, seconds=None, backend=None):
    """Either operation with this file's constants, compiled."""
    return _attend(operation, backend, q, k, v, tokens, position, seconds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(operation, backend, q, k, v, tokens, position, seconds):
    tables = {"position_bias": position, "time_bias": seconds, "implementation": backend}
    if operation == "hstu":
        return hstu_attention(q, k, v, tokens, max_len=DIVISOR, alpha=SCALE, **tables)
    return softmax_attention(q, k, v, tokens, scale=SCALE, **tables)


def make_tokens(layout, seed=0):
    """Tokens from one list of (history, candidates) segments per row; rows are padded to the longest."""
    rng = np.random.default_rng(seed)
    length = max(sum(h + c for h, c in row) for row in layout)
    fields = np.zeros((4, len(layout), length), np.int32)
    for b, row in enumerate(layout):
        start = 0
        for s, (history, candidates) in enumerate(row):
            size = history + candidates
            times = np.cumsum(rng.choice([0, 1, 50, 4000, 90000, 3000000], size)) + 10**9
            times[history:] = times[history] if candidates else times[history:]
            span = slice(start, start + size)
            fields[0, b, span] = s + 1
            fields[1, b, span] = np.minimum(np.arange(size), history)
            fields[2, b, span] = np.append(times[1:], times[-1])
            fields[3, b, span] = times
            start += size
    return Tokens(*(jnp.asarray(field) for field in fields))


def make_inputs(tokens, heads=2, dqk=5, dv=3, positions=6, seed=1, dtype=np.float32):
    """q, k, v, cotangent, position table and time table."""
    rng = np.random.default_rng(seed)
    b, t = tokens.segment.shape
    shapes = [(b, t, heads, dqk), (b, t, heads, dqk), (b, t, heads, dv), (b, t, heads, dv)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in [*shapes, (2 * positions - 1,), (TIME_BUCKETS,)]]


def oracle(operation, q, k, v, tokens, position, seconds):
    """The definition by loops, in float64."""
    segment, order, query_time, key_time = (np.asarray(field, np.int64) for field in tokens[:4])
    q, k, v, position, seconds = (np.asarray(x, np.float64) for x in (q, k, v, position, seconds))
    reach = (len(position) - 1) // 2
    out = np.zeros(v.shape)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            if not segment[b, i]:
                continue
            seen = [j for j in range(i) if segment[b, j] == segment[b, i] and order[b, j] < order[b, i]] + [i]
            for h in range(q.shape[2]):
                weights = []
                for j in seen:
                    distance = min(max(order[b, j] - order[b, i], -reach), reach)
                    gap = abs(int(query_time[b, i] - key_time[b, j]))
                    bucket = min(max(math.floor(math.log(max(gap, 1)) / 0.301), 0), 128)
                    score = SCALE * (q[b, i, h] @ k[b, j, h]) + position[distance + reach] + seconds[bucket]
                    weights.append(score / (1 + math.exp(-score)) / DIVISOR if operation == "hstu" else score)
                if operation == "softmax":
                    raised = np.exp(np.array(weights) - max(weights))
                    weights = list(raised / raised.sum())
                out[b, i, h] = sum(w * v[b, j, h] for w, j in zip(weights, seen))
    return out


def forward_and_gradients(operation, inputs, tokens, backend, position=True, seconds=True):
    """The output and the gradients of q, k, v and the tables in use."""
    return _gradients(operation, backend, position, seconds, inputs, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradients(operation, backend, position, seconds, inputs, tokens):
    q, k, v, cotangent, *tables = inputs
    tables = [t for t, used in zip(tables, (position, seconds)) if used]

    def call(q, k, v, *tables):
        rest = list(tables)
        chosen = [rest.pop(0) if used else None for used in (position, seconds)]
        return attend(operation, q, k, v, tokens, *chosen, backend=backend)

    out, pull = jax.vjp(call, q, k, v, *tables)
    return [out, *pull(cotangent)]


def assert_close(got, want, tolerance):
    """Largest error relative to the largest entry; the expectation must not be trivially zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(want).max() > 0
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def requests_of_two(tokens):
    """The tokens with orders as two interleaved events shown together have them: a later item has a smaller order."""
    order = 4 * (tokens.order // 4) + tokens.order % 2
    return tokens._replace(order=order)


# Several segments in a row, candidates, a short row and one of padding alone; 23 is no multiple of the blocks.
MIXED = [[(9, 3), (7, 4)], [(5, 0), (1, 0), (0, 2)], [], [(20, 0)]]
# Long enough for several blocks of query rows, with a last block that is not full.
LONG = [[(100, 31)], [(60, 0), (71, 0)], [(3, 0)], []]


@BACKEND
@OPERATION
@pytest.mark.parametrize("together", [False, True])
def test_matches_loops(operation, backend, together):
    tokens = requests_of_two(make_tokens(MIXED)) if together else make_tokens(MIXED)
    q, k, v, _, position, seconds = make_inputs(tokens)
    got = attend(operation, q, k, v, tokens, position, seconds, backend)
    assert_close(got, oracle(operation, q, k, v, tokens, position, seconds), 3e-6)


@BACKEND
@OPERATION
def test_gradients_match_finite_differences(operation, backend):
    """All five gradients, in float64, along random directions of the loops' output."""
    with jax.enable_x64(True):
        tokens = make_tokens([[(4, 2), (3, 0)], [(5, 1)]])
        inputs = make_inputs(tokens, dtype=np.float64)
        gradients = forward_and_gradients(operation, inputs, tokens, backend)[1:]
        assert all(g.dtype == np.float64 for g in gradients)
        arguments = [np.asarray(inputs[i]) for i in (0, 1, 2, 4, 5)]
        cotangent = np.asarray(inputs[3])
        rng = np.random.default_rng(2)
        for place, gradient in enumerate(gradients):
            direction = rng.normal(size=arguments[place].shape)
            ends = []
            for sign in (1, -1):
                moved = list(arguments)
                moved[place] = moved[place] + sign * 1e-5 * direction
                q, k, v, position, seconds = moved
                ends.append((oracle(operation, q, k, v, tokens, position, seconds) * cotangent).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs(slope) > 1e-3
            assert abs(float((gradient * direction).sum()) - slope) < 1e-6 * max(1, abs(slope))


@OPERATION
@pytest.mark.parametrize(("position", "seconds"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    "tokens",
    [make_tokens(MIXED), make_tokens(LONG), requests_of_two(make_tokens(LONG))],
    ids=["mixed", "long", "together"],
)
def test_xla_matches_reference(operation, position, seconds, tokens):
    inputs = make_inputs(tokens, positions=40)
    got = forward_and_gradients(operation, inputs, tokens, "xla", position, seconds)
    want = forward_and_gradients(operation, inputs, tokens, "reference", position, seconds)
    for g, w in zip(got, want):
        assert_close(g, w, 5e-6)


def test_long_layout_needs_several_blocks():
    codes = plan(make_tokens(LONG), implementation="xla").prepared["xla"]
    assert len(codes) >= 3
    assert len({code.shape[1] for code in codes}) > 1


@BACKEND
@OPERATION
def test_packed_equals_separate(operation, backend):
    packed, separate = make_tokens([[(9, 3), (30, 41)]]), make_tokens([[(9, 3)], [(30, 41)]])
    inputs = make_inputs(packed, positions=20)
    cut = 12

    def split(x):
        first = jnp.pad(x[:, :cut], ((0, 0), (0, x.shape[1] - 2 * cut), (0, 0), (0, 0)))
        return jnp.concatenate([first, x[:, cut:]])

    # The times must agree, not only the shapes.
    both = jax.tree.map(lambda field: split(field[..., None, None])[..., 0, 0], packed)
    both = both._replace(segment=jnp.minimum(both.segment, 1))
    np.testing.assert_array_equal(both.segment, separate.segment)
    together = forward_and_gradients(operation, inputs, packed, backend)
    apart = forward_and_gradients(operation, [*map(split, inputs[:4]), *inputs[4:]], both, backend)
    for got, want in zip(apart[:4], together[:4]):
        assert_close(got, split(want), 3e-6)
    for got, want in zip(apart[4:], together[4:]):
        assert_close(got, want, 3e-6)


@BACKEND
@SOFTMAX
def test_permuting_candidates(operation, backend):
    """Outputs follow their candidates, and neither history nor the other candidates notice."""
    tokens = make_tokens([[(60, 9)]])
    q, k, v, _, position, seconds = make_inputs(tokens)
    order = np.concatenate([np.arange(60), 60 + np.random.default_rng(5).permutation(9)])
    before = attend(operation, q, k, v, tokens, position, seconds, backend)
    after = attend(operation, q[:, order], k[:, order], v[:, order], tokens, position, seconds, backend)
    assert_close(after, before[:, order], 1e-6)
    assert np.abs(after[:, 60:] - before[:, 60:]).max() > 1e-3  # the permutation did move something


@BACKEND
@OPERATION
def test_poisoned_padding(operation, backend):
    """NaN in padding, cotangent included, changes no bit, and padding rows are exact zeros."""
    tokens = make_tokens(MIXED)
    inputs = make_inputs(tokens)
    padding = np.asarray(tokens.segment == 0)[:, :, None, None]
    assert padding.any()
    zeros, nans = ([jnp.where(padding, fill, x) for x in inputs[:4]] for fill in (0, np.nan))
    noise = np.random.default_rng(3).integers(-(2**31), 2**31, (3, *tokens.order.shape))
    garbage = Tokens(
        tokens.segment,
        *(jnp.where(padding[..., 0, 0], n.astype(np.int32), f) for n, f in zip(noise, tokens[1:4])),
    )
    clean = forward_and_gradients(operation, [*zeros, *inputs[4:]], tokens, backend)
    poisoned = forward_and_gradients(operation, [*nans, *inputs[4:]], garbage, backend)
    for got, want in zip(poisoned, clean):
        np.testing.assert_array_equal(got, want)
    for x in poisoned[:4]:
        assert not np.asarray(x)[np.broadcast_to(padding, x.shape)].any()


@BACKEND
@SOFTMAX
def test_every_argument_matters(operation, backend):
    tokens = make_tokens([[(12, 3)]])
    inputs = make_inputs(tokens)
    base = attend(operation, *inputs[:3], tokens, inputs[4], inputs[5], backend)
    for i in range(3):
        changed = [2 * x if j == i else x for j, x in enumerate(inputs[:3])]
        got = attend(operation, *changed, tokens, inputs[4], inputs[5], backend)
        assert np.abs(got - base).max() > 1e-3
    assert np.abs(attend(operation, *inputs[:3], tokens, None, inputs[5], backend) - base).max() > 1e-3
    assert np.abs(attend(operation, *inputs[:3], tokens, inputs[4], None, backend) - base).max() > 1e-3
    later = tokens._replace(query_time=tokens.query_time + 10**6)
    assert np.abs(attend(operation, *inputs[:3], later, inputs[4], inputs[5], backend) - base).max() > 1e-3


@BACKEND
def test_equal_times_share_the_first_bucket(backend):
    tokens = make_tokens([[(70, 0)]])
    tokens = tokens._replace(query_time=tokens.query_time * 0 + 5, key_time=tokens.key_time * 0 + 5)
    inputs = make_inputs(tokens)
    gradient = forward_and_gradients("hstu", inputs, tokens, backend)[5]
    assert gradient[0] != 0
    assert not gradient[1:].any()


def test_thresholds_agree_with_the_formula():
    """One step either side of each threshold, and the ends of int32."""
    edges = [int(x) for x in thresholds()]
    assert len(edges) == 73
    gaps = sorted({max(edge + step, 0) for edge in edges for step in (-1, 0, 1)} | {0, 2**31 - 1, 2**32 - 1})
    low = [max(-(2**31), -gap) for gap in gaps]
    high = [start + gap for start, gap in zip(low, gaps)]
    want = [bucket_formula(gap) for gap in gaps]
    assert want == sorted(want)
    assert len(set(want)) == 73  # 0..73 without 1, which no whole number of seconds reaches
    for ends in ((low, high), (high, low)):
        times = [jnp.asarray(np.array(x, np.int64).astype(np.int32)) for x in ends]
        np.testing.assert_array_equal(time_bucket(*times), want)
    random = np.random.default_rng(0).integers(0, 2**31, 20_000) >> np.random.default_rng(1).integers(0, 31, 20_000)
    exact = np.clip(np.floor(np.log(np.maximum(random, 1).astype(np.float64)) / 0.301), 0, 128)
    np.testing.assert_array_equal(time_bucket(jnp.asarray(random, jnp.int32), jnp.int32(0)), exact)


@BACKEND
@SOFTMAX
def test_bfloat16_error_is_bounded_by_a_plain_implementation(operation, backend):
    """At most twice (outputs) and five times (gradients) the error of the dense formula in bfloat16 throughout."""
    tokens = make_tokens(LONG)
    exact_inputs = make_inputs(tokens, positions=40)
    inputs = [x.astype(jnp.bfloat16) for x in exact_inputs[:4]] + exact_inputs[4:]
    rounded = [x.astype(jnp.float32) for x in inputs]
    exact = forward_and_gradients(operation, rounded, tokens, "reference", False, False)
    got = forward_and_gradients(operation, inputs, tokens, backend, False, False)
    mask = visible(tokens)[:, None]

    def plain(q, k, v):
        scores = (SCALE * jnp.einsum("bihd,bjhd->bhij", q, k)).astype(jnp.bfloat16)
        if operation == "hstu":
            weights = jax.nn.silu(scores) * mask / DIVISOR
        else:
            weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0)
        return jnp.einsum("bhij,bjhd->bihd", weights.astype(jnp.bfloat16), v).astype(jnp.bfloat16)

    out, pull = jax.vjp(jax.jit(plain), *inputs[:3])
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for factor, g, p, e in zip((2, 5, 5, 5), got, [out, *pull(inputs[3])], exact):
        allowed = factor * np.abs(np.asarray(p, np.float32) - np.asarray(e)).max()
        assert 0 < np.abs(np.asarray(g, np.float32) - np.asarray(e)).max() <= allowed


@SOFTMAX
def test_runs_repeat_bit_for_bit(operation):
    tokens = make_tokens(LONG)
    inputs = make_inputs(tokens, heads=4, positions=40)
    first = forward_and_gradients(operation, inputs, tokens, "xla")
    for _ in range(5):
        for a, b in zip(forward_and_gradients(operation, inputs, tokens, "xla"), first):
            np.testing.assert_array_equal(a, b)


@BACKEND
@SOFTMAX
def test_transformations(operation, backend):
    """jit, vmap, scan over layers and remat give what plain calls give; one plan serves all layers."""
    tokens = make_tokens([[(40, 0), (30, 3)], [(66, 0)]])
    q, k, v, _, position, seconds = make_inputs(tokens, dqk=4, dv=4)
    stacked = (jnp.stack([position, 2 * position]), jnp.stack([seconds, -seconds]))
    pairs = plan(tokens, positions=6, buckets=TIME_BUCKETS)

    def layer(x, tables, shared=tokens):
        return x + attend(operation, x, k, v, shared, *tables, backend=backend), None

    def unrolled(x):
        for i in range(2):
            x = layer(x, (stacked[0][i], stacked[1][i]))[0]
        return x

    def scanned(x):
        body = jax.checkpoint(lambda x, tables: layer(x, tables, pairs))
        return jax.lax.scan(body, x, stacked)[0]

    want = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(unrolled(x)))))(q)
    got = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(scanned(x)))))(q)
    for g, w in zip(got, want):
        assert_close(g, w, 3e-6)

    def loss(scale):
        return jnp.sum(jnp.sin(attend(operation, scale * q, k, v, tokens, scale * position, seconds, backend)))

    scales = jnp.array([0.5, 2.0])
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(scales)
    alone = jax.jit(jax.value_and_grad(loss))
    for i in range(2):
        for g, w in zip(mapped, alone(scales[i])):
            assert_close(g[i], w, 3e-6)


@OPERATION
def test_rows_do_not_depend_on_their_neighbours(operation):
    tokens = make_tokens([[(20 + i, i)] for i in range(7)])
    q, k, v, _, position, seconds = make_inputs(tokens)
    together = attend(operation, q, k, v, tokens, position, seconds)
    for b in range(7):
        row = slice(b, b + 1)
        own = jax.tree.map(operator.itemgetter(row), tokens)
        alone = attend(operation, q[row], k[row], v[row], own, position, seconds)
        assert_close(together[row], alone, 1e-6)


@BACKEND
@OPERATION
@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3)])
def test_empty(operation, backend, shape):
    tokens = Tokens(*(jnp.zeros(shape[:2], jnp.int32) for _ in range(4)))
    x = jnp.zeros(shape)
    out, pull = jax.vjp(lambda x: attend(operation, x, x, x, tokens, backend=backend), x)
    assert out.shape == pull(out)[0].shape == shape


def test_choice_of_backend(monkeypatch):
    tokens = make_tokens([[(4, 0)]])
    q, k, v, *_ = make_inputs(tokens)

    def refuse(*arguments, **options):
        raise NotImplementedError("needs a larger moon")

    lunar = types.ModuleType("lunar")
    lunar.hstu, lunar.prepare = refuse, lambda tokens, positions, buckets: None
    monkeypatch.setitem(sys.modules, "lunar", lunar)
    monkeypatch.setitem(BACKENDS, "lunar", "lunar")

    def call(which):
        return hstu_attention(q, k, v, tokens, max_len=3.0, implementation=which)

    np.testing.assert_array_equal(call(("lunar", "reference")), call("reference"))
    with pytest.raises(NotImplementedError, match="lunar: needs a larger moon"):
        call("lunar")
    with pytest.raises(NotImplementedError, match=r"moon; lunar"):
        call(("lunar", "lunar"))
    with pytest.raises(ValueError, match="solar"):
        call(("xla", "solar"))
    with pytest.raises(ValueError, match="unknown implementation"):
        call(())


def test_wrong_arguments_are_refused():
    tokens = make_tokens([[(4, 0)]])
    q, k, v, _, position, seconds = make_inputs(tokens)
    pairs = plan(tokens, positions=6)
    assert isinstance(pairs, Plan)
    hstu_attention(q, k, v, pairs, max_len=3.0, position_bias=position)
    with pytest.raises(ValueError, match="plan is for tables"):
        hstu_attention(q, k, v, pairs, max_len=3.0, position_bias=position, time_bias=seconds)
    with pytest.raises(ValueError, match="max_len"):
        hstu_attention(q, k, v, tokens, max_len=0.0)
    with pytest.raises(ValueError, match="odd length"):
        hstu_attention(q, k, v, tokens, max_len=3.0, position_bias=position[:-1])
    with pytest.raises(ValueError, match="expected q and k"):
        hstu_attention(q, k[:, :-1], v, tokens, max_len=3.0)
    with pytest.raises(ValueError, match="tokens are"):
        hstu_attention(q[:, :-1], k[:, :-1], v[:, :-1], tokens, max_len=3.0)
    with pytest.raises(ValueError, match="share one shape"):
        plan(tokens._replace(order=tokens.order[:, :-1]))
    with pytest.raises(ValueError, match="negative"):
        plan(tokens, positions=-1)
    packed, offsets = [x[0] for x in (q, k, v)], jnp.array([0, 4])
    hstu_attention(*packed, offsets, max_len=3.0, time_bias=seconds, timestamps=jnp.arange(4))
    with pytest.raises(ValueError, match="packed sequences are"):
        hstu_attention(q, k, v, offsets, max_len=3.0)
    with pytest.raises(ValueError, match="needs timestamps"):
        hstu_attention(*packed, offsets, max_len=3.0, time_bias=seconds)
    with pytest.raises(ValueError, match="go with int offsets alone"):
        hstu_attention(q, k, v, tokens, max_len=3.0, window=2)
    with pytest.raises(ValueError, match="with lengths"):
        hstu_attention_padded(q, k, v, offsets, max_len=3.0)
    with pytest.raises(ValueError, match="needs timestamps"):
        hstu_attention_padded(q, k, v, jnp.array([4]), max_len=3.0, time_bias=seconds)
