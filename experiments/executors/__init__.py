"""Where the attempts at a study's trials run: processes of this machine, a Ray cluster or SLURM.

An executor starts attempts, says what becomes of them, and stops them. Everything else (which trials are left, how
often one is tried, what is recorded and shown) is the launcher's, and the same for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from genrec_jax.config import Trial
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place

ExecutorName = Literal["local", "ray", "slurm"]


@dataclass(frozen=True)
class Training:
    """How attempts train, by the options of the command line; no part of a trial.

    pack: trials that are trained together. mesh: the devices of an attempt's process that share its trial, as of
    ``genrec train``. remat: likewise. Raises UserError for what cannot be read, or does not go together.
    """

    pack: int = 1
    mesh: str | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        if self.pack < 1:
            raise UserError(f"--pack must be at least 1, not {self.pack}")
        if self.mesh is not None:
            from genrec_jax.distributed.mesh import parse_mesh

            parse_mesh(self.mesh)
            if self.pack > 1:
                raise UserError("--mesh goes with --pack 1: a mesh is for a trial alone")


@dataclass(frozen=True)
class Task:
    """One attempt at a trial, or at several that are trained together, each with its folder.

    trainer: "module:function". cwd: what relative paths of the trials start from. cpus: cores to use (empty: all).
    environment: variables to set before jax looks for devices.
    """

    trials: tuple[Trial, ...]
    folders: tuple[Place, ...]
    trainer: str
    cwd: Path
    how: Training = field(default_factory=Training)
    cpus: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Place:
        """Of the first trial: what belongs to the attempt as a whole is there."""
        return self.folders[0]

    @property
    def key(self) -> str:
        """The attempt's name among all that are at work."""
        return self.folder.name


@dataclass(frozen=True)
class Began:
    """The attempt is at work; ``where`` names the machine if it is another one."""

    where: str = ""


@dataclass(frozen=True)
class Progress:
    """A line of a trial's ``metrics.jsonl`` that has a loss. trial: its hash."""

    trial: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Waiting:
    """Another process has a trial's folder."""


@dataclass(frozen=True)
class Ended:
    """The last word. problem: why there is no result, if there is none.

    refused: trying again is no use. lost: the attempt was ended from outside, through no fault of the trial's.
    """

    problem: str
    refused: bool = False
    lost: bool = False


Word = Began | Progress | Waiting | Ended


class Executor(Protocol):
    """name: as in ``--executor``. workers: attempts at a time, None for as many as there are trials.

    grace: seconds that attempts get to write a checkpoint when they are stopped.
    """

    name: ExecutorName
    workers: int | None
    grace: float

    def open(self, trials: int, trainer: str) -> None:
        """Called before the first start with the number of trials to run."""

    def start(self, task: Task) -> None:
        """Starts an attempt, at once or when there is room for it; a trial is in one at a time."""

    def listen(self, seconds: float) -> list[tuple[str, Word]]:
        """Waits for words, ``seconds`` at most, and returns them with the keys of the tasks they are from.

        The last word of every attempt is Ended, and its process is gone then, as far as anybody can know.
        """

    def stop(self, *, at_once: bool) -> None:
        """Asks all attempts to end, as SIGTERM does; ``at_once``: ends them and forgets them."""

    def close(self) -> None:
        """Called when no attempt is at work any more."""


@dataclass(frozen=True)
class ExecutorConfig:
    """The options of the command line. cpus, gpus: for each trial. slurm: KEY=VALUE of ``sbatch``.

    Raises UserError for options that do not go together and for impossible counts.
    """

    name: ExecutorName = "local"
    workers: int | None = None
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    slurm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, value, names in (
            ("--address", self.address, ("ray",)),
            ("--slurm", self.slurm or None, ("slurm",)),
            ("--cpus", self.cpus, ("ray", "slurm")),
            ("--gpus", self.gpus, ("ray", "slurm")),
        ):
            if value is not None and self.name not in names:
                raise UserError(f"{flag} goes with --executor {' or '.join(names)}, not {self.name}")
        for flag, count in (("--workers", self.workers), ("--cpus", self.cpus)):
            if count is not None and count < 1:
                raise UserError(f"{flag} must be at least 1, not {count}")
        if self.gpus is not None and self.gpus < 0:
            raise UserError(f"--gpus must be at least 0, not {self.gpus:g}")

    def trials_at_once(self, trials: int) -> int:
        """Of so many; a cluster that says nothing else takes them all."""
        return self.workers or (1 if self.name == "local" else trials)


def make_executor(config: ExecutorConfig) -> Executor:
    """Raises UserError for a missing extra and for a cluster that does not answer."""
    cpus, gpus = config.cpus or 1, config.gpus or 0.0
    if config.name == "ray":
        from experiments.executors.ray import RayExecutor

        return RayExecutor(config.workers, address=config.address, cpus=cpus, gpus=gpus)
    if config.name == "slurm":
        from experiments.executors.slurm import SlurmExecutor

        return SlurmExecutor(config.workers, cpus=cpus, gpus=gpus, options=config.slurm)
    from experiments.executors.local import LocalExecutor

    return LocalExecutor(config.trials_at_once(1))


def missing(name: ExecutorName) -> UserError:
    """Says which extra brings the packages of an executor."""
    return UserError(f"--executor {name} needs more packages: install with pip install 'genrec-lab[{name}]'")
