"""A trainer without training: a few steps of sleep, a checkpoint after each, and a journal of everything it did."""

import csv
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from experiments.study import PlannedTrial
from genrec_jax.config import DataConfig, Trial
from genrec_jax.errors import UserError
from genrec_jax.models.base import ModelConfig
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json
from tests import bucket

assert bucket.Bucket  # whoever is sent a trial of this module knows of buckets

TRAINER = "fake_trainer:train_pack"


@dataclass(frozen=True)
class FakeConfig(ModelConfig):
    """behaviour: "" or what goes wrong; "wait" waits in step 2 until the trial's folder has a file ``go``.

    What SIGTERM stops there is "saved" in the journal.
    """

    name: ClassVar[str] = "fake"
    width: int = 8
    steps: int = 4
    step_seconds: float = 0.01
    behaviour: str = ""


def plan(count: int, study: str = "study", **settings: Any) -> list[PlannedTrial]:
    """Trials of growing width in two families."""
    return [
        PlannedTrial(
            trial=Trial(DataConfig(path="data/world"), FakeConfig(width=8 + k, **settings), seed=k % 2),
            study=study,
            family="even" if k % 2 == 0 else "odd",
            label=f"width={8 + k}",
            axis="model.width",
        )
        for k in range(count)
    ]


def train_pack(
    trials: Sequence[Trial], run_dirs: Sequence[Path], *, mesh: None, remat: bool, on_progress: Any
) -> list[dict[str, Any]]:
    """One trial after the other; each of several notes how many they are."""
    for run_dir in run_dirs if len(trials) > 1 else ():
        journal(run_dir, f"pack {len(trials)}")
    return [
        train(one, own, on_progress=functools.partial(on_progress, one))
        for one, own in zip(trials, run_dirs, strict=True)
    ]


def train(trial: Trial, run_dir: Path, *, on_progress: Any) -> dict[str, Any]:
    """Resumes after the last checkpoint; the result depends on the trial alone, but for its seconds."""
    config = trial.model
    assert isinstance(config, FakeConfig)
    began = time.monotonic()
    journal(run_dir, "start")
    checkpoint = run_dir / "checkpoint.json"
    step = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    while step < config.steps:
        step += 1
        journal(run_dir, f"step {step}")
        time.sleep(config.step_seconds)
        misbehave(config.behaviour, step, run_dir)
        write_json(checkpoint, {"step": step})
        on_progress({"step": step, "steps": config.steps, "loss": 1 / step, "examples_per_second": 100.0})
    result = {
        "status": "diverged" if config.behaviour == "diverge" else "done",
        "dataset": "world",
        "ne/like": 1 / config.width,
        "versions": {"jax": "0"},
        "ignored": [1, 2],
        "train_seconds": time.monotonic() - began,
        "cpus": len(os.sched_getaffinity(0)),
    }
    write_json(run_dir / "result.json", result)
    journal(run_dir, "finish")
    return result


def misbehave(behaviour: str, step: int, run_dir: Path) -> None:
    if behaviour == "raise" and step == 2:
        raise ValueError("the loss is\x1b[31m a fish")
    if behaviour == "wait" and step == 2:
        wait(run_dir)
    if behaviour == "refuse":
        raise UserError("data/world: no such dataset")
    if behaviour == "die once" and step == 3 and not (run_dir / "died").exists():
        (run_dir / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def wait(run_dir: Path) -> None:
    try:
        journal(run_dir, "wait")
        while not (run_dir / "go").exists():
            time.sleep(0.05)
    except SystemExit:
        time.sleep(0.5)  # as long as it takes to write a checkpoint
        journal(run_dir, "saved")
        raise


def journal(run_dir: Path, event: str) -> None:
    with (run_dir / "journal.txt").open("a") as file:
        file.write(f"{os.getpid()} {event}\n")


def read_journal(run_dir: Place) -> list[tuple[int, str]]:
    path = run_dir / "journal.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), event) for pid, _, event in (line.partition(" ") for line in lines)]


def journals(out: Place) -> dict[Place, list[tuple[int, str]]]:
    return {folder: read_journal(folder) for folder in sorted((out / "trials").glob("*/"))}


def assert_sound(out: Path) -> None:
    """No two processes at once in one folder, no step twice but the one a kill cut short, nothing after the finish."""
    for lines in journals(out).values():
        turns = [(pid, [event for _, event in turn]) for pid, turn in groupby(lines, key=lambda line: line[0])]
        assert len({pid for pid, _ in turns}) == len(turns)
        reached = 0
        for _, events in turns:
            steps = [int(event.split()[1]) for event in events if event.startswith("step")]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
            assert not steps or steps[0] in (reached, reached + 1)
            reached = steps[-1] if steps else reached
        events = [event for _, event in lines]
        assert "finish" not in events[:-1]


def read_table(out: Place) -> list[dict[str, str]]:
    """Rows of results.csv without what depends on where and when they were made."""
    lines = (out / "results.csv").read_text().splitlines()
    return [{k: v for k, v in row.items() if k not in ("train_seconds", "cpus")} for row in csv.DictReader(lines)]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
