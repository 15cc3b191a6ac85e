"""Several processes that train one trial together, each with the devices of its machine."""

import contextlib
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from genrec_jax.distributed.mesh import make_mesh, rows_of
from genrec_jax.errors import UserError

# How errors of the runtime begin: some of a lost connection are a ValueError in Python.
_STATUS = re.compile(r"[A-Z_]+: ")
_HEARTBEAT = 30  # seconds after which a process that is not heard of is dead, and the others end


def join(text: str) -> None:
    """Makes this process one of several: ``auto``, or ``HOST:PORT,PROCESS/PROCESSES`` with the address of process 0.

    ``auto`` asks SLURM, Open MPI, Kubernetes or a TPU pod, whichever started it. Comes before any other use of jax.
    Raises UserError for other texts, and if the others cannot be found.
    """
    address, process, processes = (None, None, None) if text == "auto" else _parsed(text)
    try:
        if text == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
        else:
            jax.distributed.initialize(address, processes, process, heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--distributed {text}: the other processes were not found: {reason}") from error


def _parsed(text: str) -> tuple[str, int, int]:
    address, _, numbers = text.partition(",")
    process, _, processes = numbers.partition("/")
    if ":" not in address or not (process.isdigit() and processes.isdigit()) or int(process) >= int(processes):
        raise UserError(
            f"--distributed {text!r} is neither auto nor of the form HOST:PORT,PROCESS/PROCESSES, counted from 0"
        )
    return address, int(process), int(processes)


def leads() -> bool:
    """Whether this process is the one that prints and writes records."""
    return jax.process_index() == 0


def mesh_of_all(sizes: dict[str, int] | None) -> Mesh:
    """The mesh of all devices of all processes: of ``sizes``, or of rows alone. Raises UserError for another number."""
    devices = jax.device_count()
    if sizes is not None and math.prod(sizes.values()) != devices:
        raise UserError(f"the mesh has {math.prod(sizes.values())} devices, the processes together have {devices}")
    return make_mesh({"data": devices} if sizes is None else sizes)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process, with one sentence, where work with the others fails: one that is gone cannot be waited for."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _STATUS.match(str(error)):
            raise
        reason = str(error).strip().partition("\n")[0]
        print(f"error: another process of this job is gone: {reason}", file=sys.stderr, flush=True)
        print(
            "run the same command again, in every process, to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the usual way out waits for all processes


def share_of_rows(mesh: Mesh | None, rows: int) -> slice:
    """Which of the ``rows`` of a batch this process' devices work on. Raises UserError if these are scattered."""
    if mesh is None:
        return slice(0, rows)
    owned = NamedSharding(mesh, rows_of(mesh)).addressable_devices_indices_map((rows,)).values()
    ranges = {part[0].indices(rows)[:2] for part in owned if part is not None}
    start, stop = min(a for a, _ in ranges), max(b for _, b in ranges)
    if stop - start != sum(b - a for a, b in ranges):
        raise UserError("a process' devices must stand side by side on the mesh: put data first")
    return slice(start, stop)


def on_devices(mesh: Mesh, batch: Any, rows: int) -> Any:
    """This process' share of a batch of ``rows``, as part of the whole one."""
    sharding = NamedSharding(mesh, rows_of(mesh))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return jax.tree.map(put, batch)


def told_by_all(flags: list[bool]) -> np.ndarray:
    """What every process says: bool [processes, flags]. All must call it at the same step."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array(flags))).reshape(-1, len(flags))


@contextlib.contextmanager
def records_of(run_dir: Path) -> Iterator[Path]:
    """Where this process writes the records of a run: its folder for one process, for others a scratch folder that has
    the metrics so far."""
    if leads():
        yield run_dir
        return
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(run_dir / "metrics.jsonl", scratch)
        yield Path(scratch)
