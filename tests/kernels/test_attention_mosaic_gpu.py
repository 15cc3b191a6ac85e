"""The Hopper backend without a GPU: block lists, numbers in JAX's interpreter of Mosaic GPU kernels, lowering for CUDA.

The interpreter runs the barriers, the copies and the products of every warpgroup on the CPU. It takes left operands of
products from shared memory alone; the variant with operands in registers, which the GPU runs, is lowered here.
"""

import dataclasses
import functools
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import (
    TIME_BUCKETS,
    hstu_attention,
    hstu_attention_padded,
    jagged_tokens,
    padded_tokens,
    plan,
    visible,
)
from kernels_pallas.hstu_attention import mosaic_gpu_lists as lists
from kernels_pallas.hstu_attention import mosaic_gpu_pieces as pieces
from kernels_pallas.hstu_attention import mosaic_gpu_tables as tables_of
from tests.kernels.attention_cases import MAX_LEN, Case, attend_each, cases, error_ratios


@pytest.fixture
def interpreter(monkeypatch):
    """Runs the kernels on the CPU and fails on a race between warpgroups or copies."""
    monkeypatch.setattr(pieces, "WEIGHTS_IN_REGISTERS", False)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params):
        yield


def tokens_of(case):
    return jagged_tokens(
        jnp.asarray(case.offsets), case.total, timestamps=jnp.asarray(case.times()), **case.mask_options()
    )


def random_lists(seed, rows=2, outer=12, inner=7):
    """Kinds of tiles, some blocks without any, and their lists."""
    rng = np.random.default_rng(seed)
    some = rng.random((rows, outer, inner)) < 0.4
    some[:, 3] = False
    full = some & (rng.random(some.shape) < 0.5)
    return some, full, lists.block_lists(jnp.asarray(some), jnp.asarray(full))


@pytest.mark.parametrize("seed", range(3))
def test_block_lists_hold_every_tile_once(seed):
    """Full tiles first; a row's tiles stand one after the other."""
    some, full, found = random_lists(seed)
    got = jax.tree.map(np.asarray, found)
    for row in range(2):
        count = some[row].sum(1)
        np.testing.assert_array_equal(got.counts[row], np.stack([full[row].sum(1), count, count.cumsum() - count], 1))
        want = []
        for block in range(some.shape[1]):
            inner = got.inner[row, block, : count[block]]
            whole = full[row, block].sum()
            np.testing.assert_array_equal(np.sort(inner[:whole]), np.flatnonzero(full[row, block]))
            np.testing.assert_array_equal(np.sort(inner[whole:]), np.flatnonzero(some[row, block] & ~full[row, block]))
            want += [(block, i) for i in inner]
        np.testing.assert_array_equal(got.tiles[row, : len(want)], want)
        assert (got.tiles[row, len(want) :, 0] == -1).all()


@pytest.mark.parametrize("held", [0, 2**14])
def test_waves_meet_every_tile_once(held, monkeypatch):
    """By outer blocks, as the kernels of outputs do, and by places, as the kernel of the bias does."""
    monkeypatch.setattr(lists, "_HELD_TILES", held)
    some, full, found = random_lists(0, outer=40)
    runs = []

    def run(wave, own):
        runs.append(wave.tiles.shape[1])
        full_count, count, before = (wave.counts[..., i] for i in range(3))
        nth = jnp.arange(some.shape[2])
        # What the kernel would read for tile n of a block: the wave's tile at its place must be that tile.
        tile = jnp.take_along_axis(
            wave.tiles, (before[..., None] + nth).reshape(2, -1, 1), 1, mode="fill", fill_value=-9
        )
        tile = tile.reshape(*before.shape, -1, 2)
        right = (tile[..., 0] == jnp.arange(some.shape[1])[:, None]) & (tile[..., 1] == wave.inner)
        by_block = (right & (nth < count[..., None])).sum(2)
        by_place = jnp.zeros(some.shape, jnp.int32)
        rows = jnp.arange(2)[:, None]
        mine = wave.tiles[:, :own]
        by_place = by_place.at[rows, mine[..., 0], mine[..., 1]].add((mine[..., 0] >= 0).astype(jnp.int32))
        return by_block, full_count, by_place

    by_block, full_count, by_place = jax.jit(lambda found: lists.in_waves(run, found))(found)
    np.testing.assert_array_equal(by_block, some.sum(2))
    np.testing.assert_array_equal(full_count, full.sum(2))
    np.testing.assert_array_equal(by_place, some)
    assert len(runs) == 2  # the first wave and the loop's
    assert runs[0] == (28 if held == 0 else 154)


prepared_lists = jax.jit(lambda tokens: lists.prepare(tokens)[2:])


def listed_tiles(found):
    """(outer block, inner block, whether full) of the first row's tiles."""
    for outer, (full, count, _) in enumerate(np.asarray(found.counts)[0]):
        for n, inner in enumerate(np.asarray(found.inner)[0, outer, :count]):
            yield outer, inner, n < full


@pytest.mark.parametrize("case", cases(128), ids=lambda case: case.name)
def test_lists_cover_the_mask(case):
    """Every visible pair lies in a listed tile of each kind of list; full tiles hide nothing."""
    case = dataclasses.replace(case, tail=640 - sum(case.lengths))
    tokens = tokens_of(case)
    seen = np.asarray(visible(tokens))[0]
    sizes = (lists.WIDE, lists.NARROW, lists.NARROW)
    for found, mask, size in zip(prepared_lists(tokens), (seen, seen, seen.T), sizes):
        outside = mask.copy()
        for outer, inner, full in listed_tiles(found):
            where = np.s_[outer * lists.OUTER : (outer + 1) * lists.OUTER, inner * size : (inner + 1) * size]
            assert not full or mask[where].all()
            outside[where] = False
        assert not outside.any()


def dense_table_gradients(marks, tiles, d_bias, positions, buckets):
    """Of tables [2 positions - 1] and [buckets], pair by pair in float64."""
    want = np.zeros(2 * positions - 1), np.zeros(buckets)
    for row, place in np.argwhere(np.asarray(tiles)[..., 0] >= 0):
        outer, inner = np.asarray(tiles)[row, place]
        queries, keys = (np.s_[block * size : (block + 1) * size] for block, size in ((outer, 128), (inner, 64)))
        seconds = np.abs(marks.query_time[row, queries][:, None].astype(np.int64) - marks.key_time[row, keys])
        bucket = np.floor(np.log(np.maximum(seconds, 1)) / 0.301).astype(int)
        apart = marks.key_position[row, keys] - marks.query_position[row, queries][:, None]
        np.add.at(want[0], np.clip(apart, 1 - positions, positions - 1) + positions - 1, d_bias[row, place])
        np.add.at(want[1], np.minimum(bucket, buckets - 1), d_bias[row, place])
    return want


def two_sequences(candidates):
    """Positions of two rows of 384 tokens: each holds two sequences, the second of which ends with candidates."""
    one = np.concatenate([np.arange(170), np.arange(214 - candidates), np.full(candidates, 214 - candidates)])
    return np.stack([one, one + 3]).astype(np.int32)


@pytest.mark.parametrize(
    ("key_position", "unit"),
    [
        (two_sequences(0), 0),
        (two_sequences(20), 2.0**-14),
        (np.random.default_rng(3).integers(0, 400, (2, 384)).astype(np.int32), 2.0**-14),
    ],
    ids=["sequences", "candidates", "anything"],
)
@pytest.mark.parametrize(("positions", "buckets"), [(500, TIME_BUCKETS), (60, 9), (1, 1)])
def test_table_gradients(key_position, unit, positions, buckets):
    """Every pair of a sequence, in either order; where integers are added, rounding grows as a random walk."""
    rng = np.random.default_rng(0)
    times = rng.choice([0, 1, 30, 5000, 10**6], (2, 384)).cumsum(1).astype(np.int32)
    times[1, 200:] -= np.int32(2**30)
    marks = lists.Marks(key_position, times, key_position, times - np.int32(7))
    tiles = np.stack(np.meshgrid(range(3), range(6), indexing="ij"), -1).reshape(1, 18, 2).repeat(2, 0).astype(np.int32)
    tiles[1, -4:, 0] = -1
    first = np.arange(384) < 170
    together = (first[:, None] == first).reshape(3, 128, 6, 64).swapaxes(1, 2).reshape(18, 128, 64)
    d_bias = np.where(together, rng.normal(size=(2, 18, lists.OUTER, lists.NARROW)), 0).astype(np.float32)
    d_bias[1, -4:] = np.nan  # no tile there: never written
    tables = tables_of.Tables(jnp.zeros(2 * positions - 1), jnp.zeros(buckets))
    got = jax.jit(tables_of.table_gradients)(marks, tiles, tables, d_bias)
    want = dense_table_gradients(marks, tiles, d_bias, positions, buckets)
    pairs = dense_table_gradients(marks, tiles, np.broadcast_to(together, d_bias.shape), positions, buckets)[0]
    rounding = unit * np.abs(d_bias[:1]).max() / np.sqrt(12) * np.sqrt(pairs)
    assert (np.abs(got.position - want[0]) <= 2e-4 + 5 * rounding).all()
    np.testing.assert_allclose(got.time, want[1], rtol=0, atol=1e-3)


def test_pairs_looked_up_one_by_one_add_up_in_any_order():
    """Bit for bit the same when queries change places inside their tile."""
    rng = np.random.default_rng(0)
    d_bias = rng.normal(size=(1, 3, lists.OUTER, lists.NARROW)).astype(np.float32)
    position = rng.integers(0, 99, (2, 128)).astype(np.int32)
    tiles = np.array([[[0, 0], [0, 1], [0, 1]]], np.int32)

    def gradient(order):
        marks = lists.Marks(position[:1, order], None, position[1:], None)
        return jax.jit(tables_of._one_by_one)(marks, tiles, jnp.zeros(2 * 60 - 1), d_bias[:, :, order])

    np.testing.assert_array_equal(gradient(np.arange(128)), gradient(rng.permutation(128)))


NUMBERS = {
    "biases, targets, two heads, features of unlike width": (
        Case("targets", (3, 0, 135, 9), targets=(1, 0, 7, 9), tail=3),
        {"position": True, "time": True, "heads": 2, "dqk": 40, "dv": 64},
    ),
    "full tiles, a window, a context prefix": (
        Case("window", (290, 11), window=200, context_len=6, tail=1),
        {"position": False, "time": False, "heads": 1, "dqk": 64, "dv": 64},
    ),
    "256 features: a kernel for each gradient of the keys": (
        Case("wide", (70, 20)),
        {"position": False, "time": True, "heads": 1, "dqk": 256, "dv": 256},
    ),
}


@pytest.mark.parametrize(("case", "options"), NUMBERS.values(), ids=NUMBERS)
def test_error_is_bounded_by_the_dense_formula(case, options, interpreter):
    """At most twice (outputs) and five times (gradients) its error; padding holds NaN."""
    found = error_ratios(case, jnp.bfloat16, functools.partial(attend_each, implementation="mosaic_gpu"), **options)
    for ratio, allowed in zip(found, (2, 5, 5, 5, 5, 5)):
        assert ratio <= allowed, found


def test_rows_and_batched_calls_equal_their_parts(interpreter):
    """Two padded rows with a time bias each, mapped over a scale; NaN in padding, exact zeros out of it."""
    rng = np.random.default_rng(0)
    lengths = jnp.array([20, 9])
    real = np.arange(24)[:, None, None] < np.asarray(lengths)[:, None, None, None]
    q, k, v = (jnp.asarray(np.where(real, rng.normal(size=(2, 24, 1, 64)), np.nan), jnp.bfloat16) for _ in range(3))
    table = jnp.asarray(rng.normal(size=TIME_BUCKETS), jnp.float32)
    times = jnp.asarray(rng.integers(0, 10**6, (2, 24)), jnp.int32)

    def call(scale, rows):
        return hstu_attention_padded(
            scale * q[rows],
            k[rows],
            v[rows],
            lengths[rows],
            max_len=MAX_LEN,
            time_bias=table,
            timestamps=times[rows],
            implementation="mosaic_gpu",
        )

    scales = jnp.asarray([1, 2], jnp.bfloat16)
    everything = np.asarray(jax.jit(jax.vmap(lambda scale: call(scale, slice(None))))(scales), np.float32)
    alone = np.asarray(jax.jit(lambda: call(scales[1], slice(1, 2)))(), np.float32)
    np.testing.assert_array_equal(everything[1, 1], alone[0])
    assert not everything[np.broadcast_to(~real, everything.shape)].any()
    assert np.abs(everything[0] - everything[1])[real[..., 0, 0]].max() > 0.1


def test_what_it_cannot_serve_falls_to_the_next():
    def call(features, dtype, implementation):
        x = jnp.ones((9, 1, features), dtype)
        offsets = jnp.array([0, 9])
        return jax.jit(lambda x: hstu_attention(x, x, x, offsets, max_len=1, implementation=implementation))(x)

    for features, dtype, reason in ((8, jnp.float32, "bfloat16"), (320, jnp.bfloat16, "320")):
        with pytest.raises(NotImplementedError, match=reason):
            call(features, dtype, "mosaic_gpu")
        np.testing.assert_array_equal(call(features, dtype, ("mosaic_gpu", "xla")), call(features, dtype, "xla"))


def cuda_kernels(f, *args):
    """Names of the Mosaic GPU kernels that ``f`` calls when lowered for CUDA; nothing is run."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text
    return set(re.findall(r"(hstu_\w+)_mosaic_gpu", text))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("features", [64, 128, 256])
def test_lowers_for_cuda(features, biased):
    """Forward and backward, on a length that is no multiple of anything."""
    length = 301
    x = jax.ShapeDtypeStruct((length, 2, features), jnp.bfloat16)
    tables = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (199, TIME_BUCKETS)] if biased else [None, None]
    offsets, times = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, length))

    def call(q, k, v, position, time, offsets, times):
        return hstu_attention(q, k, v, offsets, max_len=MAX_LEN, position_bias=position, time_bias=time,
                              timestamps=times, implementation="mosaic_gpu")  # fmt: skip

    def both(cotangent, q, k, v, position, time, offsets, times):
        out, pull = jax.vjp(lambda *x: call(*x, offsets, times), q, k, v, position, time)
        return out, pull(cotangent)

    keys = {"hstu_key_gradients_kv"} if features <= 128 else {"hstu_key_gradients_k", "hstu_key_gradients_v"}
    want = {"hstu_forward", "hstu_query_gradient", *keys} | ({"hstu_bias_gradient"} if biased else set())
    assert cuda_kernels(both, x, x, x, x, *tables, offsets, times) == want
    assert cuda_kernels(call, x, x, x, *tables, offsets, times) == {"hstu_forward"}


def test_lowers_under_scan_remat_vmap_and_shard_map(monkeypatch):
    """A vmapped loss over rows spread on two devices, one plan for the layers of a scan; biases in several waves."""
    monkeypatch.setattr(lists, "_HELD_TILES", 0)
    length = 700
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.ShapeDtypeStruct((2, 4, length, 1, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((TIME_BUCKETS,), jnp.float32)
    lengths, times = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, length)))

    def rows(x, table, lengths, times):
        tokens = padded_tokens(lengths, length, timestamps=times)
        shared = plan(tokens, buckets=TIME_BUCKETS, implementation="mosaic_gpu")

        def layer(x, _):
            return x + hstu_attention(x, x, x, shared, max_len=MAX_LEN, time_bias=table), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0]

    def loss(x, table, lengths, times):
        spread, shared = jax.P("data"), jax.P()
        call = jax.shard_map(rows, mesh=mesh, in_specs=(spread, shared, spread, spread), out_specs=spread)
        return jax.vmap(call, in_axes=(0, None, None, None))(x, table, lengths, times).astype(jnp.float32).sum()

    want = {"hstu_forward", "hstu_query_gradient", "hstu_key_gradients_kv", "hstu_bias_gradient"}
    assert cuda_kernels(jax.grad(loss, argnums=(0, 1)), x, table, lengths, times) == want
