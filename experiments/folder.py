"""The files of a study's folder and the locks on them.

OUT/results.csv            derived from the trials, rebuilt at will
OUT/launch.json            what the last launch cost
OUT/launch.lock            held by the one launcher of OUT
OUT/trials/HASH/           config.json, plan.json, result.json or failure.json, log.txt, lock, and the trainer's own
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from genrec_jax.errors import UserError

FINISHED = ("done", "diverged")


def trial_folder(out: Path, trial_hash: str) -> Path:
    return out / "trials" / trial_hash


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a trial that needs no more training; None for every other folder."""
    record = read_record(folder / "result.json")
    return record if record is not None and record.get("status") in FINISHED else None


def lock(path: Path, *, wait: bool) -> IO[bytes] | None:
    """Locks a file for this process until the returned file is closed; None if another has it and ``wait`` is off.

    A record lock belongs to the process, not to the descriptor: a child that the holder forks does not inherit it, so
    the lock is free the moment its holder dies, however that happens.
    """
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def only_launcher(out: Path) -> Iterator[None]:
    """Holds OUT for one launcher. Raises UserError if another has it."""
    file = lock(out / "launch.lock", wait=False)
    if file is None:
        raise UserError(f"another launcher is at work in {out}; let it finish or choose another --out")
    with file:
        yield
