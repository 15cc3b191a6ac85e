"""Trains one trial in its folder, or resumes it where its last checkpoint left off."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genrec_jax.config import Trial
from genrec_jax.data.pipeline import TrainStream, evaluation_batches, evaluation_fingerprint
from genrec_jax.data.sequences import Sequences, load
from genrec_jax.data.splits import Part
from genrec_jax.models.registry import Model
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import Account, abstract_model, account, init_params
from genrec_jax.train.evaluate import evaluate, make_scorer
from genrec_jax.train.hardware import matmul_peak
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.record import MetricsLog, versions, write_json
from genrec_jax.train.step import State, init_state, make_step
from genrec_jax.train.tensorboard import TensorBoard

FLOPS_FORMULA = "analytic per block; multiply-add 2; causal half; lookups 0; training 3 x forward; padding counted"

Progress = Callable[[dict[str, Any]], None]


def train(trial: Trial, run_dir: Path, *, on_progress: Progress | None = None) -> dict[str, Any]:
    """Trains to the trial's budget, evaluates, and returns what it wrote to ``result.json``.

    ``on_progress`` receives every line of ``metrics.jsonl`` as it is written. A loss that is not finite, or above three
    times the first one logged, ends the run with status "diverged". Raises UserError for unusable data.
    """
    started = time.perf_counter()
    sequences = load(trial.data.path)
    model = abstract_model(trial, sequences.schema)
    run_dir.mkdir(parents=True, exist_ok=True)
    stream = TrainStream(sequences, trial.data, trial.model.rows, trial.train.batch_rows, seed=trial.seed)
    counts = account(trial, model, stream)
    write_json(run_dir / "config.json", trial.to_json())
    board = TensorBoard(run_dir / "tensorboard")
    board.hparams(_flat(trial.to_json()))
    run = _Run(trial, run_dir, model, init_params(trial, sequences.schema), stream, counts, board, on_progress)
    state, status = run.fit()
    counts = counts.after(run.steps)
    result: dict[str, Any] = {"status": status, **dataclasses.asdict(counts)}
    if status == "done":
        result |= _evaluate(trial, sequences, model, state)
        board.scalars({k: v for k, v in result.items() if isinstance(v, float)}, counts.steps)
    result |= {
        "train_seconds": run.train_seconds,
        "compile_seconds": run.compile_seconds,
        "wall_seconds": run.earlier_wall_seconds + time.perf_counter() - started,
        "examples_per_second": counts.targets / max(run.train_seconds, 1e-9),
        "achieved_flops": counts.train_flops / max(run.train_seconds, 1e-9),
        "mfu": counts.train_flops / max(run.train_seconds, 1e-9) / matmul_peak(trial.train.precision),
        "flops_formula": FLOPS_FORMULA,
        "dataset": sequences.name,
        "device": jax.devices()[0].device_kind,
        **versions(),
    }
    board.close()
    write_json(run_dir / "result.json", result)
    return result


def _evaluate(trial: Trial, sequences: Sequences, model: Model, state: State) -> dict[str, Any]:
    """Test metrics under their own names, validation metrics under ``validation/``."""
    scorer = make_scorer(model)
    out: dict[str, Any] = {}
    parts: tuple[tuple[Part, str], ...] = (("test", ""), ("validation", "validation/"))
    for part, prefix in parts:
        batches = evaluation_batches(sequences, trial.data, trial.model.goal, part, trial.train.batch_rows)
        found = evaluate(model, scorer, state.params, batches, sequences.schema.tasks)
        out |= {f"{prefix}{name}": value for name, value in found.items()}
    out["eval_set"] = evaluation_fingerprint(sequences, trial.data, trial.model.goal, "test")
    return out


class _Run:
    """The training loop with what it carries between steps."""

    def __init__(
        self,
        trial: Trial,
        run_dir: Path,
        model: Model,
        params: Any,
        stream: TrainStream,
        counts: Account,
        board: TensorBoard,
        on_progress: Progress | None,
    ):
        self.trial = trial
        self.run_dir = run_dir
        self.stream = stream
        self.counts = counts
        self.board = board
        self.on_progress = on_progress
        self.steps = 0
        self.train_seconds = 0.0
        self.compile_seconds = 0.0
        self.earlier_wall_seconds = 0.0
        self._started = time.perf_counter()
        self._first_loss: float | None = None
        optimizer = make_optimizer(trial.train, counts.steps)
        self._state = init_state(params, optimizer, trial.seed)
        self._step: Any = make_step(model, optimizer, trial.train.pieces)

    def fit(self) -> tuple[State, str]:
        """Runs to the last step; returns the final state and "done" or "diverged"."""
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
        log = MetricsLog(self.run_dir / "metrics.jsonl", first)
        try:
            status = self._steps(first, batches, log, checkpoints)
        finally:
            self.stream.close()
            log.close()
            checkpoints.close()
        return self._state, status

    def _steps(self, first: int, batches: Any, log: MetricsLog, checkpoints: Checkpoints) -> str:
        step_fn: Any = None
        since = first
        marked = saved = time.perf_counter()
        train = self.trial.train
        for step in range(first + 1, self.counts.steps + 1):
            batch = next(batches)
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
                self._log(log, step, loss, float(metrics["grad_norm"]), (step - since) / max(now - marked, 1e-9))
                since, marked = step, time.perf_counter()
                if self._diverged(loss):
                    return "diverged"
            due = step % train.checkpoint_every == 0 and time.perf_counter() - saved >= train.checkpoint_seconds
            if due or last:
                jax.block_until_ready(self._state)
                self.train_seconds += time.perf_counter() - marked
                checkpoints.save(step, self._state, self._record(batches))
                since, marked = step, time.perf_counter()
                saved = marked
        return "done"

    def _compile(self, batch: Any) -> Any:
        start = time.perf_counter()
        compiled = self._step.lower(self._state, jax.tree.map(np.asarray, batch)).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def _record(self, batches: Any) -> dict[str, Any]:
        return {
            "stream": batches.get_state(),
            "train_seconds": self.train_seconds,
            "wall_seconds": self.earlier_wall_seconds + time.perf_counter() - self._started,
            "first_loss": self._first_loss,
        }

    def _log(self, log: MetricsLog, step: int, loss: float, grad_norm: float, steps_per_second: float) -> None:
        share = steps_per_second / self.counts.steps
        scalars = {
            "loss": loss,
            "grad_norm": grad_norm,
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


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if not isinstance(value, list | tuple) else json.dumps(value)
    return out
