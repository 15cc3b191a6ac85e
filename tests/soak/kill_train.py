"""Kills a training again and again at random steps, and holds what comes of it against a run that was left alone.

    python -m tests.soak.kill_train --kills 20 --processes 2
    python -m tests.soak.kill_train --devices 8 2 4

The first: SIGKILL and SIGTERM in turn, to a random one of the processes; parameters and metrics must be bitwise those
of the undisturbed run. The second: killed twice, going on with other numbers of devices; losses must agree to 1e-5.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genrec_jax.config import default_trial, override
from genrec_jax.train.loop import restored
from tests.data.helpers import random_dataset
from tests.distributed.launching import start
from tests.train.helpers import lines

MODEL = "hstu"
SETTINGS = {
    "data.history": 16,
    "data.candidates": 2,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "train.batch_rows": 8,
    "train.pieces": 8,
    "train.learning_rate": 0.003,
    "train.embedding_learning_rate": 0.003,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.checkpoint_seconds": 0.0,
    "train.validations": 4,
}


def step_of(line: str) -> int:
    return int(line.split("/")[0].removeprefix("step ")) if line.startswith("step ") else 0


def disturbed(running: list[subprocess.Popen], until: int, victim: int, how: signal.Signals) -> int:
    """Sends the signal to one of the processes after the first has told of step ``until``, and waits for the end of
    all; returns the last step told, 0 if none was. Raises RuntimeError if any outlives the others by two minutes."""
    assert running[0].stdout is not None
    step = 0
    for line in running[0].stdout:
        step = max(step, step_of(line))
        if step >= until:
            break
    running[victim].send_signal(how)
    for process in running:
        try:
            out, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            raise RuntimeError("a process outlived another that was killed") from None
        step = max(step, *(step_of(line) for line in (out or "").splitlines()), 0)
    return step


def finished(running: list[subprocess.Popen]) -> None:
    for process in running:
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {said}")


def killed_at_random(folder: Path, kills: int, processes: int, seed: int) -> None:
    """Prints what every kill did, and whether the outcome is bitwise that of the undisturbed run."""
    data = random_dataset(folder / "log", users=60).path
    settings = {**SETTINGS, "train.steps": 12 * kills}
    whole, cut = folder / "whole", folder / "cut"

    def begin(out: Path) -> list[subprocess.Popen]:
        return start(data, out, MODEL, settings, mesh="data=2", processes=processes, devices=2 // processes)

    finished(begin(whole))
    draw, reached, landed = random.Random(seed), 0, 0
    while landed < kills:
        until = reached + draw.randrange(1, 10)
        how, victim = (signal.SIGKILL, signal.SIGTERM)[landed % 2], draw.randrange(processes)
        reached = disturbed(begin(cut), until, victim, how)
        landed += 1
        print(f"kill {landed}: {how.name} to process {victim} of {processes}, last step told {reached}", flush=True)
        if (cut / "result.json").exists():
            print("the run was through before it could be killed", flush=True)
            break
    finished(begin(cut))
    trial = override(default_trial(MODEL, path=str(data)), settings)
    ends = [jax.tree.leaves(restored(trial, run)[2]) for run in (whole, cut)]
    same = all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
    logs = lines(whole) == lines(cut)
    print(f"{landed} kills over {processes} process(es): parameters bitwise equal: {same}; metrics equal: {logs}")
    if not (same and logs):
        raise SystemExit(1)


def over_devices(folder: Path, devices: list[int]) -> None:
    """Prints how far apart the losses come."""
    data = random_dataset(folder / "log", users=60).path
    each = 20
    settings = {**SETTINGS, "train.steps": each * len(devices)}
    whole, cut = folder / "whole", folder / "cut"

    def begin(out: Path, count: int) -> list[subprocess.Popen]:
        return start(data, out, MODEL, settings, mesh=f"fsdp={count}", processes=1, devices=count)

    finished(begin(whole, devices[0]))
    for number, count in enumerate(devices[:-1], 1):
        reached = disturbed(begin(cut, count), number * each, 0, signal.SIGKILL)
        print(f"killed on {count} devices, last step told {reached}", flush=True)
    finished(begin(cut, devices[-1]))
    rows: list[list[dict[str, Any]]] = [lines(run) for run in (whole, cut)]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    worst = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    used = json.loads((cut / "result.json").read_text(encoding="utf-8"))["devices"]
    print(f"devices {devices} (the last on {used}): {len(losses[0])} losses, worst relative difference {worst:.2g}")
    if worst > 1e-5:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, nargs="+", help="numbers of devices to go on with, one after the other")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.devices:
            over_devices(Path(folder), given.devices)
        else:
            killed_at_random(Path(folder), given.kills, given.processes, given.seed)


if __name__ == "__main__":
    main()
