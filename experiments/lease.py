"""Locks between processes of one machine and of several, which no death of a process or loss of a machine keeps closed.

On one machine the kernel locks a file: the lock is free the moment its holder dies, however that happens. What the
other machines of a cluster know of such locks differs, and some file servers keep those of a lost machine for ever. So
between machines there is a lease: a file that names its holder, who renews it (its modification time, or in a store its
content). Whoever sees it unchanged for ``LEASE`` seconds takes it over, and a holder who comes back to find another's
name ends at once.

A store has no exclusive creation that all of them know. There a lease is read again a second after it was written, and
the last to write has it; one whose write took longer than that could go on beside its successor for a ``BEAT``.
"""

import contextlib
import fcntl
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Self

from genrec_jax.train import places
from genrec_jax.train.places import Place, create, lock_file, machine, renew, renewed, write_text

BEAT = 10.0
LEASE = 60.0


class Hold:
    """A lease that this process has; closing it (or leaving the ``with``) gives it back."""

    def __init__(self, path: Place, owner: str, locked: IO[bytes]) -> None:
        self._path = path
        self._owner = owner
        self._locked = locked
        self._closed = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._renewing.join(BEAT)  # in a store it could bring back what is removed
        if _owner(self._path) == self._owner:
            self._path.unlink(missing_ok=True)
        self._locked.close()

    def _renew(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(OSError):  # the file system is away for a while, or the folder for good
                if _owner(self._path) != self._owner and not self._closed.is_set():
                    print(f"{self._path}: another machine has taken over; this process ends", file=sys.stderr)
                    os._exit(os.EX_TEMPFAIL)
                renew(self._path, self._owner)


def hold(path: Place, *, wait: bool) -> Hold | None:
    """The lease ``path`` for this process; None if another process has it and ``wait`` is off.

    Without ``wait``, an answer takes as long as it takes to see whether a holder on another machine is alive: ``LEASE``
    seconds at most.
    """
    locked = _lock(lock_file(path), wait=wait)
    if locked is None:
        return None
    here = machine(path)
    owner = f"{here} {uuid.uuid4().hex}"
    while not create(path, owner):
        left_behind = _owner(path).startswith(f"{here} ")  # its holder died: the lock of this machine is ours
        if left_behind or _lapsed(path):
            write_text(path, owner)
            if not left_behind:
                time.sleep(places.SETTLE)
            if _owner(path) == owner:
                break
        elif not wait and path.exists():
            locked.close()
            return None
    return Hold(path, owner, locked)


def _lapsed(path: Place) -> bool:
    """Whether the lease stays as it is for ``LEASE`` seconds by this machine's clock; False as soon as it changes."""
    seen, until = renewed(path), time.monotonic() + LEASE
    while seen is not None and time.monotonic() < until:
        time.sleep(min(1.0, LEASE / 10))
        if renewed(path) != seen:
            return False
    return seen is not None


def _owner(path: Place) -> str:
    seen = renewed(path)
    return "" if seen is None else seen[0]


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
