import itertools

import numpy as np
import pytest

from genrec_jax.data.splits import PARTS, hash64, kept_users, split_by_time, split_by_users, split_last
from genrec_jax.errors import UserError
from tests.data.helpers import dataset, random_dataset


def ranges(split):
    return {part: [tuple(pair) for pair in zip(*(a.tolist() for a in split.ranges(part)))] for part in PARTS}


def test_time_split_by_hand(tmp_path):
    # Ten events at 0..9; shares .6, .2, .2 put the boundaries at times 6 and 8. User 1 has no events.
    sequences = dataset(tmp_path / "d", [[0, 2, 4, 6, 8], [], [1, 3, 5, 7, 9]])
    assert ranges(split_by_time(sequences, 0.2, 0.2)) == {
        "train": [(0, 3), (5, 5), (5, 8)],
        "validation": [(3, 4), (5, 5), (8, 9)],
        "test": [(4, 5), (5, 5), (9, 10)],
    }


def test_events_tied_at_a_boundary_are_all_later(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 5, 5, 8], [2, 5, 5, 5, 9]])  # the 60% quantile lies among the fives
    assert ranges(split_by_time(sequences, 0.2, 0.2))["train"] == [(0, 2), (5, 6)]
    assert ranges(split_by_time(sequences, 0.2, 0.2))["validation"] == [(2, 4), (6, 9)]


def test_time_split_parts_are_ordered_and_of_the_asked_size(tmp_path):
    sequences = random_dataset(tmp_path / "d", users=200)
    split = split_by_time(sequences, 0.1, 0.2)
    times = {}
    for part in PARTS:
        start, stop = split.ranges(part)
        times[part] = np.concatenate([sequences.time[a:b] for a, b in zip(start, stop)])
    assert times["train"].max() < times["validation"].min()
    assert times["validation"].max() < times["test"].min()
    assert sum(map(len, times.values())) == sequences.events
    assert len(times["test"]) == pytest.approx(0.2 * sequences.events, rel=0.1)
    assert len(times["validation"]) == pytest.approx(0.1 * sequences.events, rel=0.2)


def test_users_are_held_out_whole(tmp_path):
    sequences = random_dataset(tmp_path / "d", users=400)
    split = split_by_users(sequences, 0.1, 0.2)
    held = {}
    for part in PARTS:
        start, stop = split.ranges(part)
        held[part] = set(np.flatnonzero(stop > start).tolist())
        for user in held[part]:
            assert (start[user], stop[user]) == (sequences.offsets[user], sequences.offsets[user + 1])
    active = set(np.flatnonzero(np.diff(sequences.offsets)).tolist())
    assert held["train"] | held["validation"] | held["test"] == active
    assert sum(map(len, held.values())) == len(active)
    assert len(held["validation"]) == pytest.approx(40, abs=20)
    assert len(held["test"]) == pytest.approx(80, abs=25)
    start, stop = split_by_users(sequences, 0.1, 0.05).ranges("test")
    fewer = set(np.flatnonzero(stop > start).tolist())
    assert fewer < held["test"]
    kept = kept_users(sequences.users, 0.5)  # of data.fraction: another draw
    assert kept[list(held["test"])].mean() == pytest.approx(0.5, abs=0.2)


def test_a_split_by_users_without_users_for_a_part_is_refused(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 2]])
    with pytest.raises(UserError, match=r"has no .* events: its users leave none"):
        split_by_users(sequences, 0.1, 0.1)


def test_last_two_events_are_held_out(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 2, 3], [0], [0, 1], [], [0, 1, 2]])
    assert ranges(split_last(sequences)) == {
        "train": [(0, 2), (4, 5), (5, 7), (7, 7), (7, 8)],  # fewer than three events: all training
        "validation": [(2, 3), (5, 5), (7, 7), (7, 7), (8, 9)],
        "test": [(3, 4), (5, 5), (7, 7), (7, 7), (9, 10)],
    }


def test_without_validation_the_last_but_one_is_trained_on(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 2, 3], [0], [0, 1], [], [0, 1, 2]])
    assert ranges(split_last(sequences, validation=False)) == {
        "train": [(0, 3), (4, 5), (5, 7), (7, 7), (7, 9)],
        "validation": [(3, 3), (5, 5), (7, 7), (7, 7), (9, 9)],
        "test": [(3, 4), (5, 5), (7, 7), (7, 7), (9, 10)],
    }
    with pytest.raises(UserError, match="'tiny' has no test events: no user has three"):
        split_last(dataset(tmp_path / "e", [[0, 1], [0]]), validation=False)


@pytest.mark.parametrize(
    ("times", "part"),
    [([[0, 0, 0, 0]], "train"), ([[0, 1, 1, 1, 1, 1]], "validation")],
)
def test_empty_part_is_refused_by_name(tmp_path, times, part):
    with pytest.raises(UserError, match=f"'tiny' has no {part} events"):
        split_by_time(dataset(tmp_path / "d", times), 0.25, 0.25)


def test_no_user_long_enough_is_refused(tmp_path):
    with pytest.raises(UserError, match="'tiny' has no validation events: no user has three"):
        split_last(dataset(tmp_path / "d", [[0, 1], [0]]))


def test_no_events_is_refused(tmp_path):
    with pytest.raises(UserError, match="'tiny' has no events"):
        split_by_time(dataset(tmp_path / "d", [[]]), 0.1, 0.1)


def test_fractions_are_nested_and_of_the_asked_size():
    kept = [kept_users(20000, fraction) for fraction in (0.1, 0.25, 0.5, 1.0)]
    for smaller, larger in itertools.pairwise(kept):
        assert (smaller <= larger).all()
    assert [k.mean() for k in kept] == pytest.approx([0.1, 0.25, 0.5, 1.0], abs=0.01)
    assert (kept_users(30000, 0.25)[:20000] == kept[1]).all()  # a user's fate does not depend on the others


def test_hash_is_splitmix64():
    # First outputs of the published generator from state 0: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4.
    state = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert hash64(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("events", [1, 5, 64])
def test_boundaries_are_ranks_of_the_sorted_times_however_much_is_scanned_at_once(tmp_path, monkeypatch, events):
    """Times far apart, so that the high and the low 16 bits both matter, and negative ones."""
    rng = np.random.default_rng(0)
    times = [np.sort(rng.integers(-(2**20), 2**30, size)) for size in rng.integers(0, 30, 25)]
    times = [np.where(np.arange(len(time)) % 3 == 0, time // 2**18 * 2**18, time) for time in times]
    data = dataset(tmp_path / "d", [np.sort(time).tolist() for time in times])
    monkeypatch.setattr("genrec_jax.data.sequences.SCAN_EVENTS", events)
    split = split_by_time(data, 0.2, 0.3)
    order = np.sort(data.time)
    boundaries = [order[round(share * data.events)] for share in (0.5, 0.7)]
    for user, (first, last) in enumerate(itertools.pairwise(data.offsets)):
        cuts = [first + int((data.time[first:last] < boundary).sum()) for boundary in boundaries]
        assert split.bounds[:, user].tolist() == [first, *cuts, last]
    for part in PARTS:
        start, stop = split.ranges(part)
        expected = np.concatenate([np.arange(a, b) for a, b in zip(start, stop)])
        found = [split.holds(part, first, min(7, data.events - first)) for first in range(0, data.events, 7)]
        assert np.flatnonzero(np.concatenate(found)).tolist() == expected.tolist()
