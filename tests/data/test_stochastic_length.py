"""Stochastic Length and rows per user: the rule by hand, the draws by their statistics, the stream by its events."""

import dataclasses
import itertools
import json
from typing import get_args

import jax
import numpy as np
import pytest

from genrec_jax.batch import Shape
from genrec_jax.config import DataConfig, default_trial, override
from genrec_jax.data import rows as row_tables
from genrec_jax.data.packing import EMPTY, Assembler
from genrec_jax.data.passes import Passes
from genrec_jax.data.pipeline import TrainStream, evaluation_batches
from genrec_jax.data.rows import RowTable
from genrec_jax.data.splits import split_by_time, split_last
from genrec_jax.data.stochastic_length import StochasticLength, Subsequence
from genrec_jax.errors import UserError
from tests.data.helpers import dataset, owner, random_dataset
from tests.data.test_packing import everyone, leaves

CONFIG = DataConfig(
    history=16, candidates=2, segments=4, validation=0.1, test=0.1, stochastic_length=1.2, subsequence="uniform"
)
KINDS = ("requests", "prefixes", "windows", "users")


def histories(lengths):
    """One row of a user each, its history the given number of events and one target after it."""
    stop = np.cumsum(np.asarray(lengths) + 1) - 1
    start = stop - lengths
    users = np.arange(len(lengths), dtype=np.int32)
    return RowTable(users, start, stop, stop, stop + 1, supervised=True)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return random_dataset(tmp_path_factory.mktemp("data") / "d", users=60, longest=40, requests=True)


def stream_of(sequences, kind="windows", batch_rows=1, seed=0, **changes):
    return TrainStream(sequences, dataclasses.replace(CONFIG, **changes), kind, batch_rows, seed)


def one_pass(stream, epoch=0):
    """The batches of a pass: [packed rows, ...] each, from a stream of single rows."""
    first = int(stream.passes.rows(epoch))
    stream.set_state({**stream.get_state(), "batch": first})
    found = list(itertools.islice(stream, int(stream.passes.rows(epoch + 1)) - first))
    stream.close()
    return found


@pytest.mark.parametrize(
    ("alpha", "longest", "threshold"),
    [(1.6, 4096, 776), (1.6, 1024, 256), (1.6, 2048, 445), (1.2, 1024, 64), (1.5, 16, 8), (2.0, 200, 200)],
)
def test_threshold_by_hand(alpha, longest, threshold):
    assert StochasticLength(alpha, longest, "uniform", 0).threshold == threshold


def test_rule_by_hand():
    """N = 16, alpha = 1.5: L = 16^0.75 = 8, N^alpha = 64; a history of 10 stays whole with probability 0.64."""
    rule = StochasticLength(1.5, 16, "uniform", 0)
    lengths = np.array([0, 1, 8, 9, 10, 16])
    np.testing.assert_allclose(rule.whole(lengths), [1, 1, 1, 64 / 81, 0.64, 0.25])
    np.testing.assert_allclose(rule.expected(lengths), [0, 1, 8, 8 + 64 / 81, 8 + 2 * 0.64, 10])


def test_kept_lengths_have_the_expected_mean():
    rule = StochasticLength(1.5, 16, "uniform", 3)
    rows = histories(np.repeat([5, 9, 10, 16], 5000))
    kept = np.stack([rule.lengths(rows, epoch) for epoch in range(3)])
    assert set(np.unique(kept)) == {5, 8, 9, 10, 16}
    for length in (5, 9, 10, 16):
        mine = kept[:, rows.history_length == length]
        assert set(np.unique(mine)) <= {min(length, 8), length}
        # Four standard deviations of the mean of 15,000 coins.
        deviation = (length - 8) * 0.5 / 15000**0.5
        assert mine.mean() == pytest.approx(rule.expected(np.array([length]))[0], abs=max(4 * deviation, 1e-12))
    assert 0.3 < (kept[0] != kept[1])[rows.history_length == 16].mean() < 0.45  # 2 x 1/4 x 3/4 of independent coins


def test_alpha_two_keeps_everything(sequences):
    rule = StochasticLength(2.0, 16, "uniform", 0)
    rows = histories(np.arange(17))
    np.testing.assert_array_equal(rule.lengths(rows, 5), np.arange(17))
    table = row_tables.window_rows(split_by_time(sequences, 0.1, 0.1), everyone(sequences), 16, 2)
    assert (table.history_length > 0).any()
    plan = np.arange(len(table))[:, None]
    plain, ruled = (Assembler(sequences, table, Shape(16, 2), thin) for thin in (None, rule))
    for name, value in leaves(plain(plan)).items():
        np.testing.assert_array_equal(leaves(ruled(plan, 3))[name], value)


@pytest.mark.parametrize("subsequence", get_args(Subsequence))
def test_a_subsequence_is_in_order_and_inside(subsequence):
    rows = histories(np.array([9, 16, 12, 9]))
    rule = StochasticLength(1.5, 16, subsequence, 0)
    time = np.sort(np.random.default_rng(0).integers(0, 10**6, 60))
    places = rule.places(rows, 0, time)
    assert places.shape == (4, 8)
    assert (np.diff(places, axis=1) > 0).all()
    assert (places[:, 0] >= 0).all()
    assert (places[:, -1] < rows.history_length).all()
    np.testing.assert_array_equal(
        places[1:3], rule.places(rows.take(np.array([1, 2])), 0, time)
    )  # whoever else is there
    if subsequence == "recent":
        np.testing.assert_array_equal(places, rows.history_length[:, None] - 8 + np.arange(8))


def inclusion(subsequence, time, n, rows=4000):
    """How often each of n events is among the two that are kept of one history, over many seeds."""
    rule = StochasticLength(1.01, 3, subsequence, 0)
    assert rule.threshold == 1
    table = histories(np.full(rows, n))
    places = rule.places(table, 0, np.tile(np.append(time, time[-1]), rows))
    return np.bincount(places[:, 0], minlength=n) / rows


def test_chances_by_hand():
    """One of three events is kept, so its chance is its weight over the sum of weights."""
    time = np.array([0, 600, 1000])  # elapsed 1000, 400, 0 of 1400
    np.testing.assert_allclose(inclusion("uniform", time, 3), [1 / 3] * 3, atol=0.03)
    np.testing.assert_allclose(inclusion("place", time, 3), [1 / 6, 2 / 6, 3 / 6], atol=0.03)
    np.testing.assert_allclose(inclusion("elapsed", time, 3), [4 / 28, 10 / 28, 14 / 28], atol=0.03)
    np.testing.assert_allclose(inclusion("elapsed", np.array([7, 7, 7]), 3), [1 / 3] * 3, atol=0.03)
    np.testing.assert_allclose(inclusion("elapsed", np.array([0, 7, 7]), 3), [0, 1 / 2, 1 / 2], atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_by_its_events(sequences, kind):
    """Every row once; thinned histories are ordered subsequences of the full one; targets and counts as accounted."""
    split = split_last(sequences) if kind == "users" else split_by_time(sequences, 0.1, 0.1)
    table = row_tables.training_rows(kind, sequences, split, everyone(sequences), 16, 2)
    full = {int(t): (int(a), int(b)) for t, a, b in zip(table.target_start, table.history_start, table.history_stop)}
    stream = stream_of(sequences, kind)
    limit = stream.passes.thinning.threshold
    assert limit == 5
    chosen = [_check_pass(stream, epoch, full, limit, kind) for epoch in (0, 1, 2)]
    for one, other in itertools.combinations(chosen, 2):
        both = [t for t in full if len(one[t]) == len(other[t]) == limit < full[t][1] - full[t][0]]
        assert len(both) > 20
        assert np.mean([one[t] != other[t] for t in both]) > 0.7


def _check_pass(stream, epoch, full, limit, kind):
    """The kept events of every row by its target; ``full``: its whole history (start, stop)."""
    chosen, supervised, squares = {}, 0, 0
    batches = one_pass(stream, epoch)
    for batch in batches:
        h, c = batch.history, batch.candidates
        supervised += int(h.supervised.sum()) + (0 if kind == "users" else int((c.segment > 0).sum()))
        for s in np.flatnonzero(batch.user[0] >= 0):
            target = int(c.item[0, 2 * s]) - 1  # items are events in this dataset
            kept = h.item[0][h.segment[0] == s + 1].astype(np.int64) - 1
            start, stop = full[target]
            assert (np.diff(kept) > 0).all()
            assert ((kept >= start) & (kept < stop)).all()
            assert len(kept) in (min(limit, stop - start), stop - start)
            assert target not in chosen
            chosen[target] = kept.tolist()
            squares += len(kept) ** 2
        assert (h.supervised == ((h.segment > 0) & (kind != "requests"))).all()
    assert chosen.keys() == full.keys()
    tally = stream.passes[epoch].tally
    assert (tally.rows, tally.segments, tally.targets) == (len(batches), len(full), supervised)
    assert (tally.events, tally.squares) == (sum(map(len, chosen.values())), squares)
    return chosen


def test_what_was_shown_together_stays_apart_when_thinned(sequences):
    """``before`` counts the kept events of earlier requests: by brute force, for every kept event and candidate."""
    request, limit = np.asarray(sequences.request), 0
    for batch in one_pass(stream_of(sequences, "windows")):
        h, c = batch.history, batch.candidates
        for s in np.flatnonzero(batch.user[0] >= 0):
            mine = h.segment[0] == s + 1
            kept = h.item[0][mine] - 1
            earlier = [int((request[kept[:i]] != request[e]).sum()) for i, e in enumerate(kept)]
            assert h.before[0][mine].tolist() == earlier
            target = c.item[0, 2 * s] - 1
            assert c.before[0, 2 * s] == (request[kept] != request[target]).sum()
            limit += c.before[0, 2 * s] < len(kept)
    assert limit > 0  # some windows end inside a request


@pytest.mark.parametrize("kind", ["windows", "users"])
def test_packed_rows_hold_the_same_segments_as_single_rows(sequences, kind):
    """A row is thinned alike wherever it is packed."""
    config = dataclasses.replace(CONFIG, subsequence="place")
    split = split_last(sequences) if kind == "users" else split_by_time(sequences, 0.1, 0.1)
    table = row_tables.training_rows(kind, sequences, split, everyone(sequences), 16, 2)
    passes = Passes(kind, table, config, 1, 1)
    plan = passes[2].plan
    packed = leaves(Assembler(sequences, table, Shape(16, 2, 4), passes.thinning)(plan, 2))
    single = leaves(Assembler(sequences, table, Shape(16, 2), passes.thinning)(np.arange(len(table))[:, None], 2))
    assert ((single["history.segment"] > 0).sum(axis=1) < table.history_length).any()
    for b, s in zip(*np.nonzero(plan != EMPTY)):
        row = plan[b, s]
        mine, alone = packed["history.segment"][b] == s + 1, single["history.segment"][row] == 1
        for name in ("item", "time", "labels", "supervised", "before", "genres"):
            np.testing.assert_array_equal(packed[f"history.{name}"][b][mine], single[f"history.{name}"][row][alone])
        for name in ("item", "time", "labels", "before"):
            slots = packed[f"candidates.{name}"][b][2 * s : 2 * s + 2]
            np.testing.assert_array_equal(slots, single[f"candidates.{name}"][row])
    whole = Passes(kind, table, dataclasses.replace(config, stochastic_length=2.0), 1, 1)
    assert len(plan) < len(whole[0].plan)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("changes", [{}, {"rows_per_user": 1}, {"segments": 1}])
def test_resumes_bit_for_bit_with_any_number_of_workers(sequences, changes):
    """Across the seams of several passes of unequal length, whose rows share batches."""
    whole = stream_of(sequences, batch_rows=7, **changes)
    batches = list(itertools.islice(whole, 40))
    assert whole.passes.rows(3) < 7 * 40
    again = stream_of(sequences, batch_rows=7, **changes)
    assert_same(list(itertools.islice(again, 9)), batches[:9])
    state = json.loads(json.dumps(again.get_state()))
    resumed = stream_of(sequences, batch_rows=7, workers=2 if not changes else 0, **changes)
    resumed.set_state(state)
    assert_same(list(itertools.islice(resumed, 31)), batches[9:])
    for stream in (whole, again, resumed):
        stream.close()
    for change in ({"stochastic_length": 1.3}, {"subsequence": "recent"}, {"rows_per_user": 2}, {"seed": 1}):
        with pytest.raises(UserError, match="the checkpoint's data stream was"):
            stream_of(sequences, batch_rows=7, **{**changes, **change}).set_state(state)


def test_passes_seeds_and_rows_are_thinned_differently(sequences):
    def kept(epoch=0, seed=0):
        table = row_tables.window_rows(split_by_time(sequences, 0.1, 0.1), everyone(sequences), 16, 2)
        rule = dataclasses.replace(Passes("windows", table, CONFIG, 1, seed).thinning, alpha=1.01)
        rows = table.take(table.history_length == 16)
        return rule.places(rows, epoch, np.asarray(sequences.time))

    assert len(kept()) > 20
    for other in (kept(epoch=1), kept(seed=1), kept()[::-1]):
        assert (other != kept()).any(axis=1).mean() > 0.8
    np.testing.assert_array_equal(kept(), kept())
    lengths = [stream_of(sequences).passes.rows(e + 1) - stream_of(sequences).passes.rows(e) for e in range(8)]
    assert len(set(lengths)) > 1


def test_tally_of_part_of_a_run(sequences):
    passes = stream_of(sequences).passes
    first, second = (passes[e].tally for e in (0, 1))
    rows = int(first.rows + second.rows / 2)
    assert passes.tally(rows).targets == pytest.approx(
        first.targets + second.targets * (rows - first.rows) / second.rows
    )
    assert passes.rows(1.25) == first.rows + second.rows / 4


def test_batches_that_pack_themselves_visit_every_thinned_row_once_per_pass(sequences):
    """Whole batches of four rows, packed by their thinned lengths; the account charges the packed rows in use."""
    config = dataclasses.replace(CONFIG, packing="batch", segments=3)
    table = row_tables.training_rows("users", sequences, split_last(sequences), everyone(sequences), 16, 1)
    passes = Passes("users", table, config, 4, 1)
    size = 4 * -(-len(table) // 4)
    assert [passes[epoch].tally.rows for epoch in range(3)] == [size] * 3
    found = dict(passes.at(np.arange(3 * size)))
    assert list(found) == [0, 1, 2]
    thinning = passes.thinning
    for epoch, plan in found.items():
        assert plan.shape == (size, 3)
        np.testing.assert_array_equal(np.sort(plan[plan != EMPTY]), np.arange(len(table)))
        lengths = np.where(plan == EMPTY, 0, thinning.lengths(table, epoch)[plan])
        assert lengths.sum(1).max() <= 16
        assert passes[epoch].tally.occupied == (plan != EMPTY).any(1).sum() < size
        np.testing.assert_array_equal(np.concatenate([p for _, p in passes.at(epoch * size + np.arange(8))]), plan[:8])


def test_rows_of_a_user_are_drawn_at_rate_m_over_n(tmp_path):
    """Users of 1, 2 and 8 rows: min(n, m) of them in every pass, each equally often, drawn anew."""
    sequences = dataset(tmp_path / "d", [[0], [0, 1], list(range(8)), [98] * 4, [99] * 4])
    split = split_by_time(sequences, 0.2, 0.2)
    table = row_tables.request_rows(sequences, split, "train", 16, 1, everyone(sequences))
    assert np.bincount(table.user).tolist() == [1, 2, 8]
    for per_user in (1, 3):
        config = dataclasses.replace(CONFIG, candidates=1, segments=1, stochastic_length=2.0, rows_per_user=per_user)
        passes = Passes("requests", table, config, 1, 0)
        count = np.zeros(len(table))
        for epoch in range(2000):
            rows = passes[epoch].plan[:, 0]
            assert np.bincount(table.user[rows]).tolist() == [min(n, per_user) for n in (1, 2, 8)]
            count[rows] += 1
        expected = [min(1, per_user / n) for n in (1, 2, 2, *[8] * 8)]
        np.testing.assert_allclose(count / 2000, expected, atol=0.04)


def test_evaluation_is_untouched(sequences):
    for goal in ("ranking", "retrieval"):
        plain = dataclasses.replace(CONFIG, stochastic_length=2.0)
        for change in ({"stochastic_length": 1.05}, {"rows_per_user": 1}):
            mine = evaluation_batches(sequences, dataclasses.replace(plain, **change), goal, "test", 4)
            reference = evaluation_batches(sequences, plain, goal, "test", 4)
            assert mine.fingerprint == reference.fingerprint
            assert_same(list(mine), list(reference))


def test_nothing_from_the_future(sequences):
    """A thinned row's events precede its target, are of its user and of the training part."""
    users, split = owner(sequences), split_by_time(sequences, 0.1, 0.1)
    _, stop = split.ranges("train")
    for batch in one_pass(stream_of(sequences, "prefixes", rows_per_user=1)):
        for s in np.flatnonzero(batch.user[0] >= 0):
            kept = batch.history.item[0][batch.history.segment[0] == s + 1] - 1
            target = int(batch.candidates.item[0, 2 * s]) - 1
            assert (kept < target).all()
            assert (users[kept] == users[target]).all()
            assert target < stop[users[target]]


BAD = [
    ({"data.stochastic_length": 1.0}, r"'data.stochastic_length' must be in \(1, 2\], not 1.0"),
    ({"data.stochastic_length": 2.1}, r"'data.stochastic_length' must be in \(1, 2\], not 2.1"),
    ({"data.stochastic_length": "nan"}, "'data.stochastic_length' must be finite"),
    ({"data.subsequence": "old"}, "'data.subsequence' must be one of elapsed, place, uniform, recent"),
    ({"data.rows_per_user": -1}, "'data.rows_per_user'"),
    ({"model.rows": "users"}, "'model.rows' must be one of windows, requests, prefixes"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_bad_settings_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        override(default_trial("hstu"), change)


@pytest.mark.parametrize("model", ["dlrm", "dcn", "din"])
def test_models_that_count_over_the_history_refuse_a_thinned_one(model):
    with pytest.raises(UserError, match=f"'data.stochastic_length' is for sequence models: {model}"):
        override(default_trial(model), {"data.stochastic_length": 1.6})
