"""Impressions made of clicks: what stands beside a click, and that the past does not give it away."""

from pathlib import Path

import numpy as np
import pytest

from experiments.sampled_negatives import main, sample_negatives
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.sequences import Sequences, save
from genrec_jax.errors import UserError

_USERS, _ITEMS, _EACH = 40, 30, 25


@pytest.fixture
def clicks(tmp_path: Path) -> Sequences:
    """1,000 clicks of 40 users on 30 items, so that second clicks are common, at distinct times."""
    rng = np.random.default_rng(0)
    events = _USERS * _EACH
    time = np.sort(rng.permutation(events).reshape(_USERS, _EACH), axis=1).ravel()
    features = {
        "region": rng.integers(1, 5, _USERS),
        "topic": rng.integers(1, 6, _ITEMS + 1),
        "device": rng.integers(1, 7, events),
    }
    levels = {"region": "user", "topic": "item", "device": "event"}
    schema = Schema(_ITEMS + 1, (), tuple(Feature(name, 8, 1, levels[name]) for name in features))
    return save(
        tmp_path / "clicks",
        name="clicks",
        schema=schema,
        origin=0,
        offsets=np.arange(_USERS + 1) * _EACH,
        item=rng.integers(1, _ITEMS + 1, events),
        time=time,
        labels=np.zeros((events, 0)),
        features=features,
    )


def test_every_first_click_stands_beside_recent_items_of_others(clicks: Sequences, tmp_path: Path) -> None:
    made = sample_negatives(clicks, tmp_path / "made", negatives=3, recent=50)
    by_time = np.empty(clicks.events, np.int64)
    by_time[clicks.time] = clicks.item
    assert made.request is not None
    shown, when, label, request = (
        column.reshape(-1, 4) for column in (made.item, made.time, made.labels, np.asarray(made.request))
    )
    for same in (when, request):
        assert (same == same[:, :1]).all()
    assert len(np.unique(request)) == len(request)
    assert (label.sum(axis=1) == 1).all()
    assert all(len(set(row.tolist())) == 4 for row in shown)
    np.testing.assert_array_equal(shown[label == 1], by_time[when[:, 0]])

    begun = np.searchsorted(made.offsets // 4, np.arange(len(shown)), side="right") - 1  # the user of each request
    expected = 0
    for user in range(_USERS):  # all have clicks after the first 50 of the log
        events = slice(user * _EACH, (user + 1) * _EACH)
        own = list(zip(clicks.time[events].tolist(), clicks.item[events].tolist()))
        expected += sum(t >= 50 and all(i != other for _, other in own[:k]) for k, (t, i) in enumerate(own))
        for row in np.flatnonzero(begun == user):
            t = when[row, 0]
            assert not {i for earlier, i in own if earlier < t} & set(shown[row].tolist())
            assert set(shown[row][label[row] == 0].tolist()) <= set(by_time[t - 50 : t].tolist())
    assert len(shown) == expected
    assert made.digest != clicks.digest


def test_what_is_clicked_later_is_shown_before_and_places_tell_nothing(clicks: Sequences, tmp_path: Path) -> None:
    made = sample_negatives(clicks, tmp_path / "made", negatives=3, recent=200)
    label = made.labels.reshape(-1, 4)
    assert label.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.07)
    later = 0
    for user in range(made.users):
        events = slice(made.offsets[user], made.offsets[user + 1])
        item, truth = made.item[events], made.labels[events, 0]
        later += sum(i in item[k + 1 :][truth[k + 1 :] == 1] for k, i in enumerate(item) if not truth[k])
    assert later > 100


def test_features_go_with_their_users_items_and_clicks(clicks: Sequences, tmp_path: Path) -> None:
    made = sample_negatives(clicks, tmp_path / "made", negatives=2, recent=50, users=0.5, seed=3)
    assert 5 < made.users < 35
    assert made.schema.tasks == ("click",)
    at = {int(t): event for event, t in enumerate(clicks.time)}
    event = np.array([at[int(t)] for t in made.time])
    np.testing.assert_array_equal(made.features["device"], clicks.features["device"][event])
    owner = np.repeat(made.features["region"], np.diff(made.offsets))
    np.testing.assert_array_equal(owner, clicks.features["region"][event // _EACH])
    np.testing.assert_array_equal(made.features["topic"], clicks.features["topic"])


def test_the_draw_does_not_depend_on_the_features_left_out(clicks: Sequences, tmp_path: Path) -> None:
    whole = sample_negatives(clicks, tmp_path / "whole", recent=50)
    bare = sample_negatives(clicks, tmp_path / "bare", recent=50, without=("device", "region"))
    assert [f.name for f in bare.schema.features] == ["topic"] == list(bare.features)
    np.testing.assert_array_equal(bare.item, whole.item)
    np.testing.assert_array_equal(bare.labels, whole.labels)
    assert bare.digest != whole.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "--negatives must be 1 at least"),
        ({"recent": 2}, "--recent no less than that"),
        ({"users": 0.0}, r"a share in \(0, 1\]"),
        ({"negatives": 30, "recent": 100}, "no click has 30 other items among the 100 before"),
        ({"without": ("device", "age")}, "no feature 'age'; it has region, topic, device"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(clicks: Sequences, tmp_path: Path, options, message) -> None:
    with pytest.raises(UserError, match=message):
        sample_negatives(clicks, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


def test_a_dataset_with_labels_is_refused_in_one_sentence(clicks: Sequences, tmp_path: Path, capsys) -> None:
    made = sample_negatives(clicks, tmp_path / "made", recent=50)
    assert main(made.path, out=tmp_path / "again") == 2
    assert "has labels or requests: what was shown is known" in capsys.readouterr().err
