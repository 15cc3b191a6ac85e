"""Kills a real sweep five times and holds its results table against that of a sweep left alone.

    python -m tests.soak.kill_sweep [SEED [URL]]

Runs the quickstart study on the tiny synthetic world twice with two workers: once undisturbed, once with ``kill -9`` of
the launcher or of a worker at random moments, five times, starting the same command again whenever the launcher died.
Prints every kill, then whether the tables agree in every column that is not a time, and how often each trial finished.
With a URL the sweep that is killed has its folder there, in a store (it must be empty).
Takes about three minutes on two cores; too long for the suite, which kills a fake trainer instead (test_kill.py).
"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from genrec_jax.train.places import Place, place

TIMES = {
    "train_seconds",
    "compile_seconds",
    "wall_seconds",
    "examples_per_second",
    "achieved_flops",
    "mfu",
}


def sweep(data: Path, out: Place) -> subprocess.Popen:
    """Starts the launcher in a process group of its own."""
    command = [sys.executable, "-m", "experiments.quickstart", "--data", str(data), "--workers", "2", "--quiet"]
    return subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, start_new_session=True)


def make_world(data: Path) -> None:
    command = [sys.executable, "-m", "experiments.cli", "data", "synthetic", "--preset", "tiny", "--out", str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def workers(launcher: int) -> list[int]:
    """Process ids of the running trials: grandchildren of the launcher, below its fork server."""
    children = _children(launcher)
    return [grandchild for child in children for grandchild in _children(child)]


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except FileNotFoundError:
        return []


def disturbed(data: Path, out: Place, rng: random.Random, kills: int = 5) -> None:
    """Runs the sweep to its end through ``kills`` kills."""
    launcher = sweep(data, out)
    for turn in range(kills):
        time.sleep(rng.uniform(3.0, 9.0))
        at_work = workers(launcher.pid)
        hit_launcher = turn % 2 == 0 or not at_work
        victim = launcher.pid if hit_launcher else rng.choice(at_work)
        if launcher.poll() is not None:
            print(f"the sweep ended before kill {turn + 1}")
            break
        os.kill(victim, signal.SIGKILL)
        print(
            f"kill {turn + 1}: {'launcher' if hit_launcher else 'worker'}, {finished(out)} trials finished", flush=True
        )
        if hit_launcher:
            launcher.wait()
            launcher = sweep(data, out)
    if launcher.wait() != 0:
        launcher = sweep(data, out)
        launcher.wait()


def finished(out: Place) -> int:
    return len(list(out.glob("trials/*/result.json")))


def table(out: Place) -> dict[str, dict[str, str]]:
    """Rows of results.csv by trial, without the columns that measure time."""
    rows = csv.DictReader((out / "results.csv").read_text(encoding="utf-8").splitlines())
    return {row["trial"]: {k: v for k, v in row.items() if k not in TIMES} for row in rows}


def main() -> int:
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    with tempfile.TemporaryDirectory() as scratch:
        data, quiet = (Path(scratch) / name for name in ("world", "undisturbed"))
        killed = place(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch) / "killed"
        make_world(data)
        sweep(data, quiet).wait()
        before = table(quiet)
        disturbed(data, killed, rng)
        after = table(killed)
    return compare(before, after)


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> int:
    """Prints where the tables differ; returns the exit code, 0 if they do not."""
    same = sum(before[trial] == after.get(trial) for trial in before)
    print(
        f"{len(before)} trials undisturbed, {len(after)} after the kills, {same} rows equal in every column but times"
    )
    for trial in before:
        for key, value in before[trial].items():
            if after.get(trial, {}).get(key) != value:
                print(f"  {trial} {key}: {value} undisturbed, {after.get(trial, {}).get(key)} killed")
    return 0 if same == len(before) == len(after) else 1


if __name__ == "__main__":
    sys.exit(main())
