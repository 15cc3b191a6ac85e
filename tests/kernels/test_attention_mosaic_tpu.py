"""The TPU kernels under the interpreter, which checks memory: unwritten memory is NaN, reads out of bounds are errors,
and so are races where two cores share the work. All batches have one number of tokens and share one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention import (
    TIME_BUCKETS,
    Columns,
    Tokens,
    hstu_attention,
    jagged_tokens,
    mosaic_tpu,
    mosaic_tpu_bias,
    padded_tokens,
    plan,
)
from kernels_pallas.hstu_attention import mosaic_tpu_tiles as tiles
from kernels_pallas.hstu_attention.buckets import bucket_formula, thresholds, time_bucket
from kernels_pallas.hstu_attention.tokens import attributes, visible
from tests.kernels.attention_cases import ALPHA, MAX_LEN, relative_error
from tests.kernels.attention_suite import HSTUSuite

BLOCK, TOTAL, POSITIONS = 128, 420, 40
IMPLEMENTATION = "mosaic_tpu"
BIASES = pytest.mark.parametrize(("position", "time"), [(True, False), (False, True)])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request):
    monkeypatch.setattr(tiles, "block_size", lambda length: BLOCK)
    if "lowers" in request.node.name:
        yield
        return
    cores = 2 if "groups" in request.node.name else 1  # a core alone cannot race with anything
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=cores > 1, num_cores_or_threads=cores)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def run(inputs, tokens, *, position=True, time=True, implementation=IMPLEMENTATION):
    """[out, dq, dk, dv, gradients of the tables in use] for inputs q, k, v, cotangent [B, T, H, D] and tables."""
    return _compiled(position, time, implementation)(inputs, tokens)


@functools.cache
def _compiled(position, time, implementation):
    @jax.jit
    def call(inputs, tokens):
        q, k, v, cotangent, *tables = inputs
        tables = tuple(table if used else None for table, used in zip(tables, (position, time)))

        def attend(q, k, v, tables):
            bias = dict(zip(("position_bias", "time_bias"), tables))
            return hstu_attention(q, k, v, tokens, max_len=MAX_LEN, alpha=ALPHA, implementation=implementation, **bias)

        out, pull = jax.vjp(attend, q, k, v, tables)
        *d_qkv, d_tables = pull(cotangent)
        return [out, *d_qkv, *(d for d in d_tables if d is not None)]

    return call


def exact(inputs, tokens, **tables):
    """What `run` should give: the dense definition in float64."""
    with jax.enable_x64(True):
        return run([np.asarray(x, np.float64) for x in inputs], tokens, implementation="reference", **tables)


def assert_near(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, np.asarray(w, np.float64)) <= tolerance


class TestSuite(HSTUSuite):
    """All cases as one number of rows, so that they share their compiled programs."""

    implementation = IMPLEMENTATION
    block = BLOCK
    dv = 8

    def attend_each(self, case, draws, *, position=True, time=True, times=None):
        short = TOTAL - case.total
        stamps = jnp.asarray(np.pad(case.times() if times is None else times, (0, short)))
        tokens = jagged_tokens(jnp.asarray(case.offsets), TOTAL, timestamps=stamps, **case.mask_options())
        # What is left out is given as what it means, so that all masks are one program.
        meant = {"low": jnp.zeros_like(tokens.order), "high": tokens.order, "position": tokens.order}
        tokens = tokens._replace(**{name: x for name, x in meant.items() if getattr(tokens, name) is None})

        def draw(inputs):
            wide = [jnp.pad(x, ((0, short), (0, 0), (0, 0)), constant_values=jnp.nan)[None] for x in inputs[:4]]
            got = run([*wide, *inputs[4:]], tokens, position=position, time=time)
            for x in got[:4]:
                assert not np.asarray(x)[0, case.offsets[-1] :].any()
            return [x[0, : case.total] if i < 4 else x for i, x in enumerate(got)]

        return [draw(inputs) for inputs in draws]

    # Lowered below, not run: the interpreter's memory has effects, which these transformations do not carry.
    test_under_scan_remat_and_vmap = None
    test_under_shard_map = None


def general_tokens(length):
    """Two rows of tokens that no jagged batch has: interleaved requests, positions with jumps, a segment in two parts,
    queries with a look ahead, padding in the middle, keys later than their query, times 68 years apart."""
    rng = np.random.default_rng(7)
    index = np.arange(length)
    order = np.stack([4 * (index // 4) + index % 2, index % 110])
    segment = np.stack([np.ones(length, int), 1 + index // 110 % 2])
    segment[0, 120:140] = 0
    segment[1, 250:] = 1
    order[1, 250:] += 110
    position = np.stack([order[0] // 3, rng.integers(0, 300, length)])
    query_time, key_time = rng.integers(0, 2**10, (2, 2, length)) >> rng.integers(0, 10, (2, 2, length))
    query_time[0, 230] = 2**31 - 1
    high = np.where(index % 30 == 0, order + 20, order)
    fields = (segment, order, query_time, key_time, np.maximum(order - 150, 0), high, position)
    return Tokens(*(jnp.asarray(field.astype(np.int32)) for field in fields))


def test_any_tokens_as_the_reference_has_them():
    length = 270
    tokens = general_tokens(length)
    rng = np.random.default_rng(3)
    padding = np.asarray(tokens.segment == 0)[:, :, None, None]
    arrays = [np.where(padding, np.nan, rng.normal(size=(2, length, 2, 8))) for _ in range(4)]
    inputs = [jnp.asarray(x, jnp.float32) for x in [*arrays, rng.normal(size=399), rng.normal(size=TIME_BUCKETS)]]
    assert_near(run(inputs, tokens), exact(inputs, tokens), 2e-6)
    flags = tiles.prepare(tokens, 200, TIME_BUCKETS).by_query.flags
    assert set(np.unique(flags & tiles.IRREGULAR)) == {0, tiles.IRREGULAR} or (flags & tiles.IRREGULAR).all()


@BIASES
def test_blocks_of_several_squares_and_groups_of_heads(monkeypatch, position, time):
    """One table at a time, blocks of 256 tokens, two groups of heads; squares with few time buckets, with many and both
    kinds in one full tile."""
    monkeypatch.setattr(tiles, "block_size", lambda length: 256)
    monkeypatch.setattr(mosaic_tpu, "_GROUP", 1)
    length = 770
    stamps = np.cumsum(np.random.default_rng(0).choice([1, 900, 40_000], (1, length)), axis=1)
    tokens = padded_tokens(jnp.array([length - 1]), length, timestamps=jnp.asarray(stamps, jnp.int32))
    kind = tiles.Kind(np.asarray(tiles.prepare(tokens, POSITIONS, TIME_BUCKETS).by_query.flags))
    assert {(many > 0, many < seen) for many, seen in zip(kind.many[kind.full], kind.seen[kind.full])} == {
        (False, True),
        (True, True),
    }
    assert (kind.many == 3).any()  # on the diagonal, where the fourth square is hidden
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(1, length, 2, 128)) for _ in range(4)]
    inputs = [jnp.asarray(x, jnp.float32) for x in [*inputs, rng.normal(size=2 * 400 - 1), rng.normal(size=129)]]
    tables = {"position": position, "time": time}
    assert_near(run(inputs, tokens, **tables), exact(inputs, tokens, **tables), 2e-6)


def test_bucket_ranges_of_squares_hold_every_visible_pair_and_no_padding():
    length, block = 600, 256
    tokens = general_tokens(length)
    queries, keys = attributes(tokens)
    ranges = tiles._bucket_ranges(queries, keys, block)
    side = -(-length // block) * block
    pad = [(0, 0), *[(0, side - length)] * 2]
    seen = np.pad(visible(tokens), pad)
    bucket = np.pad(time_bucket(queries.time[:, :, None], keys.time[:, None]), pad)

    def squares(x, reduce):
        """[B, side, side] -> [B, blocks, blocks, squares, squares]."""
        squares = reduce(x.reshape(2, side // 128, 128, side // 128, 128), axis=(2, 4))
        return squares.reshape(2, side // block, 2, side // block, 2).swapaxes(2, 3)

    lowest = squares(np.where(seen, bucket, 127), np.min)
    highest = squares(np.where(seen, bucket, -1), np.max)
    some = squares(seen, np.any)
    assert np.asarray(ranges.seen)[some].all()
    assert not np.asarray(ranges.seen).all()
    assert (np.asarray(ranges.lowest) <= lowest)[some].all()
    assert (np.asarray(ranges.highest) >= highest)[some].all()
    padding = tokens.segment == 0
    want = tiles.prepare(tokens, 0, TIME_BUCKETS)
    for extreme in (-(2**31), 2**31 - 1):
        query_time, key_time = (jnp.where(padding, extreme, time) for time in (tokens.query_time, tokens.key_time))
        got = tiles.prepare(tokens._replace(query_time=query_time, key_time=key_time), 0, TIME_BUCKETS)
        np.testing.assert_array_equal(got.by_query.squares, want.by_query.squares)
        np.testing.assert_array_equal(got.by_key.squares, want.by_key.squares)


def test_time_buckets_at_every_threshold():
    limits, buckets = mosaic_tpu_bias.time_cells()
    edges = [int(edge) for edge in thresholds() if edge < 2**31]
    cells = [2**e + q * 2**e // 4 for e in range(2, 31) for q in range(4)]
    gaps = {max(edge + step, 0) for edge in [*edges, *cells] for step in (-1, 0, 1)} | {0, 1, 2, 3, 2**31 - 1}
    gaps = np.resize(np.array(sorted(gaps), np.int32), (8 * 128,)).reshape(8, 128)
    step = jax.jit(mosaic_tpu_bias.time_step)
    want = np.vectorize(lambda gap: bucket_formula(int(gap)))(gaps)
    for apart in (gaps, -gaps):
        np.testing.assert_array_equal(buckets[step(jnp.asarray(apart), jnp.asarray(limits)[None])], want)
    np.testing.assert_array_equal((gaps[..., None] > mosaic_tpu_bias.bucket_ends()).sum(-1), want)


def test_lowers_under_scan_remat_vmap_and_shard_map():
    """For a TPU, not interpreted: the interpreter's memory has effects, which these do not carry."""
    tokens = padded_tokens(jnp.array([50, 40]), 50, timestamps=jnp.zeros((2, 50), jnp.int32))
    x = jax.ShapeDtypeStruct((2, 50, 2, 8), jnp.float32)
    tables = {"position_bias": jnp.ones(9), "time_bias": jnp.ones(TIME_BUCKETS)}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def layer(x, tables, shared=tokens):
        return x + hstu_attention(x, 2 * x, x, shared, max_len=MAX_LEN, implementation=IMPLEMENTATION, **tables)

    def scanned(x, tables):
        shared = plan(tokens, positions=5, buckets=TIME_BUCKETS, implementation=IMPLEMENTATION)
        body = jax.checkpoint(lambda x, scale: (scale * layer(x, tables, shared), None))
        return jax.lax.scan(body, x, jnp.arange(2.0))[0].sum()

    def mapped(x, tables):
        return jax.vmap(lambda scale: layer(scale * x, tables).sum())(jnp.arange(2.0)).sum()

    def spread(x, tables):
        rows = jax.P("data")
        specs = rows, jax.P(), jax.tree.map(lambda _: rows, tokens)
        return jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=rows)(x, tables, tokens).sum()

    for function in (scanned, mapped, spread):
        gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        text = gradients.trace(x, tables).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("hstu_forward") > 0
        assert text.count("hstu_backward") > 0


def test_columns_that_are_whole_blocks_are_read_where_they_lie(monkeypatch):
    """Two heads of 64 and 128 features fill 128 and 256 lanes; queries that begin inside a block are copied."""
    widths = []
    forward = mosaic_tpu._output

    def spy(call, q, k, v, *rest):
        widths.append([x.shape[2] for x in (q, k, v)])
        return forward(call, q, k, v, *rest)

    monkeypatch.setattr(mosaic_tpu, "_output", spy)
    rng = np.random.default_rng(4)
    tokens = padded_tokens(jnp.array([150]), 150)
    wide, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 150, 768), (1, 150, 2, 128)))

    def attend(wide, first, implementation):
        v, q, k = (Columns(wide, start, 2, width) for start, width in ((256, 128), (first, 64), (640, 64)))
        return hstu_attention(q, k, v, tokens, max_len=MAX_LEN, alpha=ALPHA, implementation=implementation)

    for first, expected in ((512, [768, 768, 768]), (576, [128, 768, 768])):
        out, pull = jax.vjp(
            functools.partial(
                jax.jit(attend, static_argnames=("first", "implementation")), first=first, implementation=IMPLEMENTATION
            ),
            wide,
        )
        want, want_pull = jax.vjp(functools.partial(attend, first=first, implementation="reference"), wide)
        assert widths.pop() == expected
        assert relative_error(out, np.asarray(want)) < 1e-6
        assert relative_error(pull(cotangent)[0], np.asarray(want_pull(cotangent)[0])) < 1e-6


def test_refusals():
    tokens = padded_tokens(jnp.array([8]), 8)

    def attend(dtype, length=8, width=8):
        x = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
        rows = padded_tokens(jnp.array([length]), length) if length != 8 else tokens
        return jax.eval_shape(lambda x: hstu_attention(x, x, x, rows, max_len=1, implementation=IMPLEMENTATION), x)

    assert attend(jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(NotImplementedError, match="bfloat16 or float32"):
        attend(jnp.float16)
    with pytest.raises(NotImplementedError, match="tiles"):
        attend(jnp.bfloat16, length=2**17)
    with pytest.raises(NotImplementedError, match="MiB"):
        attend(jnp.bfloat16, length=20_000, width=1024)


@pytest.mark.parametrize(
    ("heads", "dqk", "dv", "group"), [(4, 128, 128, 4), (8, 128, 256, 4), (6, 64, 64, 2), (3, 64, 32, 3), (1, 8, 8, 1)]
)
def test_heads_of_a_step_fill_registers_or_are_all(heads, dqk, dv, group):
    call = tiles.Call(512, 4, heads, heads, (0, 0, 0), dqk, dv, 2, 1.0, 1.0, 0, 0)
    assert mosaic_tpu._grouped(call, lambda call: 0).group == group
