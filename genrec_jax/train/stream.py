"""Streaming evaluation: predict the next period, then train on it (Blum, Kalai & Langford, COLT 1999), and so on.

The fixed split asks of a model what happened long after its training ended. Here a trained trial goes on where its
training part ended: every impression of a period is scored before any of that period has been trained on, with a
history of what came before its request; then the period's impressions are trained on once, shuffled. Beside it the
trial as it was scores the same impressions.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax.config import DataConfig, Trial
from genrec_jax.data.pipeline import request_batches
from genrec_jax.data.rows import RowTable, evaluation_rows, request_rows
from genrec_jax.data.sequences import Sequences
from genrec_jax.data.splits import Part, boundary_times, hash64, kept_users, split_at
from genrec_jax.errors import UserError
from genrec_jax.models.registry import Model
from genrec_jax.noise import Difference, UserSums, difference
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model
from genrec_jax.train.evaluate import batch_rows, make_scorer, scored
from genrec_jax.train.loop import restored_state
from genrec_jax.train.optimizer import scalars
from genrec_jax.train.record import read_users, write_json, write_users
from genrec_jax.train.step import State, jitted, trial_step

_COLUMNS = ("user", "history_start", "history_stop", "target_start", "target_stop")


@dataclasses.dataclass(frozen=True)
class Period:
    """Events from ``start`` on and before ``stop`` (seconds since the dataset's first event), all of one ``part`` of
    the fixed split."""

    part: Part
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the users of some impressions added to NE: of the trial as it was (``fixed``), and as it went on."""

    fixed: UserSums
    streamed: UserSums

    def apart(self) -> Difference:
        """The NE of the latter minus that of the former."""
        return difference([self.fixed], [self.streamed])


def periods(sequences: Sequences, config: DataConfig, seconds: int) -> list[Period]:
    """The periods after the training part that have events, oldest first.

    They are cut from the beginning of the validation part on, and anew from that of the test part.
    """
    validation, test = boundary_times(sequences, config.validation, config.test)
    starts: set[int] = set()
    for _, (time,) in sequences.scan("time"):
        late = time[time >= validation].astype(np.int64)
        origin = np.where(late < test, validation, test)
        starts.update(np.unique(origin + (late - origin) // seconds * seconds).tolist())
    return [
        Period("validation", start, min(start + seconds, test))
        if start < test
        else Period("test", start, start + seconds)
        for start in sorted(starts)
    ]


def stream(
    trial: Trial,
    run_dir: Path,
    out: Path,
    *,
    seconds: int,
    rate: float,
    on_period: Callable[[int, int, Period, Scored], None] | None = None,
) -> dict[str, Scored]:
    """Streams a finished ranking trial over the periods after its training part; returns what its users added to NE, by
    part of the fixed split and ("all") together.

    The optimiser goes on with its moments, at ``rate`` times the trial's learning rates, constant. Batches are the
    trial's; impressions that do not fill one wait for the next period. Of a period at most ``data.eval_impressions``
    are scored; those of the users in ``data.fraction`` are trained on.
    A trial that leaves the test part unread is streamed over the validation part alone.

    What was scored is written under ``out/periods`` as soon as it is known, with a checkpoint after each period: run
    again, it goes on after the last one. ``on_period``: (its number from 1, how many there are, the period, what was
    scored). Raises UserError for a trial that cannot be restored, for an ``out`` of other settings, and for a loss
    that is not finite.
    """
    _settle(out, {"trial": trial.hash, "period_seconds": seconds, "rate": rate})
    sequences, state = restored_state(trial, run_dir)
    frozen = jax.tree.map(jnp.copy, state.params)  # a step consumes the state that it is given
    todo = periods(sequences, trial.data, seconds)
    if not trial.train.report_test:
        todo = [period for period in todo if period.part == "validation"]
    worker = _Worker(trial, sequences, rate)
    with contextlib.closing(Checkpoints(out / "checkpoints")) as checkpoints:
        done, waiting = 0, _no_rows()
        found = checkpoints.restore(state)
        if found is not None:
            done, state, record = found
            waiting = _from_columns(record["waiting"])
            checkpoints.drop_after(done)
        for number, period in enumerate(todo[done:], start=done + 1):
            rows = worker.rows(period)
            scores = worker.score([frozen, state.params], rows)
            _write(out, number, scores)
            state, waiting = worker.train(state, _joined(waiting, worker.trained_on(rows)), period)
            checkpoints.save(number, state, {"waiting": _to_lists(waiting)})
            if on_period is not None:
                on_period(number, len(todo), period, scores)
    return _together(out, todo)


class _Worker:
    """One trial's compiled programs, and its rows of a period."""

    def __init__(self, trial: Trial, sequences: Sequences, rate: float):
        model: Model = abstract_model(trial, sequences.schema)
        config = dataclasses.replace(
            trial.train,
            learning_rate=rate * trial.train.learning_rate,
            embedding_learning_rate=rate * trial.train.embedding_learning_rate,
            warmup=0.0,
            decay="constant",
        )
        self._data, self._sequences, self._batch_rows = trial.data, sequences, trial.train.batch_rows
        self._seed = trial.seed
        self._kept = kept_users(sequences.users, trial.data.fraction)
        self._eval_rows = batch_rows(trial.train)
        self._scorer = make_scorer(model)
        self._step: Any = jitted(trial_step(model, config, 1))
        self._scalars = scalars(config)

    def rows(self, period: Period) -> RowTable:
        """The requests of a period."""
        split = split_at(self._sequences, (period.start, period.stop))
        data = self._data
        return request_rows(self._sequences, split, "validation", data.history, data.candidates)

    def trained_on(self, rows: RowTable) -> RowTable:
        """Those of the users whose events are trained on, shuffled: a batch of one user's would be a step towards that
        user."""
        own = rows.take(np.flatnonzero(self._kept[rows.user]))
        return own.take(np.argsort(hash64(own.target_start, self._seed)))

    def score(self, params: list[Any], rows: RowTable) -> Scored:
        """By the parameters of the trial as it was, and as it went on."""
        chosen = evaluation_rows(rows, self._data.eval_impressions)
        batches = request_batches(self._sequences, self._data, chosen, self._eval_rows)
        fixed, streamed = scored(self._scorer, params, batches, self._sequences.schema.tasks)
        return Scored(fixed.sums(), streamed.sums())

    def train(self, state: State, rows: RowTable, period: Period) -> tuple[State, RowTable]:
        """Takes a step for every whole batch, in order; returns the rows that are left, too."""
        whole = len(rows) // self._batch_rows * self._batch_rows
        losses = []
        for batch in request_batches(self._sequences, self._data, rows.take(np.arange(whole)), self._batch_rows):
            state, metrics = self._step(state, batch, self._scalars)
            losses.append(metrics["loss"])
        if not all(math.isfinite(float(loss)) for loss in losses):
            raise UserError(
                f"the loss is not finite in the period from second {period.start} on: choose a smaller rate"
            )
        return state, rows.take(np.arange(whole, len(rows)))


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder of other settings, and writes them into a new one."""
    file = out / "stream.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    elif json.loads(file.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{out} holds a streaming evaluation with other settings: choose another folder")


def _write(out: Path, number: int, scores: Scored) -> None:
    for name, sums in _named(out, number):
        name.parent.mkdir(parents=True, exist_ok=True)
        write_users(name, getattr(scores, sums))


def read_period(out: Path, number: int) -> Scored:
    """What was scored in a period (from 1). Raises UserError if its record cannot be read."""
    found = {}
    for path, name in _named(out, number):
        sums = read_users(path)
        if sums is None:
            raise UserError(f"{path} cannot be read: remove {out} and run the same command again")
        found[name] = sums
    return Scored(**found)


def _named(out: Path, number: int) -> Iterator[tuple[Path, str]]:
    for name in ("fixed", "streamed"):
        yield out / "periods" / f"{number:05d}.{name}.npz", name


def _together(out: Path, todo: list[Period]) -> dict[str, Scored]:
    parts: dict[str, list[Scored]] = {"validation": [], "test": [], "all": []}
    for number, period in enumerate(todo, start=1):
        scores = read_period(out, number)
        parts[period.part].append(scores)
        parts["all"].append(scores)
    return {
        part: Scored(UserSums.pooled([one.fixed for one in own]), UserSums.pooled([one.streamed for one in own]))
        for part, own in parts.items()
        if own
    }


def _no_rows() -> RowTable:
    return _from_columns({name: [] for name in _COLUMNS})


def _joined(first: RowTable, second: RowTable) -> RowTable:
    return _from_columns({name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in _COLUMNS})


def _to_lists(rows: RowTable) -> dict[str, list[int]]:
    return {name: getattr(rows, name).tolist() for name in _COLUMNS}


def _from_columns(columns: Mapping[str, Any]) -> RowTable:
    """From arrays, or lists as :func:`_to_lists` makes them."""
    arrays = {name: np.asarray(columns[name], np.int32 if name == "user" else np.int64) for name in _COLUMNS}
    return RowTable(**arrays, supervised=False)
