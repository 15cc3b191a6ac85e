"""Runs jobs in a process of its own: a kernel that hangs, crashes or breaks the device costs one job, not the run."""

import gc
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu_cases import Job

Record = dict[str, Any]
_TRACE = 4000  # characters of a failure's trace that are kept


class Worker:
    """Starts the process when a job comes, and again after it was lost."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def run(self, job: Job, seconds: float) -> Record:
        """The job's record with its ``status``; never longer than ``seconds``, never an exception for a failing job."""
        if self._process is None:
            self._start()
        start = time.monotonic()
        try:
            self._pipe.send(job)
            if self._pipe.poll(seconds):
                record = self._pipe.recv()
            else:
                record = {"status": "stopped", "note": f"stopped after {seconds:.0f} s"}
        except (EOFError, OSError):
            self._process.join(10)
            record = {"status": "failed", "note": f"the process died (exit code {self._process.exitcode})"}
        if record.pop("broken", False) or record["status"] == "stopped" or not self._process.is_alive():
            self.close()
        return record | {"wall_s": round(time.monotonic() - start, 2)}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        # The checks' oracle runs on the CPU, so an explicit choice of platforms must leave it in.
        chosen = os.environ.get("JAX_PLATFORMS", "")
        if chosen and "cpu" not in chosen.split(","):
            os.environ["JAX_PLATFORMS"] = f"{chosen},cpu"
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection) -> None:
    """The process: one record per job, until the other end is gone."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    warnings.filterwarnings("ignore", message=".*donated buffers.*")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(job))
        gc.collect()  # device arrays held by cycles


def _run(job: Job) -> Record:
    from benchmarks.gpu_attention import Unsupported

    try:
        return {"status": "ok"} | _function(job)(job)
    except (Unsupported, NotImplementedError) as reason:
        return {"status": "unsupported", "note": _line(reason)}
    except Exception as error:  # whatever a compiler or a kernel raises; the next job must run all the same
        note, trace = f"{type(error).__name__}: {_line(error)}", traceback.format_exc()[-_TRACE:]
        return {"status": "failed", "note": note, "trace": trace, "broken": not _device_works()}


def _function(job: Job) -> Callable[[Job], Record]:
    """Imported here, so that one section's missing package fails its own jobs alone."""
    if job.section == "ceilings":
        from benchmarks.gpu_timing import ceilings

        return lambda job: ceilings(job.quick)
    if job.section == "tests":
        from benchmarks.gpu_checks import run_check

        return run_check
    if job.section == "train":
        from benchmarks.gpu_train import time_training

        return time_training
    if job.section == "recipe":
        from benchmarks.gpu_recipe import train_recipe

        return train_recipe
    if job.section == "probe":
        return _probe
    from benchmarks.gpu_attention import time_attention

    return time_attention


def _probe(job: Job) -> Record:
    """Can the backend serve the simplest call on this machine?"""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.hstu_attention import hstu_attention

    for platform in ("tpu", "gpu"):
        if platform in job.implementation and jax.default_backend() != platform:
            raise NotImplementedError(f"made for {platform.upper()}s")
    x = jax.random.normal(jax.random.key(0), (128, 1, 64), jnp.bfloat16)
    offsets = jnp.array([0, 128])
    call = jax.jit(lambda x: hstu_attention(x, x, x, offsets, max_len=128.0, implementation=job.implementation))
    if not bool(jnp.isfinite(call(x)).all()):
        raise ArithmeticError("the output is not finite")
    return {}


def _device_works() -> bool:
    """A fault inside a kernel leaves the whole process without a device."""
    import jax
    import jax.numpy as jnp

    try:
        return float(jax.jit(lambda x: x + 1)(jnp.ones(()))) == 2
    except Exception:
        return False


def _line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:240]
