"""Attempts as tasks of a Ray cluster, which finds each a node with the CPUs and GPUs it asks for.

A node must have this package installed and see the study's folder. Ray itself tries nothing again: the launcher does,
as for every executor, and the trial goes on from its last checkpoint on another node.
"""

import logging
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experiments.executors import Ended, ExecutorName, Task, missing
from experiments.executors.shared import Host, SharedExecutor
from genrec_jax.errors import UserError

if TYPE_CHECKING:
    from ray import ObjectRef


class RayExecutor(SharedExecutor["ObjectRef[Ended]"]):
    """address: as of ``ray.init``; None for Ray's own choice. cpus, gpus: of each trial; a fraction shares a GPU.

    Raises UserError without the extra and where no cluster answers.
    """

    name: ExecutorName = "ray"

    def __init__(self, workers: int | None, *, address: str | None, cpus: int, gpus: float) -> None:
        super().__init__(workers)
        try:
            import ray
        except ModuleNotFoundError:
            raise missing("ray") from None
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = f"at {address}" if address else "here"
            raise UserError(f"no Ray cluster answers {where}: {_first_sentence(error)}") from None
        self._ray = ray
        self._cpus, self._gpus = cpus, gpus
        self._attempt: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_attempt)
        # XLA takes a thread for every core it sees unless told of a reservation.
        self._environment = {"NPROC": str(cpus)}
        if gpus % 1:
            self._environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else jax takes three quarters of a GPU

    def open(self, trials: int, trainer: str) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self._cpus and node.get("GPU", 0) >= self._gpus for node in nodes):
            print(
                f"note: no node of the cluster has {self._cpus} CPUs and {self._gpus:g} GPUs; the trials wait for one"
            )

    def submit(self, task: Task) -> "ObjectRef[Ended]":
        reference: ObjectRef[Ended] = self._attempt.remote(replace(task, environment=self._environment))
        return reference

    def ends(self, attempts: Mapping[str, "ObjectRef[Ended]"], seconds: float) -> dict[str, Ended]:
        over, _ = self._ray.wait(list(attempts.values()), timeout=seconds)
        return {key: self._end(attempt) for key, attempt in attempts.items() if attempt in over}

    def cancel(self, attempt: "ObjectRef[Ended]", *, at_once: bool) -> None:
        self._ray.cancel(attempt, force=at_once)

    def close(self) -> None:
        self._ray.shutdown()

    def _end(self, attempt: "ObjectRef[Ended]") -> Ended:
        try:
            end: Ended = self._ray.get(attempt)
        except self._ray.exceptions.RayError as error:  # of the node, of Ray, of what is installed there
            return Ended(_first_sentence(error), lost=True)
        return end


def _knock(address: str | None) -> None:
    """Raises OSError if nobody listens at HOST:PORT, where Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _attempt(task: Task) -> Ended:
    return Host()(task)


def _first_sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")
