"""Trains one trial in its folder, or resumes it where its last checkpoint left off."""

import contextlib
import dataclasses
import functools
import json
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from genrec_jax.config import Trial, trial_from_json
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences, digest_of, load
from genrec_jax.data.splits import Part
from genrec_jax.distributed.mesh import context_of
from genrec_jax.distributed.processes import on_devices, records_of, share_of_rows, told_by_all
from genrec_jax.errors import UserError
from genrec_jax.models.base import Goal
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import over_context, rematerialised
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import Account, abstract_model, account, init_params
from genrec_jax.train.evaluate import Evaluator
from genrec_jax.train.hardware import device_name, matmul_peak
from genrec_jax.train.optimizer import make_optimizer, make_row_rule, schedule
from genrec_jax.train.record import MetricsLog, versions, write_json
from genrec_jax.train.step import State, init_state, make_step, pieces_here, placed_state
from genrec_jax.train.stopping import Stopped, asked_to_stop
from genrec_jax.train.tensorboard import TensorBoard

# What tells the better of two evaluations: the metric, and whether more or less of it is better.
SELECTED_BY: dict[Goal, tuple[str, int]] = {"ranking": ("ne", -1), "retrieval": ("ndcg@10", 1)}

FLOPS_FORMULA = "analytic per block; multiply-add 2; causal half; lookups 0; training 3 x forward; padding counted"

Progress = Callable[[dict[str, Any]], None]


def train(
    trial: Trial,
    run_dir: Path,
    *,
    mesh: Mesh | None = None,
    remat: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains to the trial's budget, evaluates, and returns what it wrote to ``result.json``.

    ``mesh``: the devices that share the work, None for one. ``remat``: keep less for the backward pass and compute it
    again (:class:`genrec_jax.nn.stack.Stack`). Neither is part of the trial: a run may go on with others.

    ``on_progress`` receives every line of ``metrics.jsonl`` that has a loss, as it is written. A loss that is not
    finite, or above three times the first one logged, ends the run with status "diverged". SIGTERM writes a checkpoint
    after the step at work and raises :class:`Stopped`. Raises UserError for unusable data.
    """
    started = time.perf_counter()
    sequences = load(trial.data.path)
    # What cannot be trained, or divided so, is refused before anything is written.
    over_context(abstract_model(trial, sequences.schema), context_of(mesh))
    pieces_here(trial.train, mesh)
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = trial.train.batch_rows
    stream = TrainStream(
        sequences, trial.data, trial.model.rows, rows, seed=trial.seed, share=share_of_rows(mesh, rows)
    )
    # Only a retriever's loss asks how often an item is a target, and a ranker's rows may hold an event many times.
    popularity = Popularity(stream.target_counts()) if trial.model.goal == "retrieval" else None
    model = abstract_model(trial, sequences.schema, popularity)
    model = over_context(rematerialised(model) if remat else model, context_of(mesh))
    counts = account(trial, model, stream)
    evaluator = Evaluator(trial, sequences, model, mesh)
    begin = functools.partial(init_params, trial, sequences.schema)
    with (
        records_of(run_dir) as records,
        contextlib.closing(TensorBoard(records / "tensorboard")) as board,
    ):
        write_json(records / "config.json", trial.to_json())
        run = _Run(trial, run_dir, records, model, begin, stream, counts, evaluator, board, mesh, on_progress)
        state, status = run.fit()
        counts = counts.after(run.steps)
        result: dict[str, Any] = {"status": status, **dataclasses.asdict(counts)}
        if status == "done":
            if run.watched == "test":
                result |= {name.removeprefix("test/"): value for name, value in run.validation.items()}
            elif trial.train.report_test:
                result |= evaluator(state.params, "test")
            board.scalars(_floats(result), counts.steps)
            evaluated: Part = "test" if trial.train.report_test else "validation"
            result |= run.validation | {"eval_set": evaluator.fingerprint(evaluated), "tested_step": run.tested_step}
            result["unseen_impressions"] = evaluator.unseen(evaluated, stream.seen_items())
        result |= {
            "train_seconds": run.train_seconds,
            "compile_seconds": run.compile_seconds,
            "wall_seconds": run.earlier_wall_seconds + time.perf_counter() - started,
            "examples_per_second": counts.targets / max(run.train_seconds, 1e-9),
            "achieved_flops": counts.train_flops / max(run.train_seconds, 1e-9),
            "mfu": counts.train_flops / max(run.train_seconds, 1e-9) / matmul_peak(trial.train.precision),
            "flops_formula": FLOPS_FORMULA,
            "dataset": sequences.name,
            "device": device_name(),
            "devices": 1 if mesh is None else mesh.size,
            "finished": datetime.now(UTC).date().isoformat(),
            **versions(),
        }
        write_json(records / "result.json", result)
    return result


def read_trial(folder: Path) -> Trial:
    """The trial of a folder. Raises UserError if it holds none, or if its data are not those it was trained on."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no trial: it has no config.json that can be read") from None
    trial = trial_from_json(record)
    if trial.data.digest and digest_of(trial.data.path) != trial.data.digest:
        raise UserError(f"{folder} was trained on other data than {trial.data.path} holds now")
    return trial


def restored(trial: Trial, run_dir: Path) -> tuple[Sequences, Model, Any]:
    """The data, the model and the trained parameters of a trial, from its newest checkpoint, or the best if it selects.

    Raises UserError for unusable data, or if the folder has no checkpoint.
    """
    sequences = load(trial.data.path)
    like = init_state(
        init_params(trial, sequences.schema), make_optimizer(trial.train, 1), trial.seed, make_row_rule(trial.train, 1)
    )
    folder = run_dir / "checkpoints"
    found = None
    if folder.is_dir():
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            found = checkpoints.restore(like, best=trial.train.select == "best")
    if found is None:
        raise UserError(f"{run_dir} has no checkpoint")
    return sequences, abstract_model(trial, sequences.schema), found[1].params


class _Run:
    """The training loop with what it carries between steps.

    watched: the part that is evaluated along the way. validation: the metrics of its latest evaluation, after the fit
    of the one whose parameters are tested, under ``validation/`` or ``test/``. tested_step: how many steps these had.
    """

    def __init__(
        self,
        trial: Trial,
        run_dir: Path,
        records: Path,
        model: Model,
        begin: Callable[[], Any],
        stream: TrainStream,
        counts: Account,
        evaluator: Evaluator,
        board: TensorBoard,
        mesh: Mesh | None,
        on_progress: Progress | None,
    ):
        self.trial = trial
        self.run_dir, self.records = run_dir, records
        self.stream = stream
        self.counts = counts
        self.evaluator = evaluator
        self.board = board
        self.mesh = mesh
        self.on_progress = on_progress
        self.steps = 0
        self.watched: Part = "test" if trial.data.protocol == "original" else "validation"
        self.validation: dict[str, float] = {}
        self.tested_step = 0
        self.train_seconds = 0.0
        self.compile_seconds = 0.0
        self.earlier_wall_seconds = 0.0
        self._started = time.perf_counter()
        self._first_loss: float | None = None
        optimizer = make_optimizer(trial.train, counts.steps)
        tables = make_row_rule(trial.train, counts.steps)
        self._state = placed_state(lambda: init_state(begin(), optimizer, trial.seed, tables), mesh)
        self._step: Any = make_step(model, optimizer, pieces_here(trial.train, mesh), tables, mesh)
        self._rate = schedule(trial.train.learning_rate, counts.steps, trial.train.warmup, trial.train.decay)

    def fit(self) -> tuple[State, str]:
        """Runs to the last step, evaluating on the way; returns the state to be tested and "done" or "diverged"."""
        checkpoints = Checkpoints(self.run_dir / "checkpoints")
        batches = iter(self.stream)
        first = 0
        restored = checkpoints.restore(self._state)
        if restored is not None:
            first, self._state, record = restored
            self.steps = first
            batches.set_state(record["stream"])
            self.train_seconds = record["train_seconds"]
            self.earlier_wall_seconds = record["wall_seconds"]
            self._first_loss = record["first_loss"]
            checkpoints.drop_after(first)
        log = MetricsLog(self.records / "metrics.jsonl", first)
        self.board.start(first)
        self.board.hparams(_flat(self.trial.to_json()))
        for record in log.kept:
            # What the board held of this step is dropped with the start: a kill may have come before it was written.
            if record["step"] == first:
                self.board.scalars(_floats(record), first)
                self.validation |= self._evaluation(record)
        try:
            with asked_to_stop() as asked:
                status = self._steps(first, batches, log, checkpoints, asked)
            self.tested_step = self.steps
            if self.trial.train.select == "best" and status == "done":
                self._select(checkpoints, log)
        finally:
            self.stream.close()
            log.close()
            checkpoints.close()
        return self._state, status

    def _steps(
        self, first: int, batches: Any, log: MetricsLog, checkpoints: Checkpoints, asked: threading.Event
    ) -> str:
        step_fn: Any = None
        since = first
        train = self.trial.train
        marked = saved = time.perf_counter()
        for step in range(first + 1, self.counts.steps + 1):
            batch = next(batches)
            if self.mesh is not None:
                batch = on_devices(self.mesh, batch, train.batch_rows)
            if step_fn is None:
                step_fn = self._compile(batch)
                marked = time.perf_counter()
            self._state, metrics = step_fn(self._state, batch)
            self.steps = step
            last = step == self.counts.steps
            if step % train.log_every == 0 or last:
                loss = float(metrics["loss"])
                now = time.perf_counter()
                self.train_seconds += now - marked
                pace = (step - since) / max(now - marked, 1e-9)
                self._log(log, step, pace, loss=loss, grad_norm=float(metrics["grad_norm"]))
                since, marked = step, time.perf_counter()
                if self._diverged(loss):
                    return "diverged"
            due = step % train.checkpoint_every == 0
            stopping, waited = asked.is_set(), time.perf_counter() - saved >= train.checkpoint_seconds
            if jax.process_count() > 1:  # they agree where they wait for one another anyway
                told = told_by_all([stopping, waited]) if due or step % train.log_every == 0 else np.zeros((1, 2), bool)
                stopping, waited = bool(told[:, 0].any()), bool(told[0, 1])
            checkpoint_due = last or stopping or (due and waited)
            validation_due = self._validation_due(step)
            if checkpoint_due or validation_due:
                jax.block_until_ready(self._state)
                self.train_seconds += time.perf_counter() - marked
                if validation_due:
                    self._validate(log, step)
                # Evaluated first: a checkpoint is never without the evaluation of its step, and scored by it.
                if checkpoint_due or (validation_due and train.select == "best"):
                    self.board.flush()  # a resumed run does not write these steps again
                    score = self._score() if validation_due else -math.inf
                    checkpoints.save(step, self._state, self._record(batches), score)
                    saved = time.perf_counter()
                since, marked = step, time.perf_counter()
            if stopping:
                raise Stopped(step, self.counts.steps)
        return "done"

    def _validation_due(self, step: int) -> bool:
        """Validation k of n follows the first step that is at least k / n of all; none precedes the first step."""
        n, steps = self.trial.train.validations, self.counts.steps
        return step > 0 and step * n // steps > (step - 1) * n // steps

    def _validate(self, log: MetricsLog, step: int) -> None:
        found = self.evaluator(self._state.params, self.watched)
        self.validation = {f"{self.watched}/{name}": value for name, value in found.items()}
        log.add({"step": step, "steps": self.counts.steps, **self.validation})
        self.board.scalars(_floats(self.validation), step)

    def _evaluation(self, record: dict[str, Any]) -> dict[str, float]:
        """What a line of the log says of the watched part."""
        return {key: value for key, value in record.items() if key.startswith(f"{self.watched}/")}

    def _score(self) -> float:
        """Of the latest evaluation, for choosing; the worst of all where the metric is undefined."""
        metric, sign = SELECTED_BY[self.trial.model.goal]
        return sign * self.validation.get(f"{self.watched}/{metric}", -sign * math.inf)

    def _select(self, checkpoints: Checkpoints, log: MetricsLog) -> None:
        """Takes back the state and the metrics of the best evaluation."""
        best = checkpoints.restore(self._state, best=True)
        assert best is not None  # the last step is always evaluated
        self.tested_step, self._state, _ = best
        (self.validation,) = [
            found for record in log.kept if record["step"] == self.tested_step and (found := self._evaluation(record))
        ]

    def _compile(self, batch: Any) -> Any:
        start = time.perf_counter()
        compiled = self._step.lower(self._state, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def _record(self, batches: Any) -> dict[str, Any]:
        return {
            "stream": batches.get_state(),
            "train_seconds": self.train_seconds,
            "wall_seconds": self.earlier_wall_seconds + time.perf_counter() - self._started,
            "first_loss": self._first_loss,
        }

    def _log(self, log: MetricsLog, step: int, steps_per_second: float, **measured: float) -> None:
        share = steps_per_second / self.counts.steps
        scalars = {
            **measured,
            "learning_rate": float(self._rate(step - 1)),
            "examples_per_second": self.counts.targets * share,
            "achieved_flops": self.counts.train_flops * share,
            "mfu": self.counts.train_flops * share / matmul_peak(self.trial.train.precision),
        }
        record = {"step": step, "steps": self.counts.steps, **scalars}
        log.add(record)
        self.board.scalars(scalars, step)
        if self.on_progress:
            self.on_progress(record)

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self._first_loss is None:
            self._first_loss = loss
        return loss > 3.0 * max(self._first_loss, 0.1)


def _floats(record: dict[str, Any]) -> dict[str, float]:
    """What a board draws: counts are for the tables."""
    return {key: value for key, value in record.items() if isinstance(value, float)}


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if not isinstance(value, list | tuple) else json.dumps(value)
    return out
