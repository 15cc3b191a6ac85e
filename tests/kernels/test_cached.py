"""Cached attention: whatever is cached and whatever is new, the new tokens' rows are the full call's."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import (
    BACKENDS,
    TIME_BUCKETS,
    Tokens,
    hstu_attention,
    hstu_attention_cached,
    padded_tokens,
    scaled,
    split_tokens,
    widened,
)
from kernels_pallas.hstu_attention import cached as implementation_of

BACKEND = pytest.mark.parametrize("backend", ["reference", "xla"])
HEADS, DQK, DV, POSITIONS = 2, 4, 3, 12
SCALE = {"max_len": 23.0, "alpha": 0.6}

MASKS = {
    "plain": {},
    "window": {"window": 5},
    "semi-local": {"window": 4, "full_len": 6},
    "context": {"context_len": 3},
    "context-window": {"context_len": 3, "window": 5},
}
# (cached, further history, candidates) of each row, in the order of the test's name.
LAYOUTS = {
    "nothing cached": [(0, 6, 2), (0, 0, 3), (0, 1, 0)],
    "candidates": [(9, 0, 4), (30, 0, 4), (1, 0, 2), (17, 0, 0)],
    "append": [(9, 5, 0), (0, 7, 0), (21, 1, 0)],
    "both": [(11, 4, 3), (0, 0, 0), (40, 0, 5), (5, 9, 0)],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles, the last not full, from short rows."""
    monkeypatch.setattr(implementation_of, "_BLOCK", 8)


class Whole:
    """Whole rows of random tokens in float64, and their cut into cache and new tokens."""

    def __init__(self, layout, mask, *, seed=0, slots=None):
        rng = np.random.default_rng(seed)
        self.cached, history, targets = (np.array(part) for part in zip(*layout))
        lengths = self.cached + history + targets
        self.rows, self.longest = len(lengths), int(lengths.max())
        self.new = int((history + targets).max())
        self.slots = int(self.cached.max()) if slots is None else slots
        times = np.cumsum(rng.choice([0, 1, 50, 4000, 90000, 3000000], (self.rows, self.longest)), axis=1) + 10**9
        self.tokens = padded_tokens(
            jnp.asarray(lengths),
            self.longest,
            num_targets=jnp.asarray(targets),
            timestamps=jnp.asarray(times, jnp.int32),
            **mask,
        )
        self.q, self.k = (rng.normal(size=(self.rows, self.longest, HEADS, DQK)) for _ in range(2))
        self.v = rng.normal(size=(self.rows, self.longest, HEADS, DV))
        self.tables = {"position_bias": rng.normal(size=2 * POSITIONS - 1), "time_bias": rng.normal(size=TIME_BUCKETS)}

    def full(self):
        """The definition over whole rows, in float64."""
        with jax.enable_x64(True):
            arrays, tables = jax.tree.map(jnp.asarray, ((self.q, self.k, self.v), self.tables))
            return np.asarray(define(arrays, self.tokens, tables))

    def new_rows(self, x, fill=0.0):
        """[B, T, …] -> [B, M, …], ``fill`` where a row has no such token."""
        out = np.full((self.rows, self.new, *x.shape[2:]), fill)
        for b, (start, real) in enumerate(zip(self.cached, np.asarray(self.tokens.segment).sum(1))):
            out[b, : real - start] = x[b, start:real]
        return out

    def cache(self, x, fill=np.nan):
        """[B, T, …] -> [B, N, …], ``fill`` in unused slots."""
        out = np.full((self.rows, self.slots, *x.shape[2:]), fill)
        for b, used in enumerate(self.cached):
            out[b, :used] = x[b, :used]
        return out

    def call(self, backend, dtype=np.float32, cache_dtype=None, order=None, tables=None):
        """The cached call on what lies where; unused slots and padding hold NaN."""
        new, old = split_tokens(self.tokens, jnp.asarray(self.cached), self.slots, self.new)
        arrays = [jnp.asarray(self.new_rows(x, np.nan), dtype) for x in (self.q, self.k, self.v)]
        caches = [jnp.asarray(self.cache(x), cache_dtype or dtype) for x in (self.k, self.v)]
        if order is not None:
            arrays = [x[:, order] for x in arrays]
            new = jax.tree.map(lambda field: field[:, order], new)
        tables = self.tables if tables is None else tables
        tables = {name: jnp.asarray(table, np.float32) for name, table in tables.items()}
        return np.asarray(run(backend, arrays, new, caches, old, tables), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def run(backend, arrays, new, caches, old, tables):
    return hstu_attention_cached(*arrays, new, *caches, old, **SCALE, **tables, implementation=backend)


@jax.jit
def define(arrays, tokens, tables):
    return hstu_attention(*arrays, tokens, **SCALE, **tables, implementation="reference")


def assert_close(got, want, tolerance=3e-6):
    assert got.shape == want.shape
    assert np.abs(want).max() > 0
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@BACKEND
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_new_rows_are_the_full_calls(layout, mask, backend):
    """Ragged caches with NaN in unused slots and in padding; the padding's own rows are exact zeros."""
    whole = Whole(layout, mask)
    got, want = whole.call(backend), whole.new_rows(whole.full())
    assert_close(got, want)
    real = whole.new_rows(np.asarray(whole.tokens.segment)[..., None])[..., 0] > 0
    assert not got[~real].any()


@BACKEND
@pytest.mark.parametrize("names", [(), ("position_bias",), ("time_bias",)])
def test_each_bias_by_itself(names, backend):
    whole = Whole(LAYOUTS["both"], {"window": 7})
    tables = {name: whole.tables[name] for name in names}
    whole.tables = tables
    assert_close(whole.call(backend, tables=tables), whole.new_rows(whole.full()))


@BACKEND
@pytest.mark.parametrize("slots", [40, 41, 48, 67])
def test_unused_slots_change_nothing(slots, backend):
    """Also with a cache length that is no multiple of a block."""
    whole = Whole(LAYOUTS["both"], {}, slots=slots)
    assert_close(whole.call(backend), whole.new_rows(whole.full()))


@BACKEND
def test_unused_slots_may_lie_between_used_ones(backend):
    """A cache in pieces: a hole of five slots of NaN, whose attributes are garbage but for the segment."""
    whole = Whole([(20, 3, 2), (15, 0, 4)], {"window": 9, "context_len": 2})
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    place = np.concatenate([np.arange(10), np.full(5, -1), np.arange(10, 20)])
    hole = place < 0
    old = jax.tree.map(lambda field: jnp.where(hole, 10**6, field[:, np.maximum(place, 0)]), old)
    old = old._replace(segment=jnp.where(hole, 0, old.segment))
    caches = [np.where(hole[:, None, None], np.nan, whole.cache(x)[:, place]) for x in (whole.k, whole.v)]
    arrays = [whole.new_rows(x) for x in (whole.q, whole.k, whole.v)]
    arrays, caches, tables = jax.tree.map(lambda x: jnp.asarray(x, np.float32), (arrays, caches, whole.tables))
    assert_close(np.asarray(run(backend, arrays, new, caches, old, tables)), whole.new_rows(whole.full()))


@BACKEND
def test_new_tokens_see_none_after_themselves(backend):
    """Two events shown together, interleaved: a later token may have a smaller order. Optional fields are left out."""
    whole = Whole([(9, 12, 0), (20, 9, 0)], {})
    segment, order, asked, seen = whole.tokens[:4]
    whole.tokens = Tokens(segment, 4 * (order // 4) + order % 2, asked, seen)
    assert_close(whole.call(backend), whole.new_rows(whole.full()))


@BACKEND
def test_permuting_candidates(backend):
    whole = Whole([(9, 0, 11), (25, 0, 11)], {"window": 6})
    order = np.random.default_rng(3).permutation(11)
    assert_close(whole.call(backend, order=order), whole.call(backend)[:, order])


@BACKEND
@pytest.mark.parametrize("mask", [{}, {"window": 5}], ids=["plain", "window"])
@pytest.mark.parametrize("kind", ["candidates", "append"])
def test_one_at_a_time_is_all_at_once(kind, mask, backend):
    """Candidates leave the cache as it is; appended events enter it."""
    layout = [(9, 0, 6), (20, 0, 6)] if kind == "candidates" else [(9, 6, 0), (20, 6, 0)]
    whole = Whole(layout, mask, slots=27)
    want = whole.call(backend)
    arrays = [jnp.asarray(whole.new_rows(x), np.float32) for x in (whole.q, whole.k, whole.v)]
    tables = {name: jnp.asarray(table, np.float32) for name, table in whole.tables.items()}
    new, _ = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    for step in range(6):
        _, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, 0)
        caches = [jnp.asarray(whole.cache(x), np.float32) for x in (whole.k, whole.v)]
        here = slice(step, step + 1)
        one = jax.tree.map(operator.itemgetter((slice(None), here)), (arrays, new))
        assert_close(np.asarray(run(backend, *one, caches, old, tables), np.float64), want[:, here])
        whole.cached = whole.cached + (kind == "append")


@pytest.mark.parametrize("query_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_cache_keeps_the_error_rule(query_dtype):
    """At most twice the error of the definition computed in bfloat16, on the rounded numbers."""
    whole = Whole([(90, 3, 20), (61, 0, 23)], {"window": 70})
    for name in ("q", "k", "v"):
        setattr(whole, name, np.asarray(jnp.asarray(getattr(whole, name), jnp.bfloat16), np.float64))
    whole.tables = {name: np.asarray(table, np.float32) for name, table in whole.tables.items()}
    want = whole.new_rows(whole.full())
    error = np.abs(whole.call("xla", query_dtype, jnp.bfloat16) - want).max()
    plain = np.abs(whole.new_rows(plain_bfloat16(whole)) - want).max()
    assert 0 < error <= 2 * plain


def plain_bfloat16(whole):
    """Dense attention over whole rows with every array in bfloat16."""
    from kernels_pallas.hstu_attention.reference import relative_bias
    from kernels_pallas.hstu_attention.tokens import visible

    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (whole.q, whole.k, whole.v))
    scores = jnp.bfloat16(SCALE["alpha"]) * jnp.einsum("bihd,bjhd->bhij", q, k)
    tables = (jnp.asarray(whole.tables[name], jnp.bfloat16) for name in ("position_bias", "time_bias"))
    scores += relative_bias(whole.tokens, *tables, jnp.bfloat16)[:, None]
    weights = jnp.where(visible(whole.tokens)[:, None], jax.nn.silu(scores), 0) / jnp.bfloat16(SCALE["max_len"])
    return np.asarray(jnp.einsum("bhij,bjhd->bihd", weights, v), np.float64)


@BACKEND
def test_cache_in_eight_bits(backend):
    """Every number is off by at most half a step of its vector's scale, and the call reads just these numbers."""
    whole = Whole(LAYOUTS["both"], {"window": 7})
    for name in ("k", "v"):
        x = getattr(whole, name)
        kept = scaled(jnp.asarray(x, jnp.float32))
        assert kept.values.dtype == jnp.int8
        wide = np.asarray(widened(kept, jnp.float32), np.float64)
        assert np.abs(wide - x).max() > 0
        assert (np.abs(wide - x) <= 0.5001 * np.abs(x).max(-1, keepdims=True) / 127).all()
        setattr(whole, name, wide)
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    arrays = [jnp.asarray(whole.new_rows(x, np.nan), jnp.float32) for x in (whole.q, whole.k, whole.v)]
    caches = [scaled(jnp.asarray(whole.cache(x, 0.0), jnp.float32)) for x in (whole.k, whole.v)]
    caches = [kept._replace(scale=jnp.where(old.segment[..., None, None] > 0, kept.scale, jnp.nan)) for kept in caches]
    tables = {name: jnp.asarray(table, np.float32) for name, table in whole.tables.items()}
    assert_close(np.asarray(run(backend, arrays, new, caches, old, tables), np.float64), whole.new_rows(whole.full()))


def test_a_vector_of_zeros_stays_zeros():
    assert not np.asarray(widened(scaled(jnp.zeros((2, 4))), jnp.float32)).any()


@pytest.mark.parametrize("promised", [False, True])
def test_candidates_of_one_request_share_their_bias(promised):
    """The promise changes nothing where it holds; rows of fewer candidates end in padding."""
    whole = Whole([(9, 0, 11), (0, 0, 3), (30, 0, 9)], {})
    tokens, history = whole.tokens, whole.cached[:, None]
    shown = np.arange(whole.longest) >= history
    last = np.take_along_axis(np.asarray(tokens.query_time), history, axis=1)
    whole.tokens = tokens._replace(query_time=jnp.where(shown, last, tokens.query_time))
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    arrays = [jnp.asarray(whole.new_rows(x, np.nan), jnp.float32) for x in (whole.q, whole.k, whole.v)]
    caches = [jnp.asarray(whole.cache(x), jnp.float32) for x in (whole.k, whole.v)]
    tables = {name: jnp.asarray(table, np.float32) for name, table in whole.tables.items()}
    call = functools.partial(hstu_attention_cached, **SCALE, **tables, one_request=promised, implementation="xla")
    assert_close(np.asarray(jax.jit(call)(*arrays, new, *caches, old), np.float64), whole.new_rows(whole.full()))


def test_tiles_nobody_sees_cost_nothing():
    """A window over a long cache touches few tiles: NaN in the keys outside it would show even through a mask."""
    whole = Whole([(200, 0, 3)], {"window": 5})
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    arrays = [jnp.asarray(whole.new_rows(x), np.float32) for x in (whole.q, whole.k, whole.v)]
    caches = [whole.cache(x) for x in (whole.k, whole.v)]
    for cache in caches:
        cache[:, : 200 - 16] = np.inf
    caches = [jnp.asarray(cache, np.float32) for cache in caches]
    got = run("xla", arrays, new, caches, old, jax.tree.map(lambda x: jnp.asarray(x, np.float32), whole.tables))
    assert_close(np.asarray(got), whole.new_rows(whole.full()))


def test_under_vmap_and_scan():
    whole = Whole(LAYOUTS["both"], {})
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    arrays = [jnp.asarray(whole.new_rows(x), np.float32) for x in (whole.q, whole.k, whole.v)]
    caches = [jnp.asarray(whole.cache(x), np.float32) for x in (whole.k, whole.v)]
    tables = {name: jnp.asarray(table, np.float32) for name, table in whole.tables.items()}
    want = whole.call("xla")

    def one(q):
        return run("xla", [q, *arrays[1:]], new, caches, old, tables)

    both = jnp.stack([arrays[0], 2 * arrays[0]])
    np.testing.assert_allclose(jax.vmap(one)(both)[0], want, atol=1e-6)
    np.testing.assert_allclose(jax.lax.scan(lambda c, q: (c, one(q)), 0, both)[1][0], want, atol=1e-6)


def test_memory_is_a_few_tiles(monkeypatch):
    """Temporary memory of the compiled call does not grow with the cache."""
    monkeypatch.setattr(implementation_of, "_BLOCK", 64)
    needed = []
    for slots in (4096, 16384):
        shapes = [(1, 64, HEADS, DQK), (1, 64, HEADS, DQK), (1, 64, HEADS, DV)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        caches = [jax.ShapeDtypeStruct((1, slots, HEADS, width), jnp.float32) for width in (DQK, DV)]
        new, old = (
            padded_tokens(jnp.array([size]), size, timestamps=jnp.zeros((1, size), jnp.int32)) for size in (64, slots)
        )
        tables = {"time_bias": jax.ShapeDtypeStruct((TIME_BUCKETS,), jnp.float32)}
        lowered = jax.jit(functools.partial(run, "xla")).lower(arrays, new, caches, old, tables)
        needed.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    # Attributes are a few integers a slot; a score of each pair would be 64 * 2 * 4 bytes a slot.
    assert needed[1] - needed[0] < (16384 - 4096) * 100


@BACKEND
def test_it_says_that_it_has_no_derivative(backend):
    whole = Whole(LAYOUTS["candidates"], {})
    new, old = split_tokens(whole.tokens, jnp.asarray(whole.cached), whole.slots, whole.new)
    q, k, v = (jnp.asarray(whole.new_rows(x), np.float32) for x in (whole.q, whole.k, whole.v))
    caches = [jnp.asarray(whole.cache(x), np.float32) for x in (whole.k, whole.v)]
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda q: run(backend, [q, k, v], new, caches, old, {}).sum())(q)


def test_empty_calls():
    whole = Whole([(3, 0, 0), (0, 0, 0)], {})
    assert whole.call("xla").shape == (2, 0, HEADS, DV)


def test_backends_that_cannot_give_their_reason(monkeypatch):
    whole = Whole(LAYOUTS["candidates"], {})
    monkeypatch.setitem(BACKENDS, "other", "not.imported")
    with pytest.raises(NotImplementedError, match="other: has no cached attention"):
        whole.call("other")
    assert_close(whole.call(("other", "xla")), whole.call("reference"))
    assert_close(whole.call(None), whole.call("reference"))
    with pytest.raises(ValueError, match="unknown implementation"):
        whole.call("nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (2, 3, 2, 5)}, "expected q and k"),
        ({"cached_k": (2, 7, 2, 5)}, "differ in more than their number"),
        ({"cached_v": (2, 6, 2, 3)}, "expected a cache"),
        ({"cached_k": (3, 7, 2, 4), "cached_v": (3, 7, 2, 3)}, "differ in more than their number"),
        ({"tokens": 4}, "token fields must have shape"),
        ({"max_len": 0.0}, "max_len must be positive"),
        ({"position_bias": (4,)}, "odd length"),
        ({"time_bias": (0,)}, "non-empty vector"),
    ],
)
def test_arguments_that_do_not_fit(change, words):
    shapes = {
        "q": (2, 3, 2, 4),
        "k": (2, 3, 2, 4),
        "v": (2, 3, 2, 3),
        "cached_k": (2, 7, 2, 4),
        "cached_v": (2, 7, 2, 3),
    }
    arguments = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    arguments |= {"tokens": padded_tokens(jnp.array([3, 3]), 3), "cached_tokens": padded_tokens(jnp.array([7, 7]), 7)}
    arguments["max_len"] = 1.0
    for name, value in change.items():
        arguments[name] = jnp.zeros(value) if isinstance(value, tuple) else value
    if change.get("tokens"):
        arguments["tokens"] = padded_tokens(jnp.array([4, 4]), 4)
    with pytest.raises(ValueError, match=words):
        hstu_attention_cached(**arguments)
