"""What every backend of HSTU attention must do; one subclass per backend says how to reach it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import (
    TIME_BUCKETS,
    Columns,
    hstu_attention,
    hstu_attention_padded,
    jagged_tokens,
    plan,
)
from kernels_pallas.hstu_attention.buckets import bucket_formula, thresholds
from tests.kernels.attention_cases import (
    ALPHA,
    MAX_LEN,
    Case,
    attend_each,
    cases,
    error_ratios,
    make_inputs,
    oracle,
    relative_error,
)

GOLDEN = pathlib.Path(__file__).resolve().parents[3] / "shared" / "golden"
RECORDED = ("causal", "targets", "window", "context", "context_window")
BIASES = pytest.mark.parametrize(("position", "time"), [(False, False), (True, True), (True, False), (False, True)])


def assert_close(got, want, tolerance):
    """Largest error relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0.0) <= tolerance * np.abs(want).max(initial=0.0)


def float32(inputs):
    return [jnp.asarray(x, jnp.float32) for x in inputs]


class Float64Suite:
    """For backends that compute in float64 too: the oracle's numbers, to rounding."""

    @pytest.mark.parametrize("name", [case.name for case in cases(64)])
    def test_float64_is_the_oracle(self, name):
        case = self.case(name)
        inputs = make_inputs(case, **self.shape())
        with jax.enable_x64(True):
            got = self.attend(case, inputs)
        for g, w in zip(got, oracle(case, inputs), strict=True):
            assert g.dtype == np.float64
            assert relative_error(g, np.nan_to_num(w)) <= 1e-13


class HSTUSuite:
    """Subclass with ``implementation``; ``block`` is the tile the cases straddle, ``dtypes`` what it computes in."""

    implementation: str
    block = 64
    dtypes = (jnp.float32, jnp.bfloat16)
    heads, dqk, dv = 2, 8, 12
    check_vma = True  # whether shard_map may check how values vary over the mesh
    case_names = tuple(case.name for case in cases(64))

    def shape(self):
        return {"heads": self.heads, "dqk": self.dqk, "dv": self.dv}

    def attend_each(self, case, draws, **options):
        """`attention_cases.attend_each` with the backend; a subclass may reach it in another way."""
        return attend_each(case, draws, implementation=self.implementation, **options)

    def attend(self, case, inputs, **options):
        """The results of one draw."""
        return self.attend_each(case, [inputs], **options)[0]

    def case(self, name):
        return next(case for case in cases(self.block) if case.name == name)

    @pytest.mark.parametrize("name", case_names)
    def test_float32_error_is_bounded_by_the_dense_formula(self, name):
        self.check_errors(name, jnp.float32, position=True, time=True)

    @pytest.mark.parametrize("name", case_names)
    def test_bfloat16_error_is_bounded_by_the_dense_formula(self, name):
        self.check_errors(name, jnp.bfloat16, position=False, time=False)

    @BIASES
    def test_each_table_alone(self, position, time):
        for dtype in self.dtypes:
            self.check_errors("targets", dtype, position=position, time=time)

    def check_errors(self, name, dtype, *, position, time):
        """At most twice (outputs) and five times (gradients) the error of the dense formula in the same precision."""
        if dtype not in self.dtypes:
            pytest.skip(f"{self.implementation} does not compute in {jnp.dtype(dtype).name}")
        found = error_ratios(self.case(name), dtype, self.attend_each, position=position, time=time, **self.shape())
        for ratio, allowed in zip(found, (2, 5, 5, 5, 5, 5)):
            assert ratio <= allowed, (name, found)

    @pytest.mark.parametrize("name", RECORDED)
    def test_recorded_vectors(self, name):
        """Outputs and gradients of the public PyTorch reference, in float32."""
        path = GOLDEN / f"attention_{name}.npz"
        if not path.exists():
            pytest.skip(f"{path.name} is absent")
        data = np.load(path)
        meta = json.loads(str(data["meta"]))
        targets = jnp.asarray(data["num_targets"]) if "num_targets" in data.files else None

        def call(q, k, v):
            return hstu_attention(
                q,
                k,
                v,
                jnp.asarray(data["seq_offsets"]),
                max_len=meta["divisor"],
                alpha=meta["alpha"],
                num_targets=targets,
                window=meta.get("max_attn_len", 0),
                full_len=meta.get("min_full_attn_seq_len", 0),
                context_len=meta.get("contextual_seq_len", 0),
                implementation=self.implementation,
            )

        out, pull = jax.vjp(jax.jit(call), *(jnp.asarray(data[name]) for name in "qkv"))
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=2e-5)
        for got, want in zip(pull(jnp.asarray(data["dout"])), ("dq", "dk", "dv")):
            assert_close(got, data[want], 1e-4)

    def test_wide_heads(self):
        """Heads of 64 and 32: several lanes and registers, keys and values of unlike width."""
        found = error_ratios(Case("wide", (self.block + 5, 20)), self.dtypes[0], self.attend_each, dqk=64, dv=32)
        assert found[0] <= 2
        assert max(found[1:]) <= 5

    def test_buckets_at_every_threshold(self):
        """The score of a token for itself is the bias of the time until the next event, here one step off each edge."""
        edges = [int(edge) for edge in thresholds() if edge < 2**31]
        gaps = sorted({max(edge + step, 0) for edge in edges for step in (-1, 0, 1)} | {0, 2**31 - 1})
        times = np.array([[0, gap] for gap in gaps], np.int64).reshape(-1).astype(np.int32)
        offsets = jnp.arange(len(gaps) + 1) * 2
        table = jnp.asarray(np.random.default_rng(0).permutation(TIME_BUCKETS) / 16, jnp.float32)
        q = jnp.zeros((len(times), 1, 8), self.dtypes[0])
        v = jnp.ones_like(q).at[1::2].set(0)

        def total(table):
            out = hstu_attention(
                q,
                q,
                v,
                offsets,
                max_len=1,
                time_bias=table,
                timestamps=jnp.asarray(times),
                implementation=self.implementation,
            )
            return out[::2].astype(jnp.float32).sum() / 8, out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(table)
        buckets = np.array([bucket_formula(gap) for gap in gaps])
        score = np.asarray(table, np.float64)[buckets]
        np.testing.assert_allclose(
            np.asarray(out[::2, 0, 0], np.float64), score / (1 + np.exp(-score)), rtol=self.relative()
        )
        sigmoid = 1 / (1 + np.exp(-np.asarray(table, np.float64)))
        slope = sigmoid * (1 + np.asarray(table, np.float64) * (1 - sigmoid))
        want = np.bincount(buckets, minlength=TIME_BUCKETS) * slope
        np.testing.assert_allclose(gradient, want, rtol=self.relative(), atol=1e-6)

    def relative(self):
        return 8 * float(jnp.finfo(self.dtypes[0]).eps)

    def test_tables_are_differentiated(self):
        """Both tables' gradients along random directions against finite differences of the float64 oracle."""
        case = Case("small", (self.block // 2, 9, 4), targets=(3, 2, 4))
        inputs = make_inputs(case, positions=self.block, **self.shape())
        got = self.attend(case, float32(inputs))[4:]
        cotangent = inputs[3]
        for place, gradient in zip((4, 5), got):
            direction = np.random.default_rng(place).normal(size=inputs[place].shape)
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[place] = moved[place] + sign * 1e-5 * direction
                ends.append((oracle(case, moved)[0] * cotangent).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs(slope) > 1e-2
            assert abs(float((np.asarray(gradient, np.float64) * direction).sum()) - slope) < 1e-4 * max(1, abs(slope))

    def test_packed_equals_separate_equals_padded(self):
        case = Case("pack", (self.block + 3, 5, 30), targets=(4, 0, 7), window=self.block, context_len=3)
        inputs, times = float32(make_inputs(case, **self.shape())), case.times()
        together = self.attend(case, inputs)
        tables = {"position_bias": inputs[4], "time_bias": inputs[5]}
        longest = max(case.lengths) + 2
        padded = [jnp.full((3, longest, *x.shape[1:]), jnp.nan, x.dtype) for x in inputs[:3]]
        stamps = np.zeros((3, longest), np.int32)
        for b, (start, n) in enumerate(zip(case.offsets, case.lengths)):
            rows = slice(start, start + n)
            one = Case("one", (n,), targets=(case.targets[b],), window=case.window, context_len=case.context_len)
            alone = self.attend(one, [x[rows] for x in inputs[:4]] + inputs[4:], times=times[rows])
            for got, want in zip(together[:4], alone[:4]):
                assert_close(got[rows], want, 5e-6)
            padded = [p.at[b, :n].set(x[rows]) for p, x in zip(padded, inputs)]
            stamps[b, :n] = times[rows]
        spread = jax.jit(lambda q, k, v: hstu_attention_padded(
            q, k, v, jnp.asarray(case.lengths), max_len=MAX_LEN, alpha=ALPHA, timestamps=jnp.asarray(stamps),
            implementation=self.implementation, **case.mask_options(), **tables))(*padded)  # fmt: skip
        for b, (start, n) in enumerate(zip(case.offsets, case.lengths)):
            assert_close(spread[b, :n], together[0][start : start + n], 5e-6)
            assert not np.asarray(spread[b, n:]).any()

    def test_columns_of_one_array_equal_separate_arrays(self):
        case = self.case("targets")
        q, k, v, cotangent, *_ = make_inputs(case, **self.shape())
        parts = [jnp.asarray(x.reshape(case.total, -1), self.dtypes[0]) for x in (v, q, k)]
        wide = jnp.concatenate([jnp.full_like(parts[0][:, :5], jnp.nan), *parts], axis=1)

        def from_columns(wide):
            starts = np.cumsum([5, *(x.shape[1] for x in parts)])
            v, q, k = (
                Columns(wide, int(start), self.heads, width)
                for start, width in zip(starts, (self.dv, self.dqk, self.dqk))
            )
            return call(q, k, v)

        def from_arrays(wide):
            v, q, k = jnp.split(wide[:, 5:], np.cumsum([x.shape[1] for x in parts])[:2], axis=1)
            return call(*(x.reshape(case.total, self.heads, -1) for x in (q, k, v)))

        def call(q, k, v):
            options = case.mask_options() | {"max_len": MAX_LEN, "implementation": self.implementation}
            return hstu_attention(q, k, v, jnp.asarray(case.offsets), **options)

        out, pull = jax.vjp(jax.jit(from_columns), wide)
        want, want_pull = jax.vjp(jax.jit(from_arrays), wide)
        np.testing.assert_array_equal(out, want)
        gradient = jnp.asarray(cotangent, self.dtypes[0])
        np.testing.assert_array_equal(pull(gradient)[0], want_pull(gradient)[0])

    def test_permuting_candidates(self):
        """Outputs and gradients follow their candidates; neither history nor the other candidates notice."""
        case = Case("permuted", (self.block + 9,), targets=(9,))
        inputs = float32(make_inputs(case, **self.shape()))
        order = np.concatenate([np.arange(self.block), self.block + np.random.default_rng(5).permutation(9)])
        before = self.attend(case, inputs)
        after = self.attend(case, [x[order] for x in inputs[:4]] + inputs[4:])
        for got, want in zip(after[:4], before[:4]):
            assert_close(got, want[order], 3e-6)
        assert np.abs(np.asarray(after[0] - before[0])[self.block :]).max() > 1e-3
        for got, want in zip(after[4:], before[4:]):
            assert_close(got, want, 3e-6)

    def test_what_padding_holds_does_not_matter(self):
        """NaN or zeros in padding give the same bits, and exact zeros come out of it."""
        case = self.case("mix")
        nans = float32(make_inputs(case, **self.shape()))
        assert np.isnan(nans[0][-1]).all()
        zeros = [jnp.nan_to_num(x) for x in nans]
        poisoned = self.attend(case, nans)
        clean = self.attend(case, zeros)
        for got, want in zip(poisoned, clean):
            np.testing.assert_array_equal(got, want)
        for x in poisoned[:4]:
            assert not np.asarray(x)[case.offsets[-1] :].any()

    def test_runs_repeat_bit_for_bit(self):
        case = self.case("targets")
        inputs = float32(make_inputs(case, **self.shape()))
        first = self.attend(case, inputs)
        for _ in range(2):
            for got, want in zip(self.attend(case, inputs), first):
                np.testing.assert_array_equal(got, want)

    def test_every_argument_matters(self):
        case = Case("matters", (40,), targets=(4,))
        inputs = float32(make_inputs(case, **self.shape()))
        base = self.attend(case, inputs)[0]
        scaled = [[(2 + i) * x if i == j else x for j, x in enumerate(inputs)] for i in (0, 1, 2, 4, 5)]
        others = [self.attend(case, x)[0] for x in scaled]
        others.append(self.attend(case, inputs, times=case.times(seed=1))[0])
        for change in ({"window": 5}, {"window": 5, "full_len": 9}, {"context_len": 6}, {"targets": (7,)}):
            changed = Case("changed", (40,), **{"targets": (4,), **change})
            others.append(self.attend(changed, inputs, times=case.times())[0])
        results = [base, *others]
        for i, x in enumerate(results):
            for j, y in enumerate(results[:i]):
                assert np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-3, (i, j)

    def test_under_scan_remat_and_vmap(self):
        """One plan serves all layers of a scan under remat; a vmapped call equals its parts; gradients included."""
        case = Case("layers", (self.block + 10, 12))
        q, k, _, _, position, time = float32(make_inputs(case, heads=2, dqk=8, dv=8))
        tables = (jnp.stack([position, 2 * position]), jnp.stack([time, -time]))
        tokens = jagged_tokens(jnp.asarray(case.offsets), case.total, timestamps=jnp.asarray(case.times()))
        rows = [x[None] for x in (q, k)]

        def layer(x, tables, shared=tokens):
            bias = {"position_bias": tables[0], "time_bias": tables[1]}
            y = hstu_attention(x, rows[1], x, shared, max_len=MAX_LEN, implementation=self.implementation, **bias)
            return x + y

        def unrolled(x):
            for i in range(2):
                x = layer(x, (tables[0][i], tables[1][i]))
            return jnp.sum(jnp.sin(x))

        def scanned(x):
            shared = plan(tokens, positions=40, buckets=TIME_BUCKETS, implementation=self.implementation)
            body = jax.checkpoint(lambda x, tables: (layer(x, tables, shared), None))
            return jnp.sum(jnp.sin(jax.lax.scan(body, x, tables)[0]))

        want, got = (jax.jit(jax.value_and_grad(f))(rows[0]) for f in (unrolled, scanned))
        for g, w in zip(got, want):
            assert_close(g, w, 1e-5)

        def loss(scale):
            return jnp.sum(jnp.sin(layer(scale * rows[0], (scale * position, time))))

        scales = jnp.array([0.5, 2.0])
        mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(scales)
        for i in range(2):
            for g, w in zip(mapped, jax.jit(jax.value_and_grad(loss))(scales[i])):
                assert_close(g[i], w, 1e-5)

    def test_under_shard_map(self):
        """Rows spread over two devices give what one device gives, gradients of the shared tables summed."""
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
        case = Case("spread", (30,))
        inputs = [float32(make_inputs(case, seed=seed, **self.shape())) for seed in (1, 2)]
        q, k, v, cotangent = (jnp.stack([x[i] for x in inputs]) for i in range(4))
        position, time = inputs[0][4:]
        lengths, stamps = jnp.array([30, 21]), jnp.stack([jnp.asarray(case.times())] * 2)

        def call(q, k, v, position, time, lengths, stamps):
            return hstu_attention_padded(q, k, v, lengths, max_len=MAX_LEN, position_bias=position, time_bias=time,
                                         timestamps=stamps, implementation=self.implementation)  # fmt: skip

        rows, shared = jax.P("data"), jax.P()
        spread = jax.shard_map(call, mesh=mesh, in_specs=(rows, rows, rows, shared, shared, rows, rows),
                               out_specs=rows, check_vma=self.check_vma)  # fmt: skip

        def loss(f):
            def total(q, k, v, position, time):
                return jnp.sum(f(q, k, v, position, time, lengths, stamps) * cotangent)

            return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4)))(q, k, v, position, time)

        (got, got_gradients), (want, want_gradients) = loss(spread), loss(call)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for g, w in zip(got_gradients, want_gradients):
            assert_close(g, w, 1e-5)
