"""Attempts as SLURM jobs, submitted through submitit, whose files lie in the folder ``slurm`` of each trial.

(Where that is in a store, they lie below the working directory, which the nodes must see.)

A job that SLURM is about to end, because its time is up or another needs its place, writes a checkpoint and is queued
again. A job outlives its launcher: the next one goes on with it.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.executors import Ended, ExecutorName, Task, missing
from experiments.executors.shared import Host, SharedExecutor
from experiments.folder import read_record
from genrec_jax.errors import UserError
from genrec_jax.train.places import jobs_of
from genrec_jax.train.record import write_json

if TYPE_CHECKING:
    import submitit

_MINUTES = 240  # a job's time unless another is given; longer trials are queued again
_SECONDS_BETWEEN_QUESTIONS = 30.0  # to SLURM's accounting, which tells of jobs that could not tell themselves
_AHEAD = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "SUSPENDED", "RESIZING")


class SlurmExecutor(SharedExecutor["submitit.Job[Ended] | Ended"]):
    """cpus, gpus: of each trial. options: KEY=VALUE, or KEY alone, of ``sbatch``.

    Raises UserError without the extra, where there is no SLURM, and for an option it cannot read.
    """

    name: ExecutorName = "slurm"

    def __init__(self, workers: int | None, *, cpus: int, gpus: float, options: Sequence[str]) -> None:
        super().__init__(workers)
        try:
            import submitit
        except ModuleNotFoundError:
            raise missing("slurm") from None
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise UserError("there is no SLURM on this machine: sbatch and srun were not found")
        if gpus % 1:
            raise UserError(f"--gpus must be a whole number with --executor slurm, not {gpus:g}")
        self._submitit = submitit
        self._parameters = {"cpus_per_task": cpus, "stderr_to_stdout": True, **_parameters(options)}
        if gpus:
            self._parameters["gpus_per_node"] = int(gpus)
        self._asked = time.monotonic()
        self._accepted = False

    def open(self, trials: int, trainer: str) -> None:
        """SLURM needs no preparation."""

    def at_work(self, task: Task) -> "submitit.Job[Ended] | None":
        noted = read_record(task.folder / "slurm" / "job.json")
        if noted is None:
            return None
        job: submitit.Job[Ended] = self._submitit.SlurmJob(Path(noted["folder"]), noted["job"])
        ended = job.paths.result_pickle.exists()  # before SLURM says so
        return job if not ended and job.get_info(mode="force").get("State") in _AHEAD else None

    def submit(self, task: Task) -> "submitit.Job[Ended] | Ended":
        folder = jobs_of(task.folder, task.cwd)
        executor = self._submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(name=f"genrec-{task.key}", **self._parameters)
        try:
            job = executor.submit(_Job(), task)
        except RuntimeError as error:
            problem = f"sbatch refuses the job: {_last_line(error)}"
            if not self._accepted:
                raise UserError(problem) from None
            return Ended(problem, lost=True)  # a limit, or a controller too busy: the other jobs go on
        self._accepted = True
        write_json(task.folder / "slurm" / "job.json", {"job": job.job_id, "folder": str(folder)})
        return job

    def ends(self, attempts: Mapping[str, "submitit.Job[Ended] | Ended"], seconds: float) -> dict[str, Ended]:
        ask = time.monotonic() - self._asked >= _SECONDS_BETWEEN_QUESTIONS
        ends = {}
        for key, job in attempts.items():
            if isinstance(job, Ended):
                ends[key] = job
            elif job.done(force_check=ask):
                ends[key] = _end(job)
            elif ask:  # one question tells of all jobs
                self._asked, ask = time.monotonic(), False
        if not ends:
            time.sleep(seconds)
        return ends

    def cancel(self, attempt: "submitit.Job[Ended] | Ended", *, at_once: bool) -> None:
        """SLURM itself ends a cancelled job that does not end."""
        if not at_once and not isinstance(attempt, Ended):
            attempt.cancel(check=False)

    def close(self) -> None:
        """Nothing is kept open."""


class _Job(Host):
    def checkpoint(self, task: Task) -> "submitit.helpers.DelayedSubmission":
        """Called by submitit, some time before SLURM ends the job; what is returned runs when it has a place again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(type(self)(), task)


def _end(job: "submitit.Job[Ended]") -> Ended:
    if not job.paths.result_pickle.exists():
        return Ended(f"SLURM job {job.job_id} ended without a word: {job.state}", lost=True)
    try:
        return job.result()
    except RuntimeError:  # of the machine, of SLURM, of what is installed there
        return Ended(f"SLURM job {job.job_id} failed: {job.paths.stdout} says why", lost=True)


def _parameters(options: Sequence[str]) -> dict[str, Any]:
    """The options as submitit takes them: it must know the time, and hands on all others to ``sbatch`` as they are."""
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or (equals and not value):
            raise UserError(f"--slurm {option!r} is not of the form KEY=VALUE, with a long option of sbatch as the key")
        given[key.lstrip("-").replace("-", "_")] = value if equals else True
    minutes = str(given.pop("time", _MINUTES))
    if not minutes.isdecimal() or int(minutes) < 1:
        raise UserError(f"--slurm time must be a number of minutes, not {minutes!r}")
    return {"timeout_min": int(minutes), "slurm_additional_parameters": given}


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
