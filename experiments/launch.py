"""Runs the trials of a study, several at a time, each attempt where an executor finds room for it.

A launch may be killed at any moment, worker or launcher, and run again: finished trials are skipped, the others resume
from their checkpoints, and no trial is ever trained by two processes at once.
"""

import contextlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.executors import Began, Ended, Executor, Progress, Task, Training, Waiting, Word
from experiments.folder import only_launcher, read_record, read_result, trial_folder
from experiments.progress import Reporter, duration, make_reporter
from experiments.study import PlannedTrial
from experiments.table import rebuild_table
from genrec_jax.errors import UserError
from genrec_jax.train.pack import pack_key
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json

TRAINER = "genrec_jax.train.loop:train_pack"
ATTEMPTS = 3
ALONE = Training()
_TICK = 0.2


@dataclass(frozen=True)
class Summary:
    """What came of a launch. earlier: trials already finished when it began (counted in done or diverged, too)."""

    total: int
    earlier: int
    done: int
    diverged: int
    failed: tuple[str, ...]
    wall_seconds: float
    table: Place


def run_study(
    planned: list[PlannedTrial],
    out: Place,
    *,
    executor: Executor,
    quiet: bool,
    how: Training = ALONE,
    trainer: str = TRAINER,
) -> Summary:
    """Trains every planned trial that has no result yet and rebuilds ``out/results.csv``; closes the executor.

    Up to ``how.pack`` trials that may be trained together (:func:`genrec_jax.train.pack.pack_key`) are one attempt;
    those of a pack that fails are tried again one by one. A trial that crashes is tried three times, then recorded as
    failed; the next launch tries it again. An attempt that was ended from outside (a lost node) counts only if it got
    no further than those before it. Ctrl-C (or SIGTERM) stops the workers, says how to go on and exits with 130 (143).
    Raises UserError for a second launcher on ``out`` and, once every other trial is through, for a trial whose
    configuration or data is refused.
    """
    with contextlib.closing(executor):
        if not planned:
            raise UserError("the study has no trials")
        out.mkdir(parents=True, exist_ok=True)
        with only_launcher(out):
            return _Launch(planned, out, executor, quiet, how, trainer).run()


@dataclass
class _Job:
    """A trial to run; ``cost`` in the launch's unit of work.

    attempts: how many were started. tries: how many of them count. reached, furthest: last known step of the latest
    attempt, and of all before it.
    """

    planned: PlannedTrial
    folder: Place
    cost: float
    attempts: int = 0
    tries: int = 0
    reached: int = 0
    furthest: int = 0
    began: float = 0.0
    status: str = ""
    problem: str = ""


class _Launch:
    def __init__(
        self, planned: list[PlannedTrial], out: Place, executor: Executor, quiet: bool, how: Training, trainer: str
    ) -> None:
        self._out = out
        self._executor = executor
        self._how = how
        self._trainer = trainer
        self._began = time.monotonic()
        self._jobs = _prepare(planned, out)
        todo = [job for job in self._jobs if read_result(job.folder) is None]
        self._todo = todo
        self._earlier = len(self._jobs) - len(todo)
        self._queue = deque(_in_order(_packs(todo, how.pack)))
        self._running: dict[str, list[_Job]] = {}  # by the key of the attempt
        self._signal = 0
        weight = sum(job.cost for job in todo)
        self._reporter: Reporter = make_reporter(len(self._jobs), self._earlier, weight, quiet=quiet)

    def run(self) -> Summary:
        with self._signals():
            try:
                self._executor.open(len(self._queue), self._trainer)
                while (self._queue or self._running) and not self._signal:
                    while self._queue and self._has_room():
                        self._start(self._queue.popleft())
                    for key, word in self._executor.listen(_TICK):
                        self._hear(key, word)
                    waiting = (job for jobs in self._running.values() for job in jobs)
                    self._reporter.pending = sum(job.folder.name not in self._reporter.running for job in waiting)
                    self._reporter.tick()
            finally:
                self._stop()
                self._reporter.close()
                rebuild_table(self._out)
                self._record()
        if self._signal:
            self._say_resume()
            sys.exit(128 + self._signal)
        return self._summary()

    def _has_room(self) -> bool:
        return self._executor.workers is None or len(self._running) < self._executor.workers

    def _start(self, jobs: list[_Job]) -> None:
        for job in jobs:
            job.attempts += 1
            job.furthest, job.reached = max(job.furthest, job.reached), 0
            (job.folder / "failure.json").unlink(missing_ok=True)
        folders = tuple(job.folder.absolute() for job in jobs)
        task = Task(tuple(job.planned.trial for job in jobs), folders, self._trainer, Path.cwd(), self._how)
        self._executor.start(task)
        self._running[task.key] = jobs

    def _hear(self, key: str, word: Word) -> None:
        jobs = self._running[key]
        if isinstance(word, Began):
            self._begin(jobs, word.where)
        elif isinstance(word, Progress):
            (job,) = (job for job in jobs if job.folder.name == word.trial)
            job.reached = word.record["step"]
            self._reporter.progress(word.trial, word.record)
        elif isinstance(word, Waiting):
            self._reporter.show(f"{jobs[0].planned.name}: waiting for another process to leave its folder")
        else:
            del self._running[key]
            if key not in self._reporter.running:  # lost before it said a word
                self._begin(jobs, "")
            for job in jobs:
                self._finish(job, jobs, word)
            rebuild_table(self._out)

    def _begin(self, jobs: list[_Job], where: str) -> None:
        for job in jobs:
            job.began = time.monotonic()
            name = f"{job.planned.name} on {where}" if where else job.planned.name
            self._reporter.started(job.folder.name, name, job.cost)

    def _finish(self, job: _Job, pack: list[_Job], end: Ended) -> None:
        key = job.folder.name
        result = read_result(job.folder)
        if result is not None:  # whatever happened after the result was written does not matter
            job.status = result["status"]
            self._reporter.ended(key, job.status, duration(time.monotonic() - job.began))
            return
        job.problem = end.problem
        counts = not (end.lost and job.reached > job.furthest)
        job.tries += counts
        if job.tries < ATTEMPTS and (len(pack) > 1 or not end.refused):
            self._queue.appendleft([job])
            self._reporter.stopped(key, job.problem + (f" (attempt {job.tries} of {ATTEMPTS})" if counts else ""))
            return
        job.status = "refused" if end.refused else "failed"
        first = pack[0].folder.name
        write_json(
            job.folder / "failure.json",
            {
                "status": "failed",
                "kind": job.status,
                "message": job.problem,
                "attempts": job.attempts,
                "log": "log.txt" if key == first else f"../{first}/log.txt",
            },
        )
        self._reporter.ended(key, "failed", job.problem)

    def _stop(self) -> None:
        """Asks the workers to stop, then insists; a second Ctrl-C insists at once."""
        first = self._signal
        self._signal = 0
        self._executor.stop(at_once=False)
        deadline = time.monotonic() + self._executor.grace
        while self._running and time.monotonic() < deadline and not self._signal:
            for key, word in self._executor.listen(_TICK):
                if isinstance(word, Ended):
                    del self._running[key]
        self._executor.stop(at_once=True)
        self._signal = first

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns SIGINT and SIGTERM into a flag: an exception could strike between starting a worker and noting it."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._signal = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self) -> None:
        """Writes launch.json: what the launch cost beside the training itself (of the trials it ran)."""
        ran = [job for job in self._todo if job.attempts]
        results = [read_result(job.folder) or {} for job in ran]
        record: dict[str, Any] = {
            "complete": all(job.status for job in self._todo),
            "wall_seconds": time.monotonic() - self._began,
            "train_seconds": sum(result.get("train_seconds", 0.0) for result in results),
            "executor": self._executor.name,
            "workers": self._executor.workers,
            "trials": len(self._jobs),
            "earlier": self._earlier,
            "attempts": {job.folder.name: job.attempts for job in ran},
        }
        write_json(self._out / "launch.json", record)

    def _say_resume(self) -> None:
        finished = sum(read_result(job.folder) is not None for job in self._jobs)
        print(
            f"stopped with {finished} of {len(self._jobs)} trials finished; run the same command again to go on",
            flush=True,
        )

    def _summary(self) -> Summary:
        refused = [job for job in self._jobs if job.status == "refused"]
        if refused:
            more = f" (and {len(refused) - 1} more trials refused)" if len(refused) > 1 else ""
            raise UserError(f"{refused[0].planned.name}: {refused[0].problem}{more}")
        statuses = [(read_result(job.folder) or {}).get("status") for job in self._jobs]
        return Summary(
            total=len(self._jobs),
            earlier=self._earlier,
            done=statuses.count("done"),
            diverged=statuses.count("diverged"),
            failed=tuple(job.planned.name for job in self._jobs if job.status == "failed"),
            wall_seconds=time.monotonic() - self._began,
            table=self._out / "results.csv",
        )


def _prepare(planned: list[PlannedTrial], out: Place) -> list[_Job]:
    """Writes every trial's config.json and plan.json; one job per distinct trial, however many places it has."""
    places: dict[str, list[PlannedTrial]] = {}
    for one in planned:
        places.setdefault(one.trial.hash, []).append(one)
    costed = all(one.cost is not None for one in planned)
    jobs = []
    for name, here in places.items():
        folder = trial_folder(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", here[0].trial.to_json())
        _write_plan(folder, here)
        jobs.append(_Job(here[0], folder, (here[0].cost or 0.0) if costed else 1.0))
    _withdraw({one.study for one in planned}, set(places), out)
    return jobs


def _packs(jobs: list[_Job], size: int) -> list[list[_Job]]:
    """Groups of at most ``size`` trials that may be trained together."""
    if size == 1:
        return [[job] for job in jobs]
    alike: dict[str, list[_Job]] = {}
    for job in jobs:
        alike.setdefault(pack_key(job.planned.trial), []).append(job)
    return [own[start : start + size] for own in alike.values() for start in range(0, len(own), size)]


def _in_order(packs: list[list[_Job]]) -> list[list[_Job]]:
    """Longest first, because a long one started last would leave the other workers idle; but a first seed of all before
    the second of any, which then finds compiled what would have been compiled twice at once."""
    seen: dict[str, int] = {}
    ordered = []
    for jobs in sorted(packs, key=lambda jobs: -sum(job.cost for job in jobs)):
        program = replace(jobs[0].planned.trial, seed=0).hash
        seen[program] = seen.get(program, 0) + 1
        ordered.append((seen[program], jobs))
    return [jobs for _, jobs in sorted(ordered, key=lambda one: one[0])]


def _withdraw(studies: set[str], planned: set[str], out: Place) -> None:
    """Takes trials that these studies planned before, and no longer do, out of their tables; the folders stay."""
    for folder in (out / "trials").glob("*/"):
        plan = read_record(folder / "plan.json")
        if plan is not None and folder.name not in planned:
            kept = [place for place in plan["placements"] if place["study"] not in studies]
            if kept != plan["placements"]:
                write_json(folder / "plan.json", {"placements": kept})


def _write_plan(folder: Place, here: list[PlannedTrial]) -> None:
    """Records the trial's places in these studies, and keeps those in others."""
    keys = ("study", "family", "label", "axis", "axis_value", "recipe")
    places = [{key: getattr(one, key) for key in keys} for one in here]
    studies = {one.study for one in here}
    earlier = (read_record(folder / "plan.json") or {}).get("placements", [])
    kept = [place for place in earlier if place["study"] not in studies]
    write_json(folder / "plan.json", {"placements": kept + places})
