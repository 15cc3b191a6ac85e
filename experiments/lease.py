"""Locks between processes of one machine and of several, which no death of a process or loss of a machine keeps closed.

On one machine the kernel locks a file: the lock is free the moment its holder dies, however that happens. What the
other machines of a cluster know of such locks differs, and some file servers keep those of a lost machine for ever. So
between machines there is a lease: a file that names its holder, who renews its modification time. Whoever sees it
unchanged for ``LEASE`` seconds takes it over, and a holder who comes back to find another's name ends at once.
"""

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Self

BEAT = 10.0
LEASE = 60.0
_SETTLE = 1.0  # seconds in which the last of several who take over at once is known


class Hold:
    """A lease that this process has; closing it (or leaving the ``with``) gives it back."""

    def __init__(self, path: Path, owner: str, locked: IO[bytes]) -> None:
        self._path = path
        self._owner = owner
        self._locked = locked
        self._closed = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        if _owner(self._path) == self._owner:
            self._path.unlink(missing_ok=True)
        self._locked.close()

    def _renew(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(OSError):  # the file system is away for a while, or the folder for good
                if _owner(self._path) != self._owner and not self._closed.is_set():
                    print(f"{self._path}: another machine has taken over; this process ends", file=sys.stderr)
                    os._exit(os.EX_TEMPFAIL)
                os.utime(self._path)


def hold(path: Path, *, wait: bool) -> Hold | None:
    """The lease ``path`` for this process; None if another process has it and ``wait`` is off.

    Without ``wait``, an answer takes as long as it takes to see whether a holder on another machine is alive: ``LEASE``
    seconds at most.
    """
    locked = _lock(path.with_name(f"{path.name}.{_machine()}"), wait=wait)
    if locked is None:
        return None
    owner = f"{_machine()} {uuid.uuid4().hex}"
    while not _create(path, owner):
        left_behind = _owner(path).startswith(f"{_machine()} ")  # its holder died: the lock of this machine is ours
        if left_behind or _lapsed(path):
            _write(path, owner)
            if not left_behind:
                time.sleep(_SETTLE)
            if _owner(path) == owner:
                break
        elif not wait and path.exists():
            locked.close()
            return None
    return Hold(path, owner, locked)


def _lapsed(path: Path) -> bool:
    """Whether the lease stays as it is for ``LEASE`` seconds by this machine's clock; False as soon as it changes."""
    seen, until = _state(path), time.monotonic() + LEASE
    while seen is not None and time.monotonic() < until:
        time.sleep(min(1.0, LEASE / 10))
        if _state(path) != seen:
            return False
    return seen is not None


def _state(path: Path) -> tuple[str, int] | None:
    """Who has the lease and when it was renewed. Opened anew each time: then a network file system asks its server."""
    try:
        with path.open(encoding="ascii") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _owner(path: Path) -> str:
    state = _state(path)
    return "" if state is None else state[0]


def _create(path: Path, owner: str) -> bool:
    try:
        with path.open("x", encoding="ascii") as file:
            file.write(owner)
    except FileExistsError:
        return False
    return True


def _write(path: Path, owner: str) -> None:
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_text(owner, encoding="ascii")
    os.replace(scratch, path)


def _lock(path: Path, *, wait: bool) -> IO[bytes] | None:
    """Locks a file for this process until the returned file is closed; None if another has it and ``wait`` is off.

    A record lock belongs to the process, not to the descriptor: a child that the holder forks does not inherit it.
    """
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _machine() -> str:
    """A name that this machine has until it is started again; containers of one machine may have several."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        boot = "0"
    return f"{socket.gethostname()}-{boot}"
