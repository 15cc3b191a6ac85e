"""The files of a study's folder, on a file system or in a store (`genrec_jax.train.places`).

OUT/results.csv            derived from the trials, rebuilt at will
OUT/launch.json            what the last launch cost
OUT/launch.lease           of the one launcher of OUT
OUT/trials/HASH/           config.json, plan.json, result.json or failure.json, log.txt, and the trainer's own;
                           lease, of the one process that trains; on a cluster attempt.json, what it said last
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from experiments.lease import hold
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place

FINISHED = ("done", "diverged")


def trial_folder(out: Place, trial_hash: str) -> Place:
    return out / "trials" / trial_hash


def read_record(path: Place) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_result(folder: Place) -> dict[str, Any] | None:
    """The result of a trial that needs no more training; None for every other folder."""
    record = read_record(folder / "result.json")
    return record if record is not None and record.get("status") in FINISHED else None


@contextlib.contextmanager
def only_launcher(out: Place) -> Iterator[None]:
    """Holds OUT for one launcher. Raises UserError if another has it."""
    held = hold(out / "launch.lease", wait=False)
    if held is None:
        raise UserError(f"another launcher is at work in {out}; let it finish or choose another --out")
    with held:
        yield
