"""Whatever is killed, and whenever: nothing trains twice, nothing is lost, and the table comes out the same."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_trainer import TRAINER, alive, assert_sound, journals, plan, read_table, until

from experiments.executors.local import LocalExecutor
from experiments.folder import only_launcher, trial_folder
from experiments.launch import run_study

TRIALS = 4
STEP_SECONDS = 0.2


def start(out: Path) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("launch_fake.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(out), str(TRIALS), str(STEP_SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(out: Path) -> list[int]:
    """Processes that have trained and still exist."""
    pids = {pid for lines in journals(out).values() for pid, _ in lines}
    return sorted(pid for pid in pids if alive(pid))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("undisturbed")
    run_study(plan(TRIALS, step_seconds=STEP_SECONDS), out, executor=LocalExecutor(2), quiet=True, trainer=TRAINER)
    return read_table(out)


def disturb(out: Path, chance: random.Random, *, worker_too: bool) -> None:
    """Starts a launcher and, once it trains, kills it at a random moment, perhaps after one of its workers."""
    before = journals(out)
    launcher = start(out)
    until(lambda: journals(out) != before or launcher.poll() is not None)
    time.sleep(chance.uniform(0, 0.4))
    if worker_too and workers(out):
        os.kill(chance.choice(workers(out)), signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.3))
    launcher.kill()
    launcher.communicate()


def assert_finishes(out: Path, expected: list[dict[str, str]]) -> None:
    launcher = start(out)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert_sound(out)
    assert read_table(out) == expected


def test_random_kills(tmp_path: Path, undisturbed: list[dict[str, str]]) -> None:
    chance = random.Random(0)
    for turn in range(5):
        disturb(tmp_path, chance, worker_too=turn % 2 == 1)
        if turn % 2 == 0:  # after the other turns the next launcher meets what is left of this one
            until(lambda: not workers(tmp_path), seconds=5.0)
    assert_finishes(tmp_path, undisturbed)


def test_interrupt(tmp_path: Path, undisturbed: list[dict[str, str]]) -> None:
    launcher = start(tmp_path)
    until(lambda: workers(tmp_path))
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 130, output
    assert output.splitlines()[-1] == f"stopped with 0 of {TRIALS} trials finished; run the same command again to go on"
    assert "Traceback" not in output
    assert not workers(tmp_path)
    assert_finishes(tmp_path, undisturbed)


def test_a_second_launcher_is_refused(tmp_path: Path) -> None:
    with only_launcher(tmp_path):
        second = start(tmp_path)
        output, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert output == f"error: another launcher is at work in {tmp_path}; let it finish or choose another --out\n"
    assert not (tmp_path / "trials").exists()


def test_a_worker_waits_for_the_one_that_has_the_folder(tmp_path: Path) -> None:
    """A worker whose launcher lost sight of it must finish or die before another may train the same trial."""
    (one,) = plan(1)
    folder = trial_folder(tmp_path, one.trial.hash)
    folder.mkdir(parents=True)
    script = (
        f"import sys, pathlib; from experiments.lease import hold; held = hold(pathlib.Path({str(folder)!r}) / 'lease'"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{script}, wait=True); print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    timer = threading.Timer(1.0, holder.kill)
    timer.start()
    began = time.monotonic()
    summary = run_study([one], tmp_path, executor=LocalExecutor(1), quiet=True, trainer=TRAINER)
    timer.join()
    holder.communicate()
    assert summary.done == 1
    assert time.monotonic() - began > 0.9
