import numpy as np
import pytest

from genrec_jax.data import rows as row_tables
from genrec_jax.data.splits import kept_users, split_by_time, split_last
from tests.data.helpers import dataset, owner, random_dataset


def listed(rows):
    """(user, history range, target range) of every row."""
    columns = (rows.user, rows.history_start, rows.history_stop, rows.target_start, rows.target_stop)
    return [(u, (a, b), (c, d)) for u, a, b, c, d in zip(*(x.tolist() for x in columns))]


def everyone(sequences):
    return np.ones(sequences.users, bool)


def test_requests_without_ids_by_hand(tmp_path):
    # Boundaries at 14 and 17 of 20 events: user 0 trains on 0..6, validates on 7, 8, tests on 9.
    sequences = dataset(tmp_path / "d", [list(range(0, 20, 2)), list(range(1, 20, 2))])
    split = split_by_time(sequences, 0.15, 0.15)
    assert listed(row_tables.request_rows(sequences, split, "train", 4, 3)) == [
        (0, (0, 0), (0, 3)),
        (0, (0, 3), (3, 6)),
        (0, (2, 6), (6, 7)),
        (1, (10, 10), (10, 13)),
        (1, (10, 13), (13, 16)),
        (1, (12, 16), (16, 17)),
    ]
    assert listed(row_tables.request_rows(sequences, split, "validation", 4, 3)) == [
        (0, (3, 7), (7, 9)),
        (1, (13, 17), (17, 18)),
    ]
    assert listed(row_tables.request_rows(sequences, split, "test", 20, 3)) == [
        (0, (0, 9), (9, 10)),
        (1, (10, 18), (18, 20)),
    ]


def test_requests_with_ids_share_the_history_before_their_first_event(tmp_path):
    # User 0: requests of 1, 5 and 2 events; user 1 goes on with the same id, which is another request.
    sequences = dataset(
        tmp_path / "d",
        [[0, 1, 1, 1, 1, 1, 2, 12], [3, 4, 12, 20]],
        [[1, 2, 2, 2, 2, 2, 3, 3], [3, 3, 4, 5]],
    )
    split = split_by_time(sequences, 0.17, 0.08)  # train: time < 12, validation: < 20
    assert listed(row_tables.request_rows(sequences, split, "train", 3, 2)) == [
        (0, (0, 0), (0, 1)),
        (0, (0, 1), (1, 3)),
        (0, (0, 1), (3, 5)),
        (0, (0, 1), (5, 6)),
        (0, (3, 6), (6, 7)),
        (1, (8, 8), (8, 10)),
    ]
    # Event 7 was shown with event 6, which is training: it still must not see it.
    assert listed(row_tables.request_rows(sequences, split, "validation", 3, 2)) == [
        (0, (3, 6), (7, 8)),
        (1, (8, 10), (10, 11)),
    ]


def test_windows_by_hand(tmp_path):
    # 11, 3, 1 and 2 training events of four users; N = 3, K = 2, so windows of five.
    sequences = dataset(tmp_path / "d", [[*range(11), 90, 98], [1, 2, 3], [1], [5, 6, 99]])
    split = split_by_time(sequences, 0.06, 0.1)
    assert listed(row_tables.window_rows(split, everyone(sequences), 3, 2)) == [
        (0, (0, 0), (0, 1)),  # the remainder is the oldest
        (0, (1, 4), (4, 6)),
        (0, (6, 9), (9, 11)),
        (1, (13, 15), (15, 16)),  # half of a short window at most
        (2, (16, 16), (16, 17)),
        (3, (17, 18), (18, 19)),
    ]


def test_windows_never_hold_more_history_than_fits(tmp_path):
    sequences = dataset(tmp_path / "d", [[*range(9), 50, 51]])
    split = split_by_time(sequences, 0.1, 0.1)
    assert listed(row_tables.window_rows(split, everyone(sequences), 2, 8)) == [(0, (0, 2), (2, 9))]


def test_next_item_rows_by_hand(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(6)), [0], [0, 1], [], [0, 1, 2]])
    split = split_last(sequences)
    train = row_tables.next_item_rows(sequences, split, "train", 2)
    assert listed(train) == [(0, (1, 3), (3, 4)), (2, (7, 8), (8, 9))]  # user 4 has one training event
    assert train.supervised
    validation = row_tables.next_item_rows(sequences, split, "validation", 2)
    assert listed(validation) == [(0, (2, 4), (4, 5)), (4, (9, 10), (10, 11))]
    assert listed(row_tables.next_item_rows(sequences, split, "test", 9)) == [
        (0, (0, 5), (5, 6)),
        (4, (9, 11), (11, 12)),
    ]
    assert not validation.supervised


def test_supervised_targets_by_hand(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(8)), list(range(8, 16))])
    time, last = split_by_time(sequences, 0.25, 0.25), split_last(sequences)
    kept = everyone(sequences)
    tables = {
        kind: row_tables.training_rows(kind, sequences, last if kind == "users" else time, kept, 3, 2)
        for kind in ("requests", "prefixes", "windows", "users")
    }
    count = {kind: row_tables.supervised_targets(kind, rows, rows.history_length) for kind, rows in tables.items()}
    # users: three history events, each predicts one; prefixes: rows of 0 + 2, 2 + 2, 3 + 2, 3 + 2 events.
    assert count == {"requests": 8, "prefixes": 16, "windows": 8, "users": 6}
    assert row_tables.supervised_targets("users", tables["users"], np.array([1, 2])) == 3


def events_of(starts, stops):
    return np.concatenate([np.arange(a, b) for a, b in zip(starts, stops)] or [np.zeros(0, np.int64)])


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_random_logs(tmp_path, requests, seed):
    """Every training event supervised once, nothing seen from the future, other users or the same request."""
    sequences = random_dataset(tmp_path / "d", requests=requests, seed=seed)
    split = split_by_time(sequences, 0.2, 0.2)
    kept = kept_users(sequences.users, 0.6)
    users = owner(sequences)
    for history, candidates in [(1, 1), (5, 3), (40, 8), (2, 7)]:
        for kind in ("requests", "windows", "validation", "test"):
            part = kind if kind in ("validation", "test") else "train"
            if part == "train":
                rows = row_tables.training_rows(kind, sequences, split, kept, history, candidates)
            else:
                rows = row_tables.request_rows(sequences, split, part, history, candidates)
            start, stop = split.ranges(part)
            chosen = kept if part == "train" else everyone(sequences)
            supervised = events_of(rows.target_start, rows.target_stop)
            if rows.supervised:
                supervised = np.concatenate([supervised, events_of(rows.history_start, rows.history_stop)])
            np.testing.assert_array_equal(np.sort(supervised), events_of(start[chosen], stop[chosen]))
            assert (rows.history_length <= history).all()
            count = rows.target_stop - rows.target_start
            assert ((count >= 1) & (count <= candidates)).all()
            assert (rows.history_stop <= rows.target_start).all()
            assert (users[rows.history_stop] == rows.user).all()
            assert (users[rows.target_stop - 1] == rows.user).all()
            assert (rows.history_start >= sequences.offsets[rows.user]).all()
            if kind != "windows" and requests:
                check_requests(sequences, rows)


def check_requests(sequences, rows):
    request = np.asarray(sequences.request)
    for _, (start, stop), (first, last) in listed(rows):
        assert len(set(request[first:last])) == 1
        assert request[stop] == request[first]
        assert start == stop or request[stop - 1] != request[first]


def test_evaluated_requests_do_not_depend_on_history_and_grow_with_the_budget(tmp_path):
    sequences = random_dataset(tmp_path / "d", users=100, requests=True)
    split = split_by_time(sequences, 0.2, 0.2)

    def chosen(history, impressions):
        rows = row_tables.request_rows(sequences, split, "test", history, 3)
        rows = row_tables.evaluation_rows(rows, impressions)
        assert rows.candidates <= impressions
        return events_of(rows.target_start, rows.target_stop)

    np.testing.assert_array_equal(chosen(4, 50), chosen(30, 50))
    assert 48 <= len(chosen(4, 50)) <= 50
    assert set(chosen(4, 50)) < set(chosen(4, 90))
    assert (np.diff(chosen(4, 90)) > 0).all()  # file order
    start, stop = split.ranges("test")
    assert len(chosen(4, 10**9)) == (stop - start).sum()


def test_one_row_is_evaluated_even_beyond_the_budget(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(20))])
    rows = row_tables.request_rows(sequences, split_by_time(sequences, 0.3, 0.3), "test", 4, 4)
    assert len(row_tables.evaluation_rows(rows, 1)) == 1
