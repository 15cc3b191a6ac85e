"""One holder at a time, on one machine or on several, and none for ever."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_trainer import until

from experiments import lease
from experiments.lease import hold

HOLDER = """
import sys, pathlib
from experiments import lease
lease.BEAT, lease.LEASE = 0.1, 2.0
lease._machine = lambda: sys.argv[2]
held = lease.hold(pathlib.Path(sys.argv[1]), wait=True)
print("held", flush=True)
sys.stdin.read()
held.close()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "LEASE", 2.0)
    monkeypatch.setattr(lease, "_SETTLE", 0.1)


def holder(path: Path, machine: str) -> "subprocess.Popen[str]":
    """A process that has the lease until its stdin is closed, on a machine of that name."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), machine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def here() -> str:
    return lease._machine()


def test_given_back_and_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        held = hold(tmp_path / "lease", wait=False)
        assert held is not None
        assert (tmp_path / "lease").exists()
        held.close()
        assert not (tmp_path / "lease").exists()


@pytest.mark.parametrize("machine", ["here", "elsewhere"])
def test_a_living_holder_keeps_it(tmp_path: Path, machine: str) -> None:
    path = tmp_path / "lease"
    with holder(path, here() if machine == "here" else machine) as other:
        assert hold(path, wait=False) is None
        threading.Timer(2.5, other.stdin.close).start()  # type: ignore[union-attr]
        with hold(path, wait=True) as held:  # type: ignore[union-attr]
            assert held is not None
            assert other.wait(10) == 0


def test_the_dead_of_this_machine_are_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease"
    with holder(path, here()) as other:
        other.kill()
    monkeypatch.setattr(lease, "LEASE", 1000.0)
    held = hold(path, wait=False)
    assert held is not None
    held.close()


def test_a_lost_machine_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holder(path, "elsewhere") as other:
        other.kill()
    began = time.monotonic()
    held = hold(path, wait=False)
    assert held is not None
    assert time.monotonic() - began >= lease.LEASE
    held.close()


def test_who_comes_back_too_late_ends(tmp_path: Path) -> None:
    """A machine that was cut off for a while must not go on beside its successor."""
    path = tmp_path / "lease"
    with holder(path, "elsewhere") as other:
        lease._write(path, "another successor")
        assert other.wait(10) == os.EX_TEMPFAIL
    assert path.read_text(encoding="ascii") == "another successor"


def test_of_two_who_wait_for_a_lost_machine_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.write_text("lost 0", encoding="ascii")
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    got: list[str] = []
    for other in others:
        assert other.stdout is not None
        threading.Thread(target=lambda out=other.stdout: got.append(out.readline()), daemon=True).start()
    until(lambda: got, seconds=30)
    time.sleep(1.0)
    assert got == ["held\n"]
    for other in others:
        assert other.stdin is not None
        other.stdin.close()
    until(lambda: len(got) == 2)  # the second has had its turn, too
    for other in others:
        assert other.wait(10) == 0
        assert other.stdout is not None
        other.stdout.close()
    assert not path.exists()
