"""One trial in training: its folder, its input stream, and what it remembers between steps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from genrec_jax.config import Trial
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.splits import Part
from genrec_jax.metrics import Metrics, RankingMetrics
from genrec_jax.models.base import Goal
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import Account
from genrec_jax.train.hardware import matmul_peak
from genrec_jax.train.optimizer import schedule
from genrec_jax.train.record import MetricsLog, flat, write_users
from genrec_jax.train.step import State
from genrec_jax.train.tensorboard import TensorBoard

# What tells the better of two evaluations: the metric, and whether more or less of it is better.
SELECTED_BY: dict[Goal, tuple[str, int]] = {"ranking": ("ne", -1), "retrieval": ("ndcg@10", 1)}


class Member:
    """A trial of a pack, which may be its only one. Its records do not show who else is in the pack.

    first: the step of the checkpoint it goes on from, or 0. steps: those behind it. status: "" while it trains.
    watched: the part that is evaluated along the way. validation: the metrics of its latest evaluation, in the end of
    the one whose parameters are tested, under ``validation/`` or ``test/``. tested_step: how many steps these had.
    train_seconds, compile_seconds, earlier_wall_seconds (of the runs before this one): its share of the pack's.
    """

    def __init__(self, trial: Trial, run_dir: Path, records: Path, stream: TrainStream, counts: Account):
        """``records``: where this process writes all but checkpoints; see `genrec_jax.distributed.processes`."""
        self.trial = trial
        self.records = records
        self.stream = stream
        self.counts = counts
        self.first = self.steps = self.tested_step = 0
        self.status: Literal["", "done", "diverged"] = ""
        self.watched: Part = "test" if trial.data.protocol == "original" else "validation"
        self.validation: dict[str, float] = {}
        self.train_seconds = self.compile_seconds = self.earlier_wall_seconds = 0.0
        self._first_loss: float | None = None
        self._rate = schedule(trial.train.learning_rate, counts.steps, trial.train.warmup, trial.train.decay)
        self._board = TensorBoard(records / "tensorboard")
        self._checkpoints = Checkpoints(run_dir / "checkpoints")
        self._log: MetricsLog | None = None

    def close(self) -> None:
        self.stream.close()
        if self._log is not None:
            self._log.close()
        self._checkpoints.close()
        self._board.close()

    def resume(self, state: State) -> State:
        """The state, the stream and the records of the newest checkpoint; without one, the given state."""
        restored = self._checkpoints.restore(state)
        if restored is not None:
            self.first, state, record = restored
            self.steps = self.first
            self.stream.set_state(record["stream"])
            self.train_seconds = record["train_seconds"]
            self.earlier_wall_seconds = record["wall_seconds"]
            self._first_loss = record["first_loss"]
            self._checkpoints.drop_after(self.first)
        self._log = MetricsLog(self.records / "metrics.jsonl", self.first)
        self._board.start(self.first)
        self._board.hparams(flat(self.trial.to_json()))
        for line in self._log.kept:
            # What the board held of this step is dropped with the start: a kill may have come before it was written.
            if line["step"] == self.first:
                self._board.scalars(_floats(line), self.first)
                self.validation |= self._evaluation(line)
        return state

    def trains_at(self, step: int) -> bool:
        """Whether the step with this number, from 1, is one that it has yet to take."""
        return not self.status and step > self.first

    def log(self, step: int, steps_per_second: float, loss: float, grad_norm: float) -> dict[str, Any]:
        """Records the loss before an update; the trial has "diverged" if it is not finite, or above three times the
        first one logged. Returns the line of ``metrics.jsonl``."""
        share = steps_per_second / self.counts.steps
        scalars = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self._rate(step - 1)),
            "examples_per_second": self.counts.targets * share,
            "achieved_flops": self.counts.train_flops * share,
            "mfu": self.counts.train_flops * share / matmul_peak(self.trial.train.precision),
        }
        line = {"step": step, "steps": self.counts.steps, **scalars}
        self._add(line)
        self._board.scalars(scalars, step)
        if self._diverged(loss):
            self.status = "diverged"
        return line

    def validated(self, step: int, found: Metrics) -> None:
        """Records the metrics of the watched part."""
        self.validation = {f"{self.watched}/{name}": value for name, value in found.result().items()}
        self._add({"step": step, "steps": self.counts.steps, **self.validation})
        self._board.scalars(_floats(self.validation), step)
        if not self.trial.train.report_test and (self.trial.train.select == "last" or self._is_best()):
            self.keep_users(found)

    def keep_users(self, found: Metrics) -> None:
        """Records what each user added to the NE that the result will hold; ranks add nothing to it."""
        if isinstance(found, RankingMetrics):
            write_users(self.records / "users.npz", found.sums())

    def save(self, step: int, state: State, wall_seconds: float, *, validated: bool) -> None:
        """Writes a checkpoint; ``validated``: scored by the latest evaluation, which is of this step."""
        self._board.flush()  # a resumed run does not write these steps again
        record = {
            "stream": self.stream.get_state(),
            "train_seconds": self.train_seconds,
            "wall_seconds": wall_seconds,
            "first_loss": self._first_loss,
        }
        score = self._score(self.validation) if validated else -math.inf
        self._checkpoints.save(step, state, record, score)

    def finish(self, state: State) -> State:
        """The trial is done; returns the state to be tested, and takes back the metrics of the best evaluation if it is
        that which is chosen."""
        assert self._log is not None
        self.status, self.tested_step = "done", self.steps
        if self.trial.train.select == "last":
            return state
        best = self._checkpoints.restore(state, best=True)
        assert best is not None  # the last step is always evaluated
        self.tested_step, state, _ = best
        (self.validation,) = [
            found for line in self._log.kept if line["step"] == self.tested_step and (found := self._evaluation(line))
        ]
        return state

    def draw(self, result: dict[str, Any]) -> None:
        """Adds the final numbers to the board."""
        self._board.scalars(_floats(result), self.steps)

    def _add(self, line: dict[str, Any]) -> None:
        assert self._log is not None  # opened by resume
        self._log.add(line)

    def _evaluation(self, line: dict[str, Any]) -> dict[str, float]:
        """What a line of the log says of the watched part."""
        return {key: value for key, value in line.items() if key.startswith(f"{self.watched}/")}

    def _is_best(self) -> bool:
        """Whether no evaluation was better than the latest."""
        assert self._log is not None
        scores = [self._score(found) for line in self._log.kept if (found := self._evaluation(line))]
        return scores[-1] == max(scores)

    def _score(self, evaluation: Mapping[str, float]) -> float:
        """For choosing among evaluations; the worst of all where the metric is undefined."""
        metric, sign = SELECTED_BY[self.trial.model.goal]
        return sign * evaluation.get(f"{self.watched}/{metric}", -sign * math.inf)

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self._first_loss is None:
            self._first_loss = loss
        return loss > 3.0 * max(self._first_loss, 0.1)


def _floats(record: dict[str, Any]) -> dict[str, float]:
    """What a board draws: counts are for the tables."""
    return {key: value for key, value in record.items() if isinstance(value, float)}
