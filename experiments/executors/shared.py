"""What executors on other machines have in common: the study's folder, in a store or on a file system that all share.

An attempt runs there as it would here (:class:`Host`, called by Ray or in a SLURM job). What it says goes through
``attempt.json`` in the trial's folder, which holds the latest; its last word is what Host returns.
"""

import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from experiments.executors import Began, Ended, Progress, Task, Waiting, Word
from experiments.executors.local import LocalExecutor
from experiments.folder import read_record
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json

GRACE = 60.0  # of an attempt that is stopped on another machine, where others wait for its place
_TICK = 0.2
# Often enough for a person, seldom enough for a file server with a hundred trials, and for one object of a store.
_SECONDS_BETWEEN_REPORTS = 2.0


class Host:
    """Runs an attempt in a process of its own on this machine, to its end.

    Whatever is raised meanwhile (KeyboardInterrupt, SystemExit) stops the attempt as SIGTERM does: the trainer writes a
    checkpoint. Where this process dies the attempt is ended at once.
    """

    def __call__(self, task: Task) -> Ended:
        if not (task.folder / "config.json").is_file():
            here = socket.gethostname()
            return Ended(
                f"{here} does not see {task.folder}: --out must be on a file system that all share, or in a store",
                refused=True,
            )
        self._executor = LocalExecutor(workers=1)
        self._executor.open(1, task.trainer)
        report = _Report(task.folder)
        self._executor.start(task)
        try:
            while True:
                for _, word in self._executor.listen(_TICK):
                    if isinstance(word, Ended):
                        report.write()
                        return word
                    report.add(word)
        finally:
            self.stop()
            self._executor.stop(at_once=True)

    def stop(self) -> None:
        """Asks the attempt to end, if it is still at work, and waits until it has; signal handlers may call it."""
        self._executor.stop(at_once=False)
        self._executor.rest(GRACE)


class _Report:
    """The words of an attempt, written for the launcher."""

    def __init__(self, folder: Place) -> None:
        self._path = folder / "attempt.json"
        self._record: dict[str, Any] = {"where": socket.gethostname(), "waiting": False, "progress": {}}
        self._written = -float("inf")

    def add(self, word: Word) -> None:
        if isinstance(word, Progress):
            self._record["progress"][word.trial] = dict(word.record)
        elif isinstance(word, Waiting):
            self._record["waiting"] = True
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_REPORTS:
            self.write()

    def write(self) -> None:
        with contextlib.suppress(OSError):  # a launcher that knows less is better than an attempt that ends
            write_json(self._path, self._record)
        self._written = time.monotonic()


class _Reader:
    """What is new in an attempt's ``attempt.json``."""

    def __init__(self, folder: Place) -> None:
        self._path = folder / "attempt.json"
        self._seen: Mapping[str, Any] = {}

    def words(self) -> list[Word]:
        record = read_record(self._path)
        if record is None or record == self._seen:
            return []
        words: list[Word] = []
        if not self._seen:
            words.append(Began(record["where"]))
        if record["waiting"] and not self._seen.get("waiting"):
            words.append(Waiting())
        before = self._seen.get("progress", {})
        words += [Progress(trial, line) for trial, line in record["progress"].items() if line != before.get(trial)]
        self._seen = record
        return words


class SharedExecutor[Handle](ABC):
    """Keeps the attempts that run elsewhere; subclasses submit them, ask for their ends and cancel them."""

    grace = GRACE

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self._running: dict[str, tuple[Task, Handle, _Reader]] = {}
        self._next_reading = 0.0

    @abstractmethod
    def submit(self, task: Task) -> Handle:
        """Asks for a :class:`Host` to be called with the task, somewhere, when there is room."""

    @abstractmethod
    def ends(self, attempts: Mapping[str, Handle], seconds: float) -> dict[str, Ended]:
        """The ends of those attempts that are over, by key; waits ``seconds`` if none is."""

    @abstractmethod
    def cancel(self, attempt: Handle, *, at_once: bool) -> None:
        """As :meth:`experiments.executors.Executor.stop`."""

    def at_work(self, task: Task) -> Handle | None:
        """An attempt at the trial that an earlier launch submitted and that has not ended with it."""
        return None

    def start(self, task: Task) -> None:
        attempt = self.at_work(task)
        if attempt is None:
            (task.folder / "attempt.json").unlink(missing_ok=True)
            attempt = self.submit(task)
        self._running[task.key] = (task, attempt, _Reader(task.folder))

    def listen(self, seconds: float) -> list[tuple[str, Word]]:
        ends = self.ends({key: attempt for key, (_, attempt, _) in self._running.items()}, seconds)
        words: list[tuple[str, Word]] = []
        began = time.monotonic()
        if began >= self._next_reading:
            for key, (_, _, reader) in self._running.items():
                words += [(key, word) for word in reader.words()]
            took = time.monotonic() - began
            self._next_reading = began + max(_SECONDS_BETWEEN_REPORTS, 10 * took)
        for key, end in ends.items():
            task, _, reader = self._running.pop(key)
            list(task.folder.glob("*"))  # a network file system asks its server then what is there
            words += [(key, word) for word in reader.words()]
            words.append((key, end))
        return words

    def stop(self, *, at_once: bool) -> None:
        for _, attempt, _ in self._running.values():
            self.cancel(attempt, at_once=at_once)
        if at_once:
            self._running.clear()
