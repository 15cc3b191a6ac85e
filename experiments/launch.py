"""Runs the trials of a study on this machine, several at a time, each attempt in a process of its own.

A launch may be killed at any moment, worker or launcher, and run again: finished trials are skipped, the others resume
from their checkpoints, and no trial is ever trained by two processes at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.folder import only_launcher, read_record, read_result, trial_folder
from experiments.progress import Reporter, duration, make_reporter
from experiments.slots import Slot, make_slots
from experiments.study import PlannedTrial
from experiments.table import rebuild_table
from experiments.worker import Message, Task, work
from genrec_jax.errors import UserError
from genrec_jax.train.pack import pack_key
from genrec_jax.train.record import write_json

TRAINER = "genrec_jax.train.loop:train_pack"
ATTEMPTS = 3
_TICK = 0.2
_GRACE = 10.0  # seconds a stopped trainer has to let a checkpoint reach the disk


@dataclass(frozen=True)
class Summary:
    """What came of a launch. earlier: trials already finished when it began (counted in done or diverged, too)."""

    total: int
    earlier: int
    done: int
    diverged: int
    failed: tuple[str, ...]
    wall_seconds: float
    table: Path


def run_study(
    planned: list[PlannedTrial], out: Path, *, workers: int, quiet: bool, pack: int = 1, trainer: str = TRAINER
) -> Summary:
    """Trains every planned trial that has no result yet and rebuilds ``out/results.csv``.

    Up to ``pack`` trials that may be trained together (:func:`genrec_jax.train.pack.pack_key`) are the work of one
    process; those of a pack that fails are tried again one by one. A trial that crashes is tried three times, then
    recorded as failed; the next launch tries it again. Ctrl-C (or SIGTERM) stops the workers, says how to go on and
    exits with 130 (143). Raises UserError for a second launcher on ``out`` and, once every other trial is through, for
    a trial whose configuration or data is refused.
    """
    if not planned:
        raise UserError("the study has no trials")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    if pack < 1:
        raise UserError(f"--pack must be at least 1, not {pack}")
    out.mkdir(parents=True, exist_ok=True)
    with only_launcher(out):
        return _Launch(planned, out, workers, quiet, pack, trainer).run()


@dataclass
class _Job:
    """A trial to run; ``cost`` in the launch's unit of work."""

    planned: PlannedTrial
    folder: Path
    cost: float
    attempts: int = 0
    status: str = ""
    problem: str = ""


@dataclass
class _Attempt:
    jobs: list[_Job]  # a pack of trials
    slot: Slot
    process: ForkServerProcess
    channel: connection.Connection
    began: float = field(default_factory=time.monotonic)
    message: Message | None = None  # the last word of a worker that gave up
    talking: bool = True


class _Launch:
    def __init__(
        self, planned: list[PlannedTrial], out: Path, workers: int, quiet: bool, pack: int, trainer: str
    ) -> None:
        self._out = out
        self._workers = workers
        self._trainer = trainer
        self._began = time.monotonic()
        self._jobs = _prepare(planned, out)
        todo = [job for job in self._jobs if read_result(job.folder) is None]
        self._todo = todo
        self._earlier = len(self._jobs) - len(todo)
        # Longest first: a long one started last would leave the other workers idle.
        self._queue = deque(sorted(_packs(todo, pack), key=lambda jobs: -sum(job.cost for job in jobs)))
        self._free = deque(make_slots(min(workers, max(len(self._queue), 1))))
        self._running: list[_Attempt] = []
        self._signal = 0
        weight = sum(job.cost for job in todo)
        self._reporter: Reporter = make_reporter(len(self._jobs), self._earlier, weight, quiet=quiet)

    def run(self) -> Summary:
        context = _fork_server(self._trainer)
        with self._signals():
            try:
                while (self._queue or self._running) and not self._signal:
                    while self._queue and self._free:
                        self._start(context, self._queue.popleft(), self._free.popleft())
                    self._listen()
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

    def _start(self, context: ForkServerContext, jobs: list[_Job], slot: Slot) -> None:
        for job in jobs:
            job.attempts += 1
            (job.folder / "failure.json").unlink(missing_ok=True)
        trials, folders = tuple(job.planned.trial for job in jobs), tuple(job.folder for job in jobs)
        task = Task(trials, folders, self._trainer, slot.cpus, slot.environment)
        channel, sender = context.Pipe(duplex=False)
        # Not a daemon: those may have no children, and a trainer may load its data in some.
        process = context.Process(target=work, args=(task, sender))
        # The first start also starts the fork server, which a Ctrl-C in the terminal would reach while it imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        sender.close()
        self._running.append(_Attempt(jobs, slot, process, channel))
        for job in jobs:
            self._reporter.started(job.folder.name, job.planned.name, job.cost)

    def _listen(self) -> None:
        """Waits a moment for words from the workers, or their end."""
        channels = [one.channel for one in self._running if one.talking]
        connection.wait([*channels, *(one.process.sentinel for one in self._running)], timeout=_TICK)
        for attempt in list(self._running):
            over = attempt.process.exitcode is not None  # asked first: then every word it said is in the channel
            self._read(attempt)
            if over:
                self._finish(attempt)

    def _read(self, attempt: _Attempt) -> None:
        try:
            while attempt.talking and attempt.channel.poll():
                message: Message = attempt.channel.recv()
                if message[0] == "progress":
                    self._reporter.progress(*message[1])
                elif message[0] == "waiting":
                    name = next(job.planned.name for job in attempt.jobs if job.folder.name == message[1])
                    self._reporter.show(f"{name}: waiting for another process to leave its folder")
                else:
                    attempt.message = message
        except (EOFError, OSError):
            attempt.talking = False  # the worker is gone, perhaps in the middle of a word

    def _finish(self, attempt: _Attempt) -> None:
        exitcode = attempt.process.exitcode
        self._release(attempt)
        problem = str(attempt.message[1]) if attempt.message else _death(exitcode)
        refused = attempt.message is not None and attempt.message[0] == "user_error"
        for job in attempt.jobs:
            result = read_result(job.folder)
            if result is not None:  # whatever happened after the result was written does not matter
                job.status = result["status"]
                took = duration(time.monotonic() - attempt.began)
                self._reporter.ended(job.folder.name, job.status, took)
            elif job.attempts < ATTEMPTS and (len(attempt.jobs) > 1 or not refused):
                self._queue.appendleft([job])
                note = f"{problem} (attempt {job.attempts} of {ATTEMPTS})"
                self._reporter.stopped(job.folder.name, note)
            else:
                self._fail(job, attempt.jobs[0], problem, refused)
        rebuild_table(self._out)

    def _fail(self, job: _Job, first: _Job, problem: str, refused: bool) -> None:
        """Gives a trial up; the words of its worker are in the folder of its pack's ``first``."""
        job.status, job.problem = "refused" if refused else "failed", problem
        write_json(
            job.folder / "failure.json",
            {
                "status": "failed",
                "kind": job.status,
                "message": job.problem,
                "attempts": job.attempts,
                "log": "log.txt" if job is first else f"../{first.folder.name}/log.txt",
            },
        )
        self._reporter.ended(job.folder.name, "failed", job.problem)

    def _release(self, attempt: _Attempt) -> None:
        """Ends what the worker may have left behind and frees its slot."""
        attempt.process.join()
        if attempt.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(attempt.process.pid, signal.SIGKILL)
        attempt.process.close()
        attempt.channel.close()
        self._running.remove(attempt)
        self._free.append(attempt.slot)

    def _stop(self) -> None:
        """Asks the workers to stop, then insists; a second Ctrl-C insists at once."""
        first = self._signal
        self._signal = 0
        for attempt in self._running:
            attempt.process.terminate()
        deadline = time.monotonic() + _GRACE
        while any(one.process.is_alive() for one in self._running) and time.monotonic() < deadline and not self._signal:
            connection.wait([one.process.sentinel for one in self._running], timeout=_TICK)
        for attempt in list(self._running):
            attempt.process.kill()
            self._release(attempt)
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
            "workers": self._workers,
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


def _prepare(planned: list[PlannedTrial], out: Path) -> list[_Job]:
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
    alike: dict[str, list[_Job]] = {}
    for job in jobs:
        alike.setdefault(pack_key(job.planned.trial), []).append(job)
    return [own[start : start + size] for own in alike.values() for start in range(0, len(own), size)]


def _withdraw(studies: set[str], planned: set[str], out: Path) -> None:
    """Takes trials that these studies planned before, and no longer do, out of their tables; the folders stay."""
    for folder in (out / "trials").glob("*/"):
        plan = read_record(folder / "plan.json")
        if plan is not None and folder.name not in planned:
            kept = [place for place in plan["placements"] if place["study"] not in studies]
            if kept != plan["placements"]:
                write_json(folder / "plan.json", {"placements": kept})


def _write_plan(folder: Path, here: list[PlannedTrial]) -> None:
    """Records the trial's places in these studies, and keeps those in others."""
    keys = ("study", "family", "label", "axis", "axis_value")
    places = [{key: getattr(one, key) for key in keys} for one in here]
    studies = {one.study for one in here}
    earlier = (read_record(folder / "plan.json") or {}).get("placements", [])
    kept = [place for place in earlier if place["study"] not in studies]
    write_json(folder / "plan.json", {"placements": kept + places})


def _fork_server(trainer: str) -> ForkServerContext:
    """Workers are forked from a process that has imported everything already: they start in a tenth of a second.

    Nothing imported there may start a thread or a jax backend: neither survives a fork. A worker imports the launcher's
    main module again; where that is the command line, what it needs is there, too.
    """
    main = [name for name in ("tyro", "scaling", "experiments.cli") if name in sys.modules]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, trainer.partition(":")[0], "experiments.warm", *main])
    return context


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {exitcode} and no result"
