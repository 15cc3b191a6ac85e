import pickle

import numpy as np
import pytest

from genrec_jax.batch import Shape
from genrec_jax.data import rows as row_tables
from genrec_jax.data.packing import EMPTY, Assembler, plan_segments
from genrec_jax.data.splits import split_by_time, split_last
from tests.data.helpers import dataset, random_dataset


def leaves(batch):
    """Every array of a batch by name."""
    out = {"user": batch.user, **{f"context.{k}": v for k, v in batch.context.features.items()}}
    for part in ("history", "candidates"):
        value = vars(getattr(batch, part))
        out |= {f"{part}.{k}": v for k, v in value.items() if k != "features"}
        out |= {f"{part}.{k}": v for k, v in value["features"].items()}
    return out


def everyone(sequences):
    return np.ones(sequences.users, bool)


def test_batch_by_hand(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 2, 3, 4, 20, 30], [10, 11]])
    split = split_by_time(sequences, 0.12, 0.22)  # boundaries at 11 and 20
    assert split.bounds.tolist() == [[0, 7], [5, 8], [5, 9], [7, 9]]
    rows = row_tables.request_rows(sequences, split, "test", 4, 3)
    batch = leaves(Assembler(sequences, rows, Shape(4, 3))(np.array([[0], [EMPTY]])))
    label, genres = np.asarray(sequences.labels), np.asarray(sequences.features["genres"])
    expected = {
        "user": [[0], [-1]],
        "context.country": [[sequences.features["country"][0]], [0]],
        "context.device": [[sequences.features["device"][5]], [0]],
        "history.item": [[2, 3, 4, 5], [0, 0, 0, 0]],
        "history.time": [[1, 2, 3, 4], [0, 0, 0, 0]],
        "history.labels": [label[1:5], np.zeros((4, 2))],
        "history.segment": [[1, 1, 1, 1], [0, 0, 0, 0]],
        "history.supervised": [[False] * 4, [False] * 4],
        "history.before": [[0, 1, 2, 3], [0, 0, 0, 0]],
        "history.genres": [genres[2:6], np.zeros((4, 2))],  # item 0's stored features are not let through
        "candidates.item": [[6, 7, 0], [0, 0, 0]],
        "candidates.time": [[20, 20, 0], [0, 0, 0]],  # the request's time, not the event's
        "candidates.labels": [[*label[5:7], [0, 0]], np.zeros((3, 2))],
        "candidates.segment": [[1, 1, 0], [0, 0, 0]],
        "candidates.before": [[4, 4, 0], [0, 0, 0]],
        "candidates.genres": [[*genres[6:8], [0, 0]], np.zeros((3, 2))],
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_dtypes_and_shapes(tmp_path):
    sequences = random_dataset(tmp_path / "d")
    split = split_by_time(sequences, 0.2, 0.2)
    rows = row_tables.window_rows(split, everyone(sequences), 6, 2)
    batch = leaves(Assembler(sequences, rows, Shape(6, 2, 3))(np.array([[0, 1, EMPTY], [2, EMPTY, EMPTY]])))
    kinds = {"labels": np.uint8, "supervised": np.bool_}
    for name, value in batch.items():
        assert value.dtype == kinds.get(name.split(".")[1] if "." in name else name, np.int32), name
    shapes = {name: value.shape for name, value in batch.items()}
    assert shapes["user"] == shapes["context.country"] == (2, 3)
    assert shapes["history.item"] == (2, 6)
    assert shapes["history.labels"] == shapes["history.genres"] == (2, 6, 2)
    assert shapes["candidates.segment"] == (2, 6)
    assert shapes["candidates.labels"] == shapes["candidates.genres"] == (2, 6, 2)


def test_two_packed_segments_by_hand(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9]])
    split = split_last(sequences)
    rows = row_tables.next_item_rows(sequences, split, "validation", 5)  # histories of 3 (user 0) and 2 (user 2)
    batch = leaves(Assembler(sequences, rows, Shape(6, 2, 3))(np.array([[1, 0, EMPTY]])))
    expected = {
        "user": [[2, 0, -1]],
        "history.item": [[7, 8, 1, 2, 3, 0]],
        "history.segment": [[1, 1, 2, 2, 2, 0]],
        "candidates.item": [[9, 0, 4, 0, 0, 0]],
        "candidates.time": [[8, 0, 3, 0, 0, 0]],
        "candidates.segment": [[1, 0, 2, 0, 0, 0]],
        "history.before": [[0, 1, 0, 1, 2, 0]],
        "candidates.before": [[2, 0, 3, 0, 0, 0]],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_supervised_marks_the_history_of_generative_training_rows(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(8)), list(range(8, 16))])
    time, last = split_by_time(sequences, 0.25, 0.25), split_last(sequences)
    kept = everyone(sequences)
    tables = {
        "requests": (row_tables.request_rows(sequences, time, "train", 6, 2, kept), False),
        "windows": (row_tables.window_rows(time, kept, 6, 2), True),
        "users": (row_tables.next_item_rows(sequences, last, "train", 6, kept), True),
        "evaluated users": (row_tables.next_item_rows(sequences, last, "test", 6), False),
    }
    for rows, supervised in tables.values():
        batch = Assembler(sequences, rows, Shape(6, 2))(np.arange(len(rows))[:, None])
        real = batch.history.segment > 0
        assert real.any()
        np.testing.assert_array_equal(batch.history.supervised, real & supervised)


def test_before_is_where_a_request_began(tmp_path):
    """Two users, requests 0 | 1 1 1 | 2 2 and 5 5 | 6, cut by hand in and between requests, alone and packed."""
    sequences = dataset(tmp_path / "d", [[0, 1, 1, 1, 2, 2], [0, 0, 1]], [[0, 1, 1, 1, 2, 2], [5, 5, 6]])
    start, stop = np.array([0, 2, 6, 6]), np.array([4, 5, 7, 6])
    rows = row_tables.RowTable(
        np.array([0, 0, 1, 1], np.int32), start, stop, stop, np.array([6, 6, 9, 7]), supervised=True
    )
    single = Assembler(sequences, rows, Shape(5, 3))(np.arange(4)[:, None])
    assert single.history.before.tolist() == [[0, 1, 1, 1, 0], [0, 0, 2, 0, 0], [0] * 5, [0] * 5]
    # Row 0's candidates begin a request, row 1's and row 2's go on with that of the last history event.
    assert single.candidates.before.tolist() == [[4, 4, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]
    packed = Assembler(sequences, rows, Shape(8, 3, 3))(np.array([[0, 1, 2]]))
    assert packed.history.before.tolist() == [[0, 1, 1, 1, 0, 0, 2, 0]]
    assert packed.candidates.before.tolist() == [[4, 4, 0, 2, 0, 0, 0, 0, 0]]


def test_windows_take_the_event_features_of_their_first_event(tmp_path):
    """Every event of a window is a target that sees the context, so it must not tell of a later request."""
    sequences = dataset(tmp_path / "d", [list(range(12)), list(range(12, 17))])
    rows = row_tables.window_rows(split_by_time(sequences, 0.1, 0.1), everyone(sequences), 3, 1)
    batch = Assembler(sequences, rows, Shape(3, 1))(np.arange(len(rows))[:, None])
    first = np.where(rows.history_length > 0, batch.history.item[:, 0], batch.candidates.item[:, 0]) - 1
    device = sequences.features["device"]
    assert (device[first] != device[rows.history_stop]).any()
    np.testing.assert_array_equal(batch.context.features["device"][:, 0], device[first])
    np.testing.assert_array_equal(batch.context.features["country"][:, 0], sequences.features["country"][rows.user])


@pytest.mark.parametrize("kind", ["requests", "windows", "users"])
def test_packed_rows_hold_the_same_segments_as_single_rows(tmp_path, kind):
    sequences = random_dataset(tmp_path / "d", requests=True)
    split = split_last(sequences) if kind == "users" else split_by_time(sequences, 0.2, 0.2)
    rows = row_tables.training_rows(kind, sequences, split, everyone(sequences), 12, 3)
    plan = plan_segments(rows.history_length, 12, 4, seed=1)
    assert len(plan) < len(rows)
    packed = leaves(Assembler(sequences, rows, Shape(12, 3, 4))(plan))
    single = leaves(Assembler(sequences, rows, Shape(12, 3))(np.arange(len(rows))[:, None]))
    for b, s in zip(*np.nonzero(plan != EMPTY)):
        row = plan[b, s]
        mine, alone = packed["history.segment"][b] == s + 1, single["history.segment"][row] == 1
        for name in packed:
            if name.startswith("history") and name != "history.segment":
                np.testing.assert_array_equal(packed[name][b][mine], single[name][row][alone], err_msg=name)
            elif name.startswith("candidates") and name != "candidates.segment":
                np.testing.assert_array_equal(packed[name][b][s * 3 : s * 3 + 3], single[name][row], err_msg=name)
            elif "segment" not in name:
                np.testing.assert_array_equal(packed[name][b, s], single[name][row, 0], err_msg=name)
        slots = packed["candidates.segment"][b][s * 3 : s * 3 + 3]
        np.testing.assert_array_equal(slots, single["candidates.segment"][row] * (s + 1))
    total = np.where(plan == EMPTY, 0, rows.history_length[plan]).sum(axis=1)
    np.testing.assert_array_equal((packed["history.segment"] > 0).sum(axis=1), total)


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_plan_covers_every_row_once_and_respects_its_limits(segments, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 17, 300) if seed else np.zeros(300, np.int64)
    plan = plan_segments(lengths, 16, segments, seed)
    np.testing.assert_array_equal(np.sort(plan[plan != EMPTY]), np.arange(300))
    assert plan.shape[1] == segments
    assert (np.where(plan == EMPTY, 0, lengths[plan]).sum(axis=1) <= 16).all()
    assert (np.diff((plan == EMPTY).astype(int), axis=1) >= 0).all()  # filled from the left
    assert (plan[:, 0] != EMPTY).all()
    np.testing.assert_array_equal(plan, plan_segments(lengths, 16, segments, seed))


def test_plan_is_tight():
    lengths = np.random.default_rng(0).integers(1, 65, 5000)
    plan = plan_segments(lengths, 64, 8, 0)
    assert lengths.sum() / (64 * len(plan)) > 0.97
    assert len(plan_segments(np.array([10, 6, 9, 7, 8, 8]), 16, 2, 0)) == 3
    assert len(plan_segments(np.full(10, 4), 16, 8, 0)) == 3
    assert len(plan_segments(np.full(10, 1), 16, 8, 0)) == 2
    assert len(plan_segments(np.zeros(9, np.int64), 16, 4, 0)) == 3


def test_assembler_reopens_its_dataset_when_unpickled(tmp_path):
    sequences = random_dataset(tmp_path / "d")
    rows = row_tables.request_rows(sequences, split_by_time(sequences, 0.2, 0.2), "train", 5, 2)
    assembler = Assembler(sequences, rows, Shape(5, 2))
    plan = np.arange(7)[:, None]
    text = pickle.dumps(assembler)
    copy = leaves(pickle.loads(text)(plan))
    for name, value in leaves(assembler(plan)).items():
        np.testing.assert_array_equal(copy[name], value)
