import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from genrec_jax.config import DataConfig
from genrec_jax.data import splits
from genrec_jax.data.passes import shuffled
from genrec_jax.data.pipeline import TrainStream, evaluation_batches, evaluation_fingerprint
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import save
from genrec_jax.errors import UserError
from tests.data.helpers import dataset, random_dataset

CONFIG = DataConfig(history=8, candidates=3, validation=0.2, test=0.2, eval_impressions=60)


@pytest.fixture
def sequences(tmp_path):
    return random_dataset(tmp_path / "d")


@pytest.fixture
def stream_of(sequences):
    """Opens streams over one dataset, and closes them after the test."""
    opened = []

    def make(kind="requests", batch_rows=4, seed=0, **changes):
        stream = TrainStream(sequences, dataclasses.replace(CONFIG, **changes), kind, batch_rows, seed)
        opened.append(stream)
        return stream

    yield make
    for stream in opened:
        stream.close()


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_array_equal(a, b)


def supervised_items(batches):
    """Items (one per event in these datasets) of all supervised targets."""
    items = [b.candidates.item[b.candidates.segment > 0] for b in batches]
    items += [b.history.item[b.history.supervised] for b in batches]
    return np.concatenate(items)


@pytest.mark.parametrize("kind", ["requests", "windows"])
@pytest.mark.parametrize("segments", [1, 4])
def test_one_pass_supervises_every_training_event_once(sequences, stream_of, kind, segments):
    stream = stream_of(kind, batch_rows=1, segments=segments)
    split = splits.split_by_time(sequences, 0.2, 0.2)
    events = np.concatenate([np.arange(a, b) for a, b in zip(*split.ranges("train"))])
    rows = len(stream.passes[0].plan)
    assert stream.passes.rows(1.5) == 1.5 * rows
    assert stream.passes.tally(rows).targets == len(events)
    for _ in range(2):
        np.testing.assert_array_equal(np.sort(supervised_items(take(stream, rows))), events + 1)


def test_users_rows_supervise_one_target_per_history_event(stream_of):
    stream = stream_of("users", batch_rows=1)
    rows = len(stream.passes[0].plan)
    batches = take(stream, rows)
    assert stream.passes.tally(rows).targets == sum(int((b.history.segment > 0).sum()) for b in batches)
    assert all((b.candidates.segment == [[1, 0, 0]]).all() for b in batches)


@pytest.mark.parametrize("kind", ["requests", "windows", "prefixes", "users"])
def test_target_counts_are_those_of_one_pass(sequences, stream_of, kind):
    stream = stream_of(kind, batch_rows=1)
    counts = np.zeros(sequences.schema.items, np.int64)
    for batch in take(stream, int(stream.passes.rows(1))):
        history, first = batch.history.item[batch.history.supervised], batch.candidates.item[:, 0]
        if kind == "users":  # an event predicts the next: the first is no target
            items = np.concatenate([history[1:], first])
        else:
            items = np.concatenate([history, batch.candidates.item[batch.candidates.segment > 0]])
        np.add.at(counts, items, 1)
    np.testing.assert_array_equal(stream.target_counts(), counts)
    assert counts.sum() == stream.passes[0].tally.targets


@pytest.mark.parametrize("goal_and_kind", [("ranking", "requests"), ("ranking", "windows"), ("retrieval", "users")])
def test_unseen_impressions_are_of_items_no_training_row_holds(tmp_path, goal_and_kind):
    """By hand over the batches; a third of the users are trained on, and items come again."""
    goal, kind = goal_and_kind
    log = random_dataset(tmp_path / "log")
    made = save(
        tmp_path / "repeated",
        name="repeated",
        schema=Schema(items=101, tasks=log.schema.tasks),
        origin=0,
        offsets=log.offsets,
        item=np.random.default_rng(1).integers(1, 101, log.events),
        time=np.asarray(log.time),
        labels=np.asarray(log.labels),
        features={},
    )
    config = dataclasses.replace(CONFIG, fraction=0.3)
    stream = TrainStream(made, config, kind, 1, seed=0)
    seen = {0}
    for batch in take(stream, int(stream.passes.rows(1))):
        seen |= set(batch.history.item.ravel().tolist()) | set(batch.candidates.item.ravel().tolist())
    stream.close()
    found = stream.seen_items()
    assert set(np.flatnonzero(found).tolist()) == seen - {0}
    batches = evaluation_batches(made, config, goal, "test", 4)
    shown = [item for _, item, *_ in impressions(batches)]
    unseen = sum(item not in seen for item in shown)
    assert 0 < unseen < len(shown)
    assert batches.unseen(found) == unseen


def test_a_batch_packed_by_itself_is_as_many_users(sequences, stream_of):
    """Every pass visits every user once, in whole batches; its last one is what is left."""
    stream = stream_of("users", batch_rows=7, segments=3, packing="batch", history=40)
    alone = stream_of("users", batch_rows=1, history=40)
    whole, users = stream.passes[0].tally, int(alone.passes.rows(1))
    assert whole.targets == alone.passes[0].tally.targets
    assert whole.rows == stream.passes.rows(1) == 7 * -(-users // 7)
    assert users % 7
    wanted = np.sort(np.concatenate([b.user[0] for b in take(alone, users)]))
    filled = []
    for _ in range(2):
        batches = take(stream, int(whole.rows) // 7)
        found = [b.user[b.user >= 0] for b in batches]
        assert [len(u) for u in found] == [7] * (len(batches) - 1) + [users % 7]
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), wanted)
        assert all(b.user.shape == (7, 3) for b in batches)
        occupied = np.stack([(b.user >= 0).any(axis=1) for b in batches])
        assert (np.diff(occupied.astype(int), axis=1) <= 0).all()  # empty rows are last
        assert sum(int(b.history.supervised.sum()) for b in batches) == whole.targets
        filled.append(occupied.mean())
    assert whole.occupied / whole.rows == filled[0] < 0.8
    one_by_one = stream_of("users").passes[0].tally
    assert one_by_one.occupied == one_by_one.rows


def test_a_stream_packed_by_batches_resumes(stream_of):
    whole = take(stream_of("users", segments=3, packing="batch"), 25)  # more than two passes
    resumed = stream_of("users", segments=3, packing="batch")
    resumed.set_state({**resumed.get_state(), "batch": 9})
    assert_same(take(resumed, 16), whole[9:])


@pytest.mark.parametrize(("protocol", "target"), [("honest", 8), ("original", 9)])
def test_protocols_train_up_to_the_watched_event(tmp_path, protocol, target):
    sequences = dataset(tmp_path / "d", [list(range(10))])
    config = dataclasses.replace(CONFIG, history=4, protocol=protocol)
    stream = TrainStream(sequences, config, "users", 1, 0)
    (batch,) = take(stream, 1)
    stream.close()
    assert batch.candidates.item[0, 0] == target
    assert batch.history.item.tolist() == [list(range(target - 4, target))]
    (tested,) = evaluation_batches(sequences, config, "retrieval", "test", 1)
    assert tested.candidates.item[0, 0] == 10
    assert tested.history.item.tolist() == [[6, 7, 8, 9]]


def test_order_changes_with_the_pass_and_the_seed_only(stream_of):
    first, second = take(stream_of(), 60), take(stream_of(), 60)
    assert_same(first, second)
    rows = len(stream_of(batch_rows=1).passes[0].plan)
    stream = stream_of(batch_rows=1)
    passes = [np.stack([b.candidates.item for b in take(stream, rows)]) for _ in range(2)]
    other = np.stack([b.candidates.item for b in take(stream_of(batch_rows=1, seed=1), rows)])
    assert rows > 50
    for left, right in itertools.combinations([*passes, other], 2):
        assert (left != right).any(axis=(1, 2)).mean() > 0.8


def test_shuffled_visits_every_index_once_per_pass():
    for size in (1, 2, 3, 4, 5, 63, 64, 65, 1000):
        order = shuffled(np.arange(3 * size), size, 7).reshape(3, size)
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(size), (3, 1)))
        at_once = shuffled(np.arange(2 * size, 3 * size), size, 7)
        np.testing.assert_array_equal(at_once, order[2])


def test_shuffled_is_uniform():
    """Where each of six rows lands, over 6000 passes: every position alike, and all 720 orders occur."""
    order = shuffled(np.arange(36000), 6, 3).reshape(6000, 6)
    counts = np.stack([(order == row).sum(axis=0) for row in range(6)])
    assert np.abs(counts / 6000 - 1 / 6).max() < 0.02  # four standard deviations
    assert len(np.unique(order @ 6 ** np.arange(6))) > 710


def test_fewer_rows_than_a_batch_repeat_within_it(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(10))])
    stream = TrainStream(sequences, CONFIG, "requests", 6, 0)
    (batch,) = take(stream, 1)
    stream.close()
    assert len(stream.passes[0].plan) == stream.passes.rows(1) == 2
    assert sorted(batch.candidates.item[:, 0]) == [1, 1, 1, 4, 4, 4]


def test_fraction_thins_training_and_leaves_evaluation_alone(sequences, stream_of):
    def users(fraction):
        stream = stream_of(batch_rows=1, fraction=fraction)
        return {int(b.user[0, 0]) for b in take(stream, len(stream.passes[0].plan))}

    assert set() < users(0.25) < users(0.5) < users(1.0)
    prints = [
        evaluation_fingerprint(sequences, dataclasses.replace(CONFIG, fraction=f), "ranking", "test") for f in (0.25, 1)
    ]
    assert prints[0] == prints[1]
    with pytest.raises(UserError, match=r"'random' has no training rows .* data.fraction 1e-09"):
        stream_of(fraction=1e-9)


@pytest.mark.parametrize("kind", ["requests", "windows"])
def test_a_split_by_users_trains_on_some_and_evaluates_all_of_others(sequences, stream_of, kind):
    shares = {"split": "users", "validation": 0.2, "test": 0.3, "eval_impressions": 10_000}
    stream = stream_of(kind, batch_rows=1, **shares)
    trained = take(stream, len(stream.passes[0].plan))
    config = dataclasses.replace(CONFIG, **shares)
    parts = [list(evaluation_batches(sequences, config, "ranking", part, 2)) for part in ("validation", "test")]
    users = [{int(user) for b in batches for user in b.user.ravel() if user >= 0} for batches in (trained, *parts)]
    assert all(users)
    assert sum(map(len, users)) == len(set().union(*users)) == np.count_nonzero(np.diff(sequences.offsets))
    events = [len(supervised_items(batches)) for batches in (trained, *parts)]
    assert sum(events) == sequences.events


@pytest.mark.parametrize("segments", [1, 3])
def test_resumed_stream_equals_the_uninterrupted_one(stream_of, segments):
    whole = take(stream_of("windows", segments=segments), 12)
    interrupted = stream_of("windows", segments=segments)
    assert_same(take(interrupted, 5), whole[:5])
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = stream_of("windows", segments=segments)
    take(resumed, 2)
    resumed.set_state(state)
    assert_same(take(resumed, 7), whole[5:])
    interrupted.close()  # and a closed stream goes on where it was
    assert_same(take(interrupted, 7), whole[5:])


def test_state_of_another_stream_is_refused(stream_of):
    state = stream_of().get_state()
    for other in (stream_of(seed=1), stream_of(batch_rows=5), stream_of("windows")):
        with pytest.raises(UserError, match="the checkpoint's data stream was"):
            other.set_state(state)


def test_state_of_a_stream_over_other_data_is_refused(tmp_path):
    """Another dataset of the same size, such as one that was imported again under the same path."""
    streams = [
        TrainStream(dataset(tmp_path / name, [[0, 1, 2, 3, last, 20, 30]]), CONFIG, "requests", 2, 0)
        for name, last in (("a", 4), ("b", 5), ("c", 4))
    ]
    streams[2].set_state(streams[0].get_state())
    with pytest.raises(UserError, match="the checkpoint's data stream was"):
        streams[1].set_state(streams[0].get_state())


def test_worker_processes_give_the_same_stream_and_take_over_a_state(stream_of):
    whole = take(stream_of(), 9)
    workers = stream_of(workers=2)
    assert_same(take(workers, 4), whole[:4])
    alone = stream_of()
    alone.set_state(workers.get_state())
    assert_same(take(alone, 2), whole[4:6])
    workers.set_state(alone.get_state())
    assert_same(take(workers, 3), whole[6:])
    jax.block_until_ready(jax.tree.map(jax.numpy.asarray, take(workers, 1)))  # shared memory can go to the device


def impressions(batches):
    """Multiset of (user, item, request time, labels) over all evaluated candidates."""
    out = []
    for batch in batches:
        c = batch.candidates
        for b, k in zip(*np.nonzero(c.segment)):
            user = int(batch.user[b, c.segment[b, k] - 1])
            out.append((user, int(c.item[b, k]), int(c.time[b, k]), *c.labels[b, k].tolist()))
    return sorted(out)


@pytest.mark.parametrize("goal", ["ranking", "retrieval"])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_every_model_is_evaluated_on_the_same_impressions(sequences, goal, part):
    base = dataclasses.replace(CONFIG, eval_impressions=20)
    reference = evaluation_batches(sequences, base, goal, part, 4)
    changes = [{"history": 2}, {"history": 50}, {"segments": 4}, {"fraction": 0.5}, {"workers": 3}]
    for change, rows in itertools.product(changes, (1, 7, 100)):
        other = evaluation_batches(sequences, dataclasses.replace(base, **change), goal, part, rows)
        assert other.fingerprint == reference.fingerprint
        assert impressions(other) == impressions(reference)
    assert len(impressions(reference)) == reference.impressions
    assert 18 <= reference.impressions <= 20
    assert reference.fingerprint == evaluation_fingerprint(sequences, base, goal, part)


def test_fingerprint_tells_parts_goals_and_candidates_apart(sequences):
    def mark(goal="ranking", part="test", **changes):
        return evaluation_fingerprint(sequences, dataclasses.replace(CONFIG, **changes), goal, part)

    marks = [mark(), mark(part="validation"), mark("retrieval"), mark(candidates=2), mark(eval_impressions=30)]
    assert len(set(marks)) == 5
    assert all(len(m) == 12 for m in marks)


def test_evaluation_batches_have_one_shape_and_can_be_read_again(sequences):
    batches = evaluation_batches(sequences, dataclasses.replace(CONFIG, segments=3), "ranking", "test", 7)
    first = list(batches)
    assert len(first) == len(batches) > 1
    assert_same(first, list(batches))
    assert len({str(jax.tree.map(np.shape, b)) for b in first}) == 1
    assert first[0].history.item.shape == (7, 8)
    assert first[0].candidates.item.shape == (7, 3)
    last = first[-1]
    empty = last.user[:, 0] == -1
    assert empty.any()
    assert not last.candidates.segment[empty].any()
    assert not last.history.segment[empty].any()
    assert not any(b.history.supervised.any() for b in first)


def test_evaluation_history_reaches_back_into_training(tmp_path):
    sequences = dataset(tmp_path / "d", [list(range(10)), list(range(10))])
    (batch,) = evaluation_batches(sequences, CONFIG, "ranking", "test", 2)
    np.testing.assert_array_equal(batch.history.time, [list(range(8))] * 2)
    np.testing.assert_array_equal(batch.candidates.item, [[9, 10, 0], [19, 20, 0]])


def test_empty_parts_are_refused(tmp_path):
    sequences = dataset(tmp_path / "d", [[0, 0, 0, 5]])
    for make in (
        lambda: TrainStream(sequences, CONFIG, "requests", 2, 0),
        lambda: evaluation_batches(sequences, CONFIG, "ranking", "test", 2),
    ):
        with pytest.raises(UserError, match="'tiny' has no train events"):
            make()
