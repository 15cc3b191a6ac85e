"""Holds trainings by several processes against one by a single process, and kills one of them.

    python -m tests.soak.processes --processes 1 2 4

All have four devices together, DLRM with a large table that they own in blocks and move by rows, and HSTU with all of
its parameters divided. Losses and parameters must agree to 1e-5. Then one of the most processes is killed: the others
must end within a minute, and say why.
"""

import argparse
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genrec_jax.config import default_trial, override
from genrec_jax.train.loop import restored
from tests.data.helpers import random_dataset
from tests.distributed.launching import start
from tests.soak.kill_train import SETTINGS, finished, step_of
from tests.train.helpers import lines

DEVICES = 4
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dlrm": ("data=2,fsdp=2", {"train.embedding_optimizer": "rowwise_adamw", "train.batch_rows": 8}),
    "hstu": ("fsdp=4", SETTINGS),
}


def apart(model: str, settings: dict[str, Any], data: Path, runs: list[Path]) -> tuple[float, float]:
    """The largest relative difference of a loss and absolute one of a parameter, of any run from the first."""
    trial = override(default_trial(model, path=str(data)), settings)
    losses = [np.array([row["loss"] for row in lines(run) if "loss" in row]) for run in runs]
    params = [jax.tree.leaves(restored(trial, run)[2]) for run in runs]
    worst = max(float(np.max(np.abs(other / losses[0] - 1))) for other in losses[1:])
    of_params = max(
        float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))))
        for other in params[1:]
        for a, b in zip(params[0], other, strict=True)
    )
    return worst, of_params


def agree(folder: Path, data: Path, counts: list[int]) -> bool:
    """Prints how far apart runs by so many processes come; whether that is near enough."""
    near = True
    for model, (mesh, own) in RUNS.items():
        settings = {**own, "train.steps": 50, "train.log_every": 1}
        runs = [folder / f"{model}-{count}" for count in counts]
        for count, run in zip(counts, runs, strict=True):
            finished(start(data, run, model, settings, mesh=mesh, processes=count, devices=DEVICES // count))
        loss, param = apart(model, settings, data, runs)
        print(
            f"{model}, {mesh}, {counts} processes, 50 steps: losses {loss:.2g} apart, parameters {param:.2g}",
            flush=True,
        )
        near &= loss <= 1e-5 and param <= 1e-5
    return near


def lose_one(folder: Path, data: Path, count: int) -> bool:
    """Kills the last of the processes at step 20, and prints how soon the others end and what they say."""
    mesh, own = RUNS["dlrm"]
    settings = {**own, "train.steps": 100_000, "train.log_every": 1}
    running = start(data, folder / "lost", "dlrm", settings, mesh=mesh, processes=count, devices=DEVICES // count)
    assert running[0].stdout is not None
    for line in running[0].stdout:
        if step_of(line) >= 20:
            break
    running[-1].send_signal(signal.SIGKILL)
    killed, well = time.monotonic(), True
    for number, process in enumerate(running[:-1]):
        said = process.communicate(timeout=120)[1]
        took = time.monotonic() - killed
        print(f"process {number} of {count} ended with {process.returncode}, {took:.1f} s after the last was killed:")
        print("".join(f"    {line[:400]}\n" for line in said.splitlines()), end="", flush=True)
        well &= process.returncode != 0 and took < 60 and "another process of this job is gone" in said
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], choices=(1, 2, 4))
    counts = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        data = random_dataset(Path(folder) / "log", users=1200).path
        if not (agree(Path(folder), data, counts) & lose_one(Path(folder), data, max(counts))):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
