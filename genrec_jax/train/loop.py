"""Trains trials in their folders, or resumes them where their last checkpoints left off: one, or a pack of several."""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from genrec_jax.batch import Batch
from genrec_jax.config import Trial, trial_from_json
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences, digest_of, load
from genrec_jax.data.splits import Part
from genrec_jax.distributed.mesh import context_of, tensor_of
from genrec_jax.distributed.processes import on_devices, records_of, share_of_rows, told_by_all
from genrec_jax.errors import UserError
from genrec_jax.metrics import Metrics
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import over_devices, rematerialised
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model, account, init_params, make_init
from genrec_jax.train.evaluate import Evaluator
from genrec_jax.train.hardware import device_name, matmul_peak
from genrec_jax.train.member import Member
from genrec_jax.train.optimizer import make_optimizer, make_row_rule, scalars
from genrec_jax.train.pack import check_pack
from genrec_jax.train.record import versions, write_json
from genrec_jax.train.step import State, init_state, pieces_here, placed_state, trial_step
from genrec_jax.train.stopping import Stopped, asked_to_stop
from genrec_jax.train.together import AtOnce, InTurn, Together
from kernels_pallas.target import target

FLOPS_FORMULA = "analytic per block; multiply-add 2; causal half; lookups 0; training 3 x forward; padding counted"

Progress = Callable[[dict[str, Any]], None]
PackProgress = Callable[[Trial, dict[str, Any]], None]


def train(
    trial: Trial,
    run_dir: Path,
    *,
    mesh: Mesh | None = None,
    remat: bool = False,
    offload: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains to the trial's budget, evaluates, and returns what it wrote to ``result.json``.

    ``mesh``: the devices that share the work, None for one. ``remat``: keep less for the backward pass and compute it
    again (:class:`genrec_jax.nn.stack.Stack`). ``offload``: keep the optimiser's state in the host's memory
    (`genrec_jax.distributed.host`). None is part of the trial: a run may go on with others.

    ``on_progress`` receives every line of ``metrics.jsonl`` that has a loss, as it is written. A loss that is not
    finite, or above three times the first one logged, ends the run with status "diverged". SIGTERM writes a checkpoint
    after the step at work and raises :class:`Stopped`. Raises UserError for unusable data.
    """
    tell = None if on_progress is None else lambda _, line: on_progress(line)
    return train_pack([trial], [run_dir], mesh=mesh, remat=remat, offload=offload, on_progress=tell)[0]


def train_pack(
    trials: Sequence[Trial],
    run_dirs: Sequence[Path],
    *,
    mesh: Mesh | None = None,
    remat: bool = False,
    offload: bool = False,
    on_progress: PackProgress | None = None,
) -> list[dict[str, Any]]:
    """As :func:`train`, for trials of one :func:`genrec_jax.train.pack.pack_key`, which take every step together.

    What is written into a trial's folder is what it would be alone, but for the order of sums; seconds are its share of
    the pack's. So a trial may go on in another pack, or alone. Those whose checkpoints are ahead wait for the others;
    a trial that diverges has its result at once, while the others go on. A ``mesh``, and to ``offload``, is for a trial
    alone.

    Raises UserError, beside what :func:`train` does, for trials that cannot be trained together.
    """
    started = time.perf_counter()
    check_pack(trials, mesh, offload=offload)
    trial = trials[0]
    sequences = load(trial.data.path)
    # What cannot be trained, or divided so, is refused before anything is written.
    over_devices(abstract_model(trial, sequences.schema), context_of(mesh), tensor_of(mesh))
    pieces_here(trial.train, mesh)
    share = share_of_rows(mesh, trial.train.batch_rows)
    streams = [
        TrainStream(sequences, one.data, one.model.rows, one.train.batch_rows, seed=one.seed, share=share)
        for one in trials
    ]
    # Only a retriever's loss asks how often an item is a target, and a ranker's rows may hold an event many times.
    popularity = Popularity(streams[0].target_counts()) if trial.model.goal == "retrieval" else None
    model = abstract_model(trial, sequences.schema, popularity)
    counts = [account(one, model, stream) for one, stream in zip(trials, streams, strict=True)]  # devices or not
    model = over_devices(rematerialised(model) if remat else model, context_of(mesh), tensor_of(mesh))
    with contextlib.ExitStack() as opened:
        members = []
        for one, run_dir, stream, own in zip(trials, run_dirs, streams, counts, strict=True):
            run_dir.mkdir(parents=True, exist_ok=True)
            records = opened.enter_context(records_of(run_dir))
            write_json(records / "config.json", one.to_json())
            members.append(Member(one, run_dir, records, stream, own))
            opened.callback(members[-1].close)
        return _Pack(members, sequences, model, mesh, offload, on_progress, started).run()


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
    """The data, the model and the trained parameters of a trial; see :func:`restored_state`."""
    sequences, state = restored_state(trial, run_dir)
    return sequences, abstract_model(trial, sequences.schema), state.params


def restored_state(trial: Trial, run_dir: Path) -> tuple[Sequences, State]:
    """The data and the state of a trained trial, from its newest checkpoint, or the best if it selects.

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
    return sequences, found[1]


class _Pack:
    """The training loop of one trial or several."""

    def __init__(
        self,
        members: list[Member],
        sequences: Sequences,
        model: Model,
        mesh: Mesh | None,
        offload: bool,
        on_progress: PackProgress | None,
        started: float,
    ):
        self._members = members
        self._sequences = sequences
        self._mesh = mesh
        self._on_progress = on_progress
        self._started = started
        self._train = members[0].trial.train
        (self._last,) = {member.counts.steps for member in members}
        self._evaluator = Evaluator(members[0].trial, sequences, model, mesh)
        self._results: list[dict[str, Any]] = [{} for _ in members]
        states = [member.resume(state) for member, state in zip(members, self._initial(offload))]
        step = trial_step(model, self._train, self._last, mesh)
        numbers = [scalars(member.trial.train) for member in members]
        where = jax.tree.map(lambda x: x.sharding, states[0]) if offload else None
        self._trials: Together
        if len(members) == 1 or target() == "cpu":
            self._trials = InTurn(step, states, numbers, where)
        else:
            self._trials = AtOnce(step, states, numbers)
        self._compiled = False
        self._marked = 0.0  # when the time that is not yet anybody's began

    def run(self) -> list[dict[str, Any]]:
        """Takes the steps that are left, evaluating on the way, and writes the results, which it returns."""
        with asked_to_stop() as asked:
            self._steps(asked)
        for member in self._members:
            member.stream.close()  # its threads would run beside the evaluation
        done = [place for place, member in enumerate(self._members) if not member.status]
        tested = [self._members[place].finish(self._trials.state(place)).params for place in done]
        if self._train.report_test and self._members[0].watched != "test":
            found: Sequence[Metrics | None] = self._evaluator.each(tested, "test")
        else:
            found = [None for _ in done]
        for place, metrics in zip(done, found):
            self._write(place, metrics)
        return self._results

    def _initial(self, offload: bool) -> list[State]:
        first = self._members[0].trial
        init = make_init(first, self._sequences.schema)
        optimizer, tables = make_optimizer(self._train, self._last), make_row_rule(self._train, self._last)

        def begun(seed: int) -> State:
            return init_state(init(seed), optimizer, seed, tables)

        begin = [functools.partial(begun, member.trial.seed) for member in self._members]
        return [placed_state(make, self._mesh, offload=offload) for make in begin]

    def _steps(self, asked: threading.Event) -> None:
        train = self._train
        since = min(member.first for member in self._members)
        saved = time.perf_counter()
        for step in range(since + 1, self._last + 1):
            at_work = self._at_work(step)
            if not at_work:
                continue
            self._advance(at_work)
            last = step == self._last
            if step % train.log_every == 0 or last:
                self._log(step, since, at_work)
                since, at_work = step, self._at_work(step)
            due = step % train.checkpoint_every == 0
            stopping, waited = asked.is_set(), time.perf_counter() - saved >= train.checkpoint_seconds
            if jax.process_count() > 1:  # they agree where they wait for one another anyway
                told = told_by_all([stopping, waited]) if due or step % train.log_every == 0 else np.zeros((1, 2), bool)
                stopping, waited = bool(told[:, 0].any()), bool(told[0, 1])
            checkpoint_due = last or stopping or (due and waited)
            validation_due = self._validation_due(step)
            if at_work and (checkpoint_due or validation_due):
                self._trials.wait()
                self._lap(at_work)
                if validation_due:
                    self._validate(step, at_work)
                # Evaluated first: a checkpoint is never without the evaluation of its step, and scored by it.
                if checkpoint_due or (validation_due and train.select == "best"):
                    for place in at_work:
                        member, state = self._members[place], self._trials.state(place)
                        member.save(step, state, self._wall_seconds(member), validated=validation_due)
                    saved = time.perf_counter()
                since, self._marked = step, time.perf_counter()
            if stopping:
                raise Stopped(step, self._last)

    def _at_work(self, step: int) -> list[int]:
        """The places of the trials that take this step: they have not diverged, nor are they ahead of it."""
        return [place for place, member in enumerate(self._members) if member.trains_at(step)]

    def _advance(self, at_work: list[int]) -> None:
        """Takes a step, which may still be under way when it returns."""
        batches = {}
        for place in at_work:
            batch = next(self._members[place].stream)
            batches[place] = batch if self._mesh is None else on_devices(self._mesh, batch, self._train.batch_rows)
            self._members[place].steps += 1
        if not self._compiled:
            self._compile(batches)
        self._trials.advance(batches)

    def _compile(self, batches: dict[int, Batch]) -> None:
        start = time.perf_counter()
        self._trials.compile(batches)
        self._compiled, self._marked = True, time.perf_counter()
        for member in self._members:
            member.compile_seconds = (self._marked - start) / len(self._members)

    def _log(self, step: int, since: int, at_work: list[int]) -> None:
        metrics = self._trials.metrics()
        share = max(self._lap(at_work), 1e-9)
        for place in at_work:
            member = self._members[place]
            pace = (step - max(since, member.first)) / share
            line = member.log(step, pace, metrics[place]["loss"], metrics[place]["grad_norm"])
            if self._on_progress:
                self._on_progress(member.trial, line)
            if member.status == "diverged":
                self._write(place, None)
        self._marked = time.perf_counter()

    def _lap(self, at_work: list[int]) -> float:
        """Shares the seconds since the mark among the trials at work; returns a share."""
        share = (time.perf_counter() - self._marked) / len(at_work)
        for place in at_work:
            self._members[place].train_seconds += share
        return share

    def _validation_due(self, step: int) -> bool:
        """Validation k of n follows the first step that is at least k / n of all; none precedes the first step."""
        n, steps = self._train.validations, self._last
        return step > 0 and step * n // steps > (step - 1) * n // steps

    def _validate(self, step: int, at_work: list[int]) -> None:
        params = [self._trials.state(place).params for place in at_work]
        for place, found in zip(at_work, self._evaluator.each(params, self._members[0].watched)):
            self._members[place].validated(step, found)

    def _write(self, place: int, tested: Metrics | None) -> None:
        """Writes the result of a trial that has come to its end; ``tested``: its metrics on the test part, if any."""
        member, train = self._members[place], self._train
        counts = member.counts.after(member.steps)
        result: dict[str, Any] = {"status": member.status, **dataclasses.asdict(counts)}
        if tested is not None:
            result |= tested.result()
            member.keep_users(tested)
        if member.status == "done":
            if member.watched == "test":
                result |= {name.removeprefix("test/"): value for name, value in member.validation.items()}
            member.draw(result)
            evaluated: Part = "test" if train.report_test else "validation"
            fingerprint = self._evaluator.fingerprint(evaluated)
            result |= member.validation | {"eval_set": fingerprint, "tested_step": member.tested_step}
            result["unseen_impressions"] = self._evaluator.unseen(evaluated, member.stream.seen_items())
        seconds = max(member.train_seconds, 1e-9)
        result |= {
            "train_seconds": member.train_seconds,
            "compile_seconds": member.compile_seconds,
            "wall_seconds": self._wall_seconds(member),
            "examples_per_second": counts.targets / seconds,
            "achieved_flops": counts.train_flops / seconds,
            "mfu": counts.train_flops / seconds / matmul_peak(train.precision),
            "flops_formula": FLOPS_FORMULA,
            "dataset": self._sequences.name,
            "device": device_name(),
            "devices": 1 if self._mesh is None else self._mesh.size,
            "finished": datetime.now(UTC).date().isoformat(),
            **versions(),
        }
        write_json(member.records / "result.json", result)
        self._results[place] = result

    def _wall_seconds(self, member: Member) -> float:
        return member.earlier_wall_seconds + (time.perf_counter() - self._started) / len(self._members)
