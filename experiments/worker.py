"""What happens in the process of one attempt at a trial, or at a pack of them."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.executors import Ended, Progress, Task, Waiting
from experiments.folder import read_result
from experiments.lease import Hold, hold
from genrec_jax.config import Trial
from genrec_jax.distributed.mesh import make_mesh, parse_mesh
from genrec_jax.errors import UserError
from genrec_jax.train.cache import enable_compilation_cache
from genrec_jax.train.memory import keep_freed_memory
from genrec_jax.train.mirror import at_hand
from genrec_jax.train.places import Place, beside

STOPPED = 128 + signal.SIGTERM
# A trial of tiny steps reports thousands of times a second; a person reads a few.
_SECONDS_BETWEEN_REPORTS = 0.1


def work(task: Task, channel: Connection) -> None:
    """Trains (or resumes) the trials.

    Exit code 0 with results on disk, 2 for a UserError, 143 after SIGTERM; anything else is a crash.
    """
    os.setsid()  # its own group: a terminal's Ctrl-C reaches the launcher alone, and the group can be ended whole
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # experiments.executors.preloaded blocks it
    _write_to(beside(task.folder, "log.txt"))
    os.environ.update(task.environment)
    if task.cpus:
        os.sched_setaffinity(0, task.cpus)
    enable_compilation_cache()
    keep_freed_memory()
    try:
        with contextlib.ExitStack() as held, _traceback():  # in the log, while that is at hand
            os.chdir(task.cwd)
            _train(task, channel, held)
    except UserError as error:
        channel.send(Ended(str(error), refused=True))
        sys.exit(2)
    except Exception as error:
        channel.send(Ended("".join(traceback.format_exception_only(error)).strip()))
        sys.exit(1)


def _train(task: Task, channel: Connection, held: contextlib.ExitStack) -> None:
    """``held``: keeps the leases, and in the end puts into a store what the trials' folders there came to."""
    for place in sorted(task.folders):  # in one order, so that no two workers wait for each other
        held.enter_context(_held(place, channel))
    # Whoever had a lease may have finished its trial.
    todo = [(one, own) for one, own in zip(task.trials, task.folders) if read_result(own) is None]
    if not todo:
        return
    trials, places = zip(*todo)
    folders = [held.enter_context(at_hand(place)) for place in places]
    if places[0] == task.folder:
        _write_to(folders[0] / "log.txt")
    mesh = None if task.how.mesh is None else make_mesh(parse_mesh(task.how.mesh))
    resolve(task.trainer)(trials, folders, mesh=mesh, remat=task.how.remat, on_progress=_Reports(channel))
    if any(read_result(folder) is None for folder in folders):
        raise RuntimeError("the trainer returned without writing a valid result.json")


@contextlib.contextmanager
def _traceback() -> Iterator[None]:
    """Prints what a crash was, which a refusal is not."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        raise


def _held(folder: Place, channel: Connection) -> Hold:
    """The lease of a trial's folder."""
    held = hold(folder / "lease", wait=False)
    if held is None:
        channel.send(Waiting())
        held = hold(folder / "lease", wait=True)
    assert held is not None
    return held


def resolve(path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class _Reports:
    """Sends the first and last line of a trial's progress, and as many between as a person can read."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._sent: dict[str, float] = {}

    def __call__(self, trial: Trial, record: Mapping[str, Any]) -> None:
        now, name = time.monotonic(), trial.hash
        last = self._sent.get(name, -float("inf"))
        if now - last >= _SECONDS_BETWEEN_REPORTS or record["step"] == record["steps"]:
            self._channel.send(Progress(name, dict(record)))
            self._sent[name] = now


def _end_with_launcher() -> None:
    """Waits for the pipe that only the launcher holds open, then ends this process and its children at once."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.killpg(0, signal.SIGKILL)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """Unwinds the trainer, so that a checkpoint on its way to disk gets there."""
    sys.exit(STOPPED)


def _write_to(path: Path) -> None:
    """Sends stdout and stderr, those of native code too, to the trial's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
