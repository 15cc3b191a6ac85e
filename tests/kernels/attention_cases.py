"""Jagged batches, and HSTU attention on them written out in numpy float64: the oracle of every backend.

Nothing here knows how the kernels describe a mask: the oracle follows the public reference's rule on the ids of the
positions of one sequence (Meta's generative-recommenders, attention kernels), sequence by sequence.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.hstu_attention import TIME_BUCKETS, hstu_attention, jagged_tokens, visible

ALPHA, MAX_LEN = 0.6, 7.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. lengths: of the sequences, targets included. tail: rows after the last sequence that are padding."""

    name: str
    lengths: tuple[int, ...]
    targets: tuple[int, ...] | None = None
    window: int = 0
    full_len: int = 0
    context_len: int = 0
    tail: int = 0
    equal_times: bool = False

    @property
    def offsets(self):
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @property
    def total(self):
        return int(sum(self.lengths)) + self.tail

    def mask_options(self):
        """The keyword arguments of `hstu_attention` that say what may look at what."""
        targets = None if self.targets is None else jnp.asarray(self.targets, jnp.int32)
        return {
            "num_targets": targets,
            "window": self.window,
            "full_len": self.full_len,
            "context_len": self.context_len,
        }

    def times(self, seed=0):
        """int32 [total] seconds, rising inside a sequence by gaps from nothing to a month."""
        rng = np.random.default_rng(seed)
        gaps = rng.choice([0, 1, 50, 4000, 90_000, 3_000_000], self.total)
        times = np.zeros(self.total, np.int64)
        for b, (start, n) in enumerate(zip(self.offsets, self.lengths)):
            span = slice(start, start + n)
            times[span] = 10**9 if self.equal_times else 10**9 + np.cumsum(gaps[span])
            if self.targets and self.targets[b]:
                times[start + n - self.targets[b] : start + n] = times[start + n - self.targets[b]]
        return times.astype(np.int32)


def cases(block):
    """What every backend must get right, around the size of its blocks."""
    mix = (3, 0, 2 * block + 7, 17, 1, block)
    candidates = (1, 0, 9, 17, 1, block - 3)
    long = 2 * block + 30
    return [
        Case("none", (0, 0), tail=5),
        Case("edges", (0, 1, block - 1, block, block + 1)),
        Case("mix", mix, tail=3),
        Case("targets", mix, targets=candidates),
        Case("targets alone", (5, block + 4, 1), targets=(5, block + 4, 1)),
        Case("window", (long, 9), window=13),
        Case("semi-local", (long, 40), targets=(6, 3), window=9, full_len=20),
        Case("context", (long, 40, 2), targets=(8, 0, 0), context_len=5),
        Case("context window", (long, 3, 40), window=17, context_len=6, tail=1),
        Case("equal times", (block + 9,), equal_times=True),
    ]


def sequence_mask(case, b):
    """[n, n] bool for sequence b, by the reference's rule on ids."""
    n, targets = case.lengths[b], case.targets[b] if case.targets else 0
    ids, steps = np.arange(n), n
    if case.context_len:
        ids, steps = np.maximum(ids - case.context_len + 1, 0), n - case.context_len + 1
    if targets:
        steps -= targets
        ids = np.minimum(ids, steps)
    apart = ids[:, None] - ids[None, :]
    allowed = np.eye(n, dtype=bool) | (apart > 0)
    if case.window:
        near = apart <= case.window
        if case.full_len:
            near |= ids[:, None] >= steps - case.full_len
        allowed &= near
    if case.context_len:
        allowed |= (ids[:, None] == 0) & (ids[None, :] < steps)
    return allowed


def sequence_places(case, b, times, reach):
    """For sequence b of n tokens: index of each pair into the position table and into the time table, [n, n] each."""
    n, start = case.lengths[b], case.offsets[b]
    targets = case.targets[b] if case.targets else 0
    place = np.minimum(np.arange(n), n - targets)
    key_time = times[start : start + n].astype(np.int64)
    query_time = key_time.copy()
    for i in range(n - 1):
        if i < n - targets:
            query_time[i] = key_time[i + 1]
    apart = np.abs(query_time[:, None] - key_time[None, :])
    bucket = np.clip(np.floor(np.log(np.maximum(apart, 1)) / 0.301), 0, TIME_BUCKETS - 1).astype(int)
    return np.clip(place[None, :] - place[:, None], -reach, reach) + reach, bucket


def make_inputs(case, *, heads=2, dqk=8, dv=8, positions=40, seed=1, scale=1.0):
    """q, k, v, cotangent, position table and time table in float64; padding holds NaN."""
    rng = np.random.default_rng(seed)
    shapes = [(case.total, heads, dqk), (case.total, heads, dqk), (case.total, heads, dv), (case.total, heads, dv)]
    arrays = [scale * rng.normal(size=shape) for shape in shapes]
    for x in arrays:
        x[case.offsets[-1] :] = np.nan
    return [*arrays, rng.normal(size=2 * positions - 1), rng.normal(size=TIME_BUCKETS)]


def oracle(case, inputs, *, position=True, time=True, times=None):
    """[out, dq, dk, dv] and the gradients of the tables in use, in float64; padding rows are zero."""
    q, k, v, cotangent, position_table, time_table = (np.asarray(x, np.float64) for x in inputs)
    times = case.times() if times is None else times
    out, dq, dk, dv = (np.zeros_like(x) for x in (v, q, k, v))
    d_position, d_time = np.zeros_like(position_table), np.zeros_like(time_table)
    for b, (start, n) in enumerate(zip(case.offsets, case.lengths)):
        rows = slice(start, start + n)
        place, bucket = sequence_places(case, b, times, (len(position_table) - 1) // 2)
        bias = position * position_table[place] + time * time_table[bucket]
        mask = sequence_mask(case, b)
        for h in range(q.shape[1]):
            scores = ALPHA * q[rows, h] @ k[rows, h].T + bias
            sigmoid = 1 / (1 + np.exp(-scores))
            weights = np.where(mask, scores * sigmoid, 0) / MAX_LEN
            out[rows, h] = weights @ v[rows, h]
            dv[rows, h] = weights.T @ cotangent[rows, h]
            upstream = cotangent[rows, h] @ v[rows, h].T / MAX_LEN
            d_scores = np.where(mask, upstream * sigmoid * (1 + scores * (1 - sigmoid)), 0)
            dq[rows, h] = ALPHA * d_scores @ k[rows, h]
            dk[rows, h] = ALPHA * d_scores.T @ q[rows, h]
            np.add.at(d_position, place, d_scores)
            np.add.at(d_time, bucket, d_scores)
    return [out, dq, dk, dv, *([d_position] if position else []), *([d_time] if time else [])]


def attend_each(case, draws, *, position=True, time=True, times=None, implementation=None):
    """The same list for each draw of inputs from `hstu_attention`, compiled; the inputs' dtype is the computation's."""
    names = [name for name, used in (("position_bias", position), ("time_bias", time)) if used]
    stamps = jnp.asarray(case.times() if times is None else times)

    @jax.jit
    def run(q, k, v, cotangent, tables):
        def call(q, k, v, tables):
            return hstu_attention(
                q,
                k,
                v,
                jnp.asarray(case.offsets),
                max_len=MAX_LEN,
                alpha=ALPHA,
                timestamps=stamps,
                implementation=implementation,
                **case.mask_options(),
                **dict(zip(names, tables)),
            )

        out, pull = jax.vjp(call, q, k, v, tables)
        dq, dk, dv, d_tables = pull(cotangent)
        return [out, dq, dk, dv, *d_tables]

    def draw(inputs):
        *arrays, position_table, time_table = (jnp.asarray(x) for x in inputs)
        return run(*arrays, [position_table] * position + [time_table] * time)

    return [draw(inputs) for inputs in draws]


def plain(case, draws, dtype, *, position=True, time=True):
    """The same lists, one per draw of inputs, from the dense formula with every array in ``dtype``: the yardstick."""
    mask = visible(jagged_tokens(jnp.asarray(case.offsets), case.total, **case.mask_options()))[0]
    place, bucket = (np.zeros((case.total, case.total), int) for _ in range(2))
    for b, (start, n) in enumerate(zip(case.offsets, case.lengths)):
        rows = slice(start, start + n)
        place[rows, rows], bucket[rows, rows] = sequence_places(case, b, case.times(), (len(draws[0][4]) - 1) // 2)

    @jax.jit
    def run(q, k, v, cotangent, *tables):
        def call(q, k, v, *tables):
            scores = ALPHA * jnp.einsum("ihd,jhd->hij", q, k)
            scores += (position * tables[0][place] + time * tables[1][bucket]).astype(dtype)
            weights = jnp.where(mask, jax.nn.silu(scores), 0) / MAX_LEN
            return jnp.einsum("hij,jhd->ihd", weights.astype(dtype), v).astype(dtype)

        out, pull = jax.vjp(call, q, k, v, *tables)
        *d_qkv, d_position, d_time = pull(cotangent)
        return [out, *d_qkv, *([d_position] if position else []), *([d_time] if time else [])]

    return [run(*(jnp.nan_to_num(x) for x in draw)) for draw in draws]


def in_series(case, inputs, *, position=True, time=True):
    """Outputs [T, H, Dv] of the dense formula in float32, every sum taken one term after another."""
    q, k, v, _, position_table, time_table = (np.nan_to_num(np.asarray(x, np.float32)) for x in inputs)
    out = np.zeros(v.shape)
    for b, (start, n) in enumerate(zip(case.offsets, case.lengths)):
        if not n:
            continue
        rows = slice(start, start + n)
        place, bucket = sequence_places(case, b, case.times(), (len(position_table) - 1) // 2)
        bias = position * position_table[place] + time * time_table[bucket]
        for h in range(q.shape[1]):
            products = np.cumsum(q[rows, h][:, None] * k[rows, h][None], axis=-1, dtype=np.float32)[..., -1]
            scores = np.float32(ALPHA) * products + bias
            weights = np.where(sequence_mask(case, b), scores / (1 + np.exp(-scores)), 0) / np.float32(MAX_LEN)
            out[rows, h] = np.cumsum(weights[:, :, None] * v[rows, h][None], axis=1, dtype=np.float32)[:, -1]
    return out


def error_ratios(case, dtype, attend_each, *, position=True, time=True, **shape):
    """Error of a backend over that of the dense formula in the same precision, for each of `oracle`'s arrays.

    ``attend_each`` calls the backend, as `attend_each` does. Errors are measured against float64 on the rounded inputs,
    in units of the largest entry; each side's is its largest of four draws, and the dense formula's at least one unit
    in the last place: on few numbers it can be exact by luck. In float32, outputs are also held against the formula
    with its sums taken term after term, as some compilers do for some shapes and not for others.
    """
    options = {"position": position, "time": time}

    def draw(seed):
        exact = make_inputs(case, seed=seed, **shape)
        return [*(jnp.asarray(x, dtype) for x in exact[:4]), *(jnp.asarray(x, jnp.float32) for x in exact[4:])]

    draws = [draw(seed) for seed in range(1, 5)]
    want = [oracle(case, inputs, **options) for inputs in draws]

    def worst(found):
        errors = [[relative_error(g, w) for g, w in zip(*pair, strict=True)] for pair in zip(found, want, strict=True)]
        return np.max(errors, axis=0)

    yard = np.maximum(worst(plain(case, draws, dtype, **options)), float(jnp.finfo(dtype).eps))
    if dtype == jnp.float32:
        serial = [relative_error(in_series(case, inputs, **options), w[0]) for inputs, w in zip(draws, want)]
        yard[0] = max(yard[0], *serial)
    return worst(attend_each(case, draws, **options)) / yard


def relative_error(got, want):
    """Largest error over the largest entry of ``want``; NaN counts as infinitely wrong."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    wrong, size = np.abs(got - want).max(initial=0.0), np.abs(want).max(initial=0.0)
    if math.isnan(wrong):
        return math.inf
    return wrong / size if size else math.inf if wrong else 0.0
