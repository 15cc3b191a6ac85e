"""Making a dataset folder in pieces: by several processes, with progress, to be killed and run again at any moment.

The work lies in a hidden folder beside the dataset, ``.NAME.partial``: the plan it follows, the pieces that are
finished (:mod:`genrec_jax.data.pieces`), and ``dataset``, which becomes the dataset folder in one rename. A run with
the same plan goes on with it, with another one it begins anew. Every piece is a function of the plan and of earlier
pieces alone, so the outcome depends neither on kills nor on who makes which piece.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.sequences import claimed, replace
from genrec_jax.errors import UserError

_PLAN = "plan.json"


class Advance(Protocol):
    """Called by a piece in the making, now and then: units of its phase done since the last call, and events.

    ``found``: an earlier run did them, so that they do not count for the rate.
    """

    def __call__(self, units: int, events: int, *, found: bool = False) -> None: ...


class Task(NamedTuple):
    """A piece to be made: name; the arguments of its function after ``pieces``; size, in the units of its phase."""

    name: str
    arguments: tuple[Any, ...]
    size: int


#: Makes a piece: ``function(pieces, *arguments, advance=...)`` returns its result, with the number of ``events`` in it,
#: and what it wrote.
Maker = Callable[..., tuple[dict[str, Any], Sequence[Extent]]]


class Work:
    """What :func:`making` yields. pieces: the work folder's; dataset: the folder that will be the dataset."""

    def __init__(self, folder: Path, workers: int, progress: Progress):
        self.pieces, self.dataset = Pieces(folder), folder / "dataset"
        self._workers, self._progress = workers, progress
        self._pool: _Pool | None = None
        self._stack = contextlib.ExitStack()

    def make(self, phase: str, function: Maker, tasks: Sequence[Task], noun: str = "events") -> list[dict[str, Any]]:
        """The results of all tasks, in order; those that an earlier run finished are not made again.

        Of several that fail, the first task's error is raised.
        """
        advance = _Phase(self._progress, phase, noun, sum(task.size for task in tasks))
        results: dict[str, dict[str, Any]] = {}
        for task in tasks:
            found = self.pieces.recorded(task.name)
            if found is not None:
                results[task.name] = found
                advance(task.size, found["events"], found=True)
        missing = [task for task in tasks if task.name not in results]
        if self._workers > 1 and len(missing) > 1:
            if self._pool is None:
                self._pool = self._stack.enter_context(_Pool(self._workers))
            results.update(
                zip((task.name for task in missing), self._pool.run(self.pieces, function, missing, advance))
            )
        else:
            for task in missing:
                results[task.name] = _perform(self.pieces, function, task, advance)
        advance.finished()
        return [results[task.name] for task in tasks]

    @contextlib.contextmanager
    def showing(self, phase: str) -> Iterator[None]:
        """A bar for work of unknown length."""
        bar = self._progress.add_task(phase, total=None, said="")
        yield
        self._progress.update(bar, total=1, completed=1)

    def check(self) -> None:
        """Refuses (UserError) an earlier run's finished pieces if they are not what was written."""
        total = sum(extent.size for extent in self.pieces.extents())
        if total:
            advance = _Phase(self._progress, "checking", "", total)
            self.pieces.check(lambda size: advance(size, 0))

    def close(self) -> None:
        """Ends the worker processes."""
        self._stack.close()

    def peak_memory(self) -> int:
        """The largest resident memory, in bytes, of any of the processes so far."""
        return max(peak_memory(), self._pool.peak if self._pool else 0)


@contextlib.contextmanager
def making(out: str | Path, plan: Mapping[str, Any], *, workers: int = 1, quiet: bool = False) -> Iterator[Work]:
    """Makes the dataset folder ``out``, whose making is described by ``plan`` (plain values), or goes on with it.

    At the end the dataset appears, or replaces the one that is there, in one step. After a UserError all that was made
    is deleted; after anything else it stays for the next run. Raises UserError if ``out`` is something else than a
    dataset, if finished pieces are damaged, or if another process is making the same dataset.
    """
    if workers < 1:
        raise UserError(f"{workers} workers cannot make a dataset")
    out = claimed(out)
    folder = out.parent / f".{out.name}.partial"
    with _locked(folder, out):
        try:
            with _bars(quiet) as progress, contextlib.closing(Work(folder, workers, progress)) as work:
                _begin(work, out, json.loads(json.dumps(plan)))
                yield work
        except UserError:
            shutil.rmtree(folder)
            raise
        replace(out, work.dataset)
        shutil.rmtree(folder)
    progress.console.print(f"at most {work.peak_memory() / 2**30:.2f} GiB of memory resident in a process")


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """The folder is there and nobody else's; the system gives it up if the process dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is making {out}: wait until it has finished") from None
            # Whoever held it may have deleted the folder since it was opened.
            if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
                yield
                return
        finally:
            os.close(handle)


def _begin(work: Work, out: Path, plan: Any) -> None:
    """Leaves the folder as the last run with this plan left it, or empty but for the plan."""
    folder = work.pieces.folder
    replaced = folder / "dataset.old"
    if replaced.exists() and not out.exists():  # killed while it was being replaced
        os.rename(replaced, out)
    try:
        known = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    if known == plan and work.dataset.is_dir():
        work.check()
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "done").mkdir()
    work.dataset.mkdir()
    scratch = f"{_PLAN}.new"
    work.pieces.write(scratch, json.dumps(plan, indent=1).encode())
    os.replace(folder / scratch, folder / _PLAN)


def _perform(pieces: Pieces, function: Maker, task: Task, advance: Advance) -> dict[str, Any]:
    result, extents = function(pieces, *task.arguments, advance=advance)
    pieces.record(task.name, result, extents)
    return result


class _Stopped(Exception):
    """Raised in a worker whose work is no longer wanted."""


class _Pool:
    """Worker processes. They die with the process that started them, however it dies."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("spawn")  # forking a process that runs threads may deadlock
        self._messages, self._stop, self.peak = context.SimpleQueue(), context.Event(), 0
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(self._messages, self._stop)
        )

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run(self, pieces: Pieces, function: Maker, tasks: Sequence[Task], advance: Advance) -> Iterator[dict[str, Any]]:
        """The results, in order of the tasks."""
        listener = threading.Thread(target=self._listen, args=(advance,), daemon=True)
        listener.start()
        futures = [self._pool.submit(_perform_remotely, pieces, function, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            said = "a worker process was killed, perhaps for want of memory; run again to go on"
            raise ChildProcessError(errno.ECHILD, said, str(pieces.folder)) from None
        finally:
            self._messages.put(None)
            listener.join()

    def _listen(self, advance: Advance) -> None:
        while (message := self._messages.get()) is not None:
            units, events, found, peak = message
            self.peak = max(self.peak, peak)
            advance(units, events, found=found)


_messages: Any = None
_stop: Any = None


def _start_worker(messages: Any, stop: Any) -> None:
    global _messages, _stop
    _messages, _stop = messages, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform_remotely(pieces: Pieces, function: Maker, task: Task) -> dict[str, Any]:
    return _perform(pieces, function, task, _advance_remotely)


def _advance_remotely(units: int, events: int, *, found: bool = False) -> None:
    if _stop.is_set():
        raise _Stopped
    _messages.put((units, events, found, peak_memory()))


def peak_memory() -> int:
    """The largest resident memory, in bytes, that this process has had."""
    try:
        # Not getrusage: its maximum survives exec, and would be that of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _bars(quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), disable=quiet, refresh_per_second=2)


class _Phase:
    """One bar: units done of all, events done, and how many a second in this run."""

    def __init__(self, progress: Progress, name: str, noun: str, total: int):
        self._progress, self._noun = progress, noun
        self._began, self._events, self._found = time.monotonic(), 0, 0
        self._bar: TaskID = progress.add_task(name, total=total, said="")

    def __call__(self, units: int, events: int, *, found: bool = False) -> None:
        self._events += 0 if found else events
        self._found += events if found else 0
        rate = self._events / max(time.monotonic() - self._began, 1e-3)
        said = f"{self._found + self._events:,} {self._noun}, {rate:,.0f} a second" if self._noun else ""
        self._progress.update(self._bar, advance=units, said=said)

    def finished(self) -> None:
        self._progress.update(self._bar, completed=self._progress.tasks[self._bar].total)
