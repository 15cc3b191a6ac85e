"""Attempts in processes of this machine, which share its cores and GPUs."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from experiments.executors import Began, Ended, ExecutorName, Task, Word
from experiments.slots import Slot, make_slots
from experiments.worker import STOPPED, work


@dataclass
class _Attempt:
    key: str
    slot: Slot
    process: ForkServerProcess
    channel: connection.Connection
    end: Ended | None = None  # the last word of a worker that gave up
    talking: bool = True


class LocalExecutor:
    """``workers`` processes at a time, each in a slot of its own."""

    name: ExecutorName = "local"
    grace = 10.0

    def __init__(self, workers: int) -> None:
        self.workers: int | None = workers
        self._slots = workers
        self._running: list[_Attempt] = []
        self._began: list[tuple[str, Word]] = []

    def open(self, trials: int, trainer: str) -> None:
        self._context = _fork_server(trainer)
        self._free = deque(make_slots(min(self._slots, max(trials, 1))))

    def start(self, task: Task) -> None:
        slot = self._free.popleft()
        task = replace(task, cpus=slot.cpus, environment={**task.environment, **slot.environment})
        channel, sender = self._context.Pipe(duplex=False)
        # Not a daemon: those may have no children, and a trainer may load its data in some.
        process = self._context.Process(target=work, args=(task, sender))
        # The first start also starts the fork server, which a Ctrl-C in the terminal would reach while it imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        sender.close()
        self._running.append(_Attempt(task.key, slot, process, channel))
        self._began.append((task.key, Began()))

    def listen(self, seconds: float) -> list[tuple[str, Word]]:
        words, self._began = self._began, []
        channels = [one.channel for one in self._running if one.talking]
        ends = [one.process.sentinel for one in self._running]
        connection.wait([*channels, *ends], timeout=0.0 if words else seconds)
        for attempt in list(self._running):
            exitcode = attempt.process.exitcode  # asked first: then every word it said is in the channel
            words += self._read(attempt)
            if exitcode is not None:
                self._release(attempt)
                words.append((attempt.key, attempt.end or _death(exitcode)))
        return words

    def stop(self, *, at_once: bool) -> None:
        for attempt in list(self._running):
            if at_once:
                attempt.process.kill()
                self._release(attempt)
            else:
                attempt.process.terminate()

    def rest(self, seconds: float) -> None:
        """Waits until no attempt is at work, ``seconds`` at most; a signal's handler may, too, wherever it came."""
        until = time.monotonic() + seconds
        for attempt in self._running:
            connection.wait([attempt.process.sentinel], timeout=max(until - time.monotonic(), 0.0))

    def close(self) -> None:
        """The fork server ends with this process."""

    def _read(self, attempt: _Attempt) -> list[tuple[str, Word]]:
        words: list[tuple[str, Word]] = []
        try:
            while attempt.talking and attempt.channel.poll():
                word: Word = attempt.channel.recv()
                if isinstance(word, Ended):
                    attempt.end = word
                else:
                    words.append((attempt.key, word))
        except (EOFError, OSError):
            attempt.talking = False  # the worker is gone, perhaps in the middle of a word
        return words

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


def _fork_server(trainer: str) -> ForkServerContext:
    """Workers are forked from a process that has imported everything already: they start in a tenth of a second.

    Nothing imported there may start a thread or a jax backend: neither survives a fork. A worker imports the main
    module of this process again; what the command line or a worker of Ray's needs for that is there, too.
    """
    main = [name for name in ("tyro", "scaling", "experiments.cli", "ray") if name in sys.modules]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [work.__module__, trainer.partition(":")[0], "experiments.executors.preloaded", *main]
    )
    return context


def _death(exitcode: int) -> Ended:
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return Ended(f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    if exitcode == STOPPED:
        return Ended("stopped by SIGTERM", lost=True)
    return Ended(f"ended with exit code {exitcode} and no result")
