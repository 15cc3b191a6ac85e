"""Shares the machine among workers, so that they do not fight over it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Slot:
    """What one worker may use. cpus: cores (empty: all of them). environment: variables that choose its accelerator."""

    cpus: tuple[int, ...]
    environment: Mapping[str, str]


def make_slots(workers: int) -> list[Slot]:
    """Equal disjoint shares of the cores and GPUs; a lone worker has everything.

    Sharing matters on a CPU: XLA takes a thread for every core it is allowed, and two trials of as many threads as
    cores each are slower than one after the other.
    """
    if workers == 1:
        return [Slot((), {})]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = _gpus()
    return [Slot(_share(cores, slot, workers), _gpu(gpus, slot, workers)) for slot in range(workers)]


def _share(cores: list[int], slot: int, workers: int) -> tuple[int, ...]:
    """Every workers-th core; with more workers than cores, one core for several of them."""
    if not cores:
        return ()
    return tuple(cores[slot::workers]) or (cores[slot % len(cores)],)


def _gpus() -> list[str]:
    """Visible NVIDIA devices, found without jax, which would claim them for the launcher."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _gpu(gpus: list[str], slot: int, workers: int) -> dict[str, str]:
    if not gpus:
        return {}
    chosen = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if workers > len(gpus) and "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ:
        chosen["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # jax takes three quarters of a GPU unless told to share it
    return chosen
