"""SIGTERM while a trial is trained: whoever asks a job to end gives it some seconds, enough for a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(SystemExit):
    """Ends the process with 143, the exit code of SIGTERM, after a checkpoint of ``step`` was written."""

    def __init__(self, step: int, steps: int):
        super().__init__(128 + signal.SIGTERM)
        self.step, self.steps = step, steps


@contextlib.contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """The event is set by SIGTERM, which does nothing else meanwhile; outside the main thread it never is."""
    asked = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
