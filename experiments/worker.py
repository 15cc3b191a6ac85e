"""What happens in the process of one attempt at one trial."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.executors import Ended, Progress, Task, Waiting
from experiments.folder import read_result
from experiments.lease import hold
from genrec_jax.errors import UserError
from genrec_jax.train.cache import enable_compilation_cache

STOPPED = 128 + signal.SIGTERM
# A trial of tiny steps reports thousands of times a second; a person reads a few.
_SECONDS_BETWEEN_REPORTS = 0.1


def work(task: Task, channel: Connection) -> None:
    """Trains (or resumes) the trial.

    Exit code 0 with a result on disk, 2 for a UserError, 143 after SIGTERM; anything else is a crash.
    """
    os.setsid()  # its own group: a terminal's Ctrl-C reaches the launcher alone, and the group can be ended whole
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # experiments.warm blocks it
    _write_to(task.folder / "log.txt")
    os.environ.update(task.environment)
    if task.cpus:
        os.sched_setaffinity(0, task.cpus)
    enable_compilation_cache()
    try:
        os.chdir(task.cwd)
        _train(task, channel)
    except UserError as error:
        channel.send(Ended(str(error), refused=True))
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        channel.send(Ended("".join(traceback.format_exception_only(error)).strip()))
        sys.exit(1)


def _train(task: Task, channel: Connection) -> None:
    held = hold(task.folder / "lease", wait=False)
    if held is None:
        channel.send(Waiting())
        held = hold(task.folder / "lease", wait=True)
    assert held is not None
    with held:
        if read_result(task.folder) is not None:  # whoever held the lease has finished the trial
            return
        resolve(task.trainer)(task.trial, task.folder, on_progress=_Reports(channel))
        if read_result(task.folder) is None:
            raise RuntimeError("the trainer returned without writing a valid result.json")


def resolve(path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class _Reports:
    """Sends the first and last line of progress, and as many between as a person can read."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._sent = -float("inf")

    def __call__(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._sent >= _SECONDS_BETWEEN_REPORTS or record["step"] == record["steps"]:
            self._channel.send(Progress(dict(record)))
            self._sent = now


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
