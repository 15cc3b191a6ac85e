"""Streaming evaluation: every impression is scored once, before it is trained on; a kill changes nothing."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax.config import Trial, override
from genrec_jax.data.pipeline import request_batches
from genrec_jax.data.rows import RowTable
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.noise import UserSums
from genrec_jax.train import loop
from genrec_jax.train import stream as streaming
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model
from genrec_jax.train.evaluate import make_scorer, scored
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import make_step
from genrec_jax.train.stream import Period, Scored, periods, stream
from tests.data.helpers import dataset, random_dataset
from tests.train.helpers import Stopped, trial_of

SETTINGS = {"seconds": 7, "rate": 0.5}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """Events of 60 users in seconds 0 to 199, the last fifth after about second 160."""
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60, requests=True)


@pytest.fixture(scope="module")
def trial(sequences: Sequences) -> Trial:
    return trial_of(sequences, **{"model.dropout": 0.2, "data.fraction": 0.7})


@pytest.fixture(scope="module")
def run(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(trial, folder)
    return folder


@pytest.fixture(scope="module")
def whole(trial: Trial, run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Scored]]:
    out = tmp_path_factory.mktemp("streamed") / "out"
    return out, stream(trial, run, out, **SETTINGS)


def assert_equal(found: UserSums, expected: UserSums) -> None:
    assert found.same_rows(expected)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_periods_by_hand(tmp_path: Path) -> None:
    """20 events, of which the last eight are evaluated: validation from second 40 on, test from 60 on."""
    early = list(range(12))
    sequences = dataset(tmp_path / "log", [[*early, 40, 44, 60], [41, 58, 63, 80, 81]])
    config = trial_of(sequences, **{"data.validation": 0.2, "data.test": 0.2}).data
    assert periods(sequences, config, 10) == [
        Period("validation", 40, 50),
        Period("validation", 50, 60),
        Period("test", 60, 70),
        Period("test", 80, 90),  # nothing happened from 70 to 80
    ]
    # Cut anew where the test part begins: no period lies in both.
    assert periods(sequences, config, 15) == [
        Period("validation", 40, 55),
        Period("validation", 55, 60),
        Period("test", 60, 75),
        Period("test", 75, 90),
    ]
    assert periods(sequences, config, 10**9) == [Period("validation", 40, 60), Period("test", 60, 60 + 10**9)]


def events_of(rows: RowTable) -> np.ndarray:
    return np.concatenate([np.arange(0), *map(np.arange, rows.target_start, rows.target_stop)])


def test_all_is_scored_before_it_is_trained_on_and_nothing_twice(
    sequences: Sequences, trial: Trial, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = np.asarray(sequences.time)
    known: list[int] = []  # events that were trained on, or handed over to be
    seen: list[int] = []
    todo = iter(periods(sequences, trial.data, 7))

    def score(self: Any, params: Any, rows: RowTable, call: Any = streaming._Worker.score) -> Scored:
        period = next(todo)
        events = events_of(rows)
        assert ((period.start <= time[events]) & (time[events] < period.stop)).all()
        assert not known or time[known].max() < time[events].min()
        # A history ends where the request begins, which no event of the request is before.
        assert (rows.history_stop <= rows.target_start).all()
        opens = sequences.request[rows.history_stop]
        assert (opens == sequences.request[rows.target_start]).all()
        seen.extend(events.tolist())
        found = call(self, params, rows)
        assert found.fixed.rows.sum() == found.streamed.rows.sum() == len(events)
        return found

    def train(self: Any, state: Any, rows: RowTable, period: Period, call: Any = streaming._Worker.train) -> Any:
        state, left = call(self, state, rows, period)
        assert len(left) == len(rows) % trial.train.batch_rows
        known.extend(events_of(rows)[: len(events_of(rows)) - len(events_of(left))].tolist())
        return state, left

    monkeypatch.setattr(streaming._Worker, "score", score)
    monkeypatch.setattr(streaming._Worker, "train", train)
    stream(trial, run, tmp_path / "out", **SETTINGS)
    start = periods(sequences, trial.data, 7)[0].start
    assert sorted(seen) == np.flatnonzero(time >= start).tolist()
    assert len(set(known)) == len(known)
    owner = np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
    taught = set(owner[known])
    assert 0 < len(taught) < len(set(owner[seen]))  # data.fraction


def test_one_period_for_each_part_is_the_fixed_split(trial: Trial, run: Path, tmp_path: Path) -> None:
    found = stream(trial, run, tmp_path / "out", seconds=10**6, rate=0.5)
    result = loop.json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert found["validation"].fixed.mean_ne() == pytest.approx(result["validation/ne"], rel=1e-6)
    assert found["test"].fixed.mean_ne() == pytest.approx(result["ne"], rel=1e-6)
    assert_equal(found["validation"].streamed, found["validation"].fixed)  # nothing has been trained on yet
    assert found["test"].apart().value != 0


def test_a_period_is_scored_by_the_steps_before_it(
    sequences: Sequences, trial: Trial, run: Path, whole: tuple[Path, dict[str, Scored]]
) -> None:
    """By hand: the first two periods' batches through the trial's optimiser at half its rate, without a schedule."""
    _, state = loop.restored_state(trial, run)
    model = abstract_model(trial, sequences.schema)
    rates = {name: 0.5 * getattr(trial.train, name) for name in ("learning_rate", "embedding_learning_rate")}
    own = override(
        trial, {f"train.{k}": v for k, v in rates.items()} | {"train.decay": "constant", "train.warmup": 0.0}
    )
    step = make_step(model, make_optimizer(own.train, 1))
    worker = streaming._Worker(trial, sequences, 0.5)
    waiting: list[RowTable] = []
    state = jax.tree.map(jnp.copy, state)
    for number, period in enumerate(periods(sequences, trial.data, 7)[:3], start=1):
        rows = worker.rows(period)
        batches = request_batches(sequences, trial.data, rows, 8)
        (found,) = scored(make_scorer(model), [state.params], batches, sequences.schema.tasks)
        kept = streaming.read_period(whole[0], number)
        np.testing.assert_allclose(found.sums().losses, kept.streamed.losses, rtol=1e-5)
        waiting.append(worker.trained_on(rows))
        joined = waiting[0]
        for more in waiting[1:]:
            joined = streaming._joined(joined, more)
        taken = 8 * (len(joined) // 8)
        for batch in request_batches(sequences, trial.data, joined.take(np.arange(taken)), 8):
            state, _ = step(state, batch)
        waiting = [joined.take(np.arange(taken, len(joined)))]
    assert not np.allclose(kept.streamed.losses, kept.fixed.losses, rtol=1e-3)


@pytest.mark.parametrize("at", ["before a checkpoint", "within a record"])
def test_a_killed_stream_goes_on_to_the_same_end(
    trial: Trial,
    run: Path,
    whole: tuple[Path, dict[str, Scored]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    out, expected = whole

    def saved(self: Checkpoints, step: int, *rest: Any, save: Any = Checkpoints.save) -> None:
        if step == 3 and at == "before a checkpoint":
            raise Stopped
        save(self, step, *rest)

    def written(path: Path, sums: UserSums, write: Any = streaming.write_users) -> None:
        if path.name == "00004.streamed.npz" and at == "within a record":
            raise Stopped
        write(path, sums)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        patch.setattr(streaming, "write_users", written)
        with pytest.raises(Stopped):
            stream(trial, run, tmp_path / "cut", **SETTINGS)
    told: list[int] = []
    found = stream(trial, run, tmp_path / "cut", **SETTINGS, on_period=lambda number, *_: told.append(number))
    assert told[0] == (3 if at == "before a checkpoint" else 4)
    for path in (out / "periods").iterdir():
        assert (tmp_path / "cut/periods" / path.name).read_bytes() == path.read_bytes()
    for part, scores in expected.items():
        assert_equal(found[part].streamed, scores.streamed)
    again = stream(trial, run, tmp_path / "cut", **SETTINGS, on_period=lambda *_: pytest.fail("nothing is left"))
    assert_equal(again["all"].streamed, expected["all"].streamed)


def test_parts_add_up(whole: tuple[Path, dict[str, Scored]]) -> None:
    _, found = whole
    assert found["all"].streamed.rows.sum() == sum(found[part].streamed.rows.sum() for part in ("validation", "test"))
    assert_equal(
        UserSums.pooled([found["test"].streamed, found["validation"].streamed]),
        UserSums.pooled([found["validation"].streamed, found["test"].streamed]),
    )


def test_other_settings_and_a_rate_too_large_are_refused(
    trial: Trial, run: Path, whole: tuple[Path, dict[str, Scored]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="other settings"):
        stream(trial, run, whole[0], seconds=7, rate=0.25)
    with pytest.raises(UserError, match="choose a smaller rate"):
        stream(trial, run, tmp_path / "out", seconds=5, rate=1e38)
    with pytest.raises(UserError, match="no checkpoint"):
        stream(trial, tmp_path / "none", tmp_path / "other", **SETTINGS)


def test_a_trial_that_leaves_the_test_part_unread_is_not_streamed_over_it(
    trial: Trial, run: Path, tmp_path: Path
) -> None:
    trial = override(trial, {"train.report_test": False})
    parts: list[str] = []
    found = stream(trial, run, tmp_path / "out", **SETTINGS, on_period=lambda *told: parts.append(told[2].part))
    assert set(parts) == {"validation"}
    assert found.keys() == {"validation", "all"}
    assert_equal(found["all"].streamed, found["validation"].streamed)
