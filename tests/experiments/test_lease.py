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
from genrec_jax.train import places
from genrec_jax.train.places import Place, machine, place, write_text
from tests import bucket

HOLDER = """
import sys
import tests.bucket
from experiments import lease
from genrec_jax.train import places
lease.BEAT, lease.LEASE, places.SETTLE = 0.1, 2.0, 0.1
places.machine = lease.machine = lambda _: sys.argv[2]
held = lease.hold(places.place(sys.argv[1]), wait=True)
print("held", flush=True)
sys.stdin.read()
held.close()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "LEASE", 2.0)
    monkeypatch.setattr(places, "SETTLE", 0.1)


@pytest.fixture(params=["folder", "store"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A lease in a folder, and in a store."""
    if request.param == "folder":
        return tmp_path / "lease"
    bucket.use(tmp_path, monkeypatch)
    return place("bucket://one/study/lease")


def holder(path: Place, machine: str) -> "subprocess.Popen[str]":
    """A process that has the lease until its stdin is closed, on a machine of that name."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), machine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def here(path: Place) -> str:
    return machine(path)


def test_given_back_and_taken_again(path: Place) -> None:
    for _ in range(2):
        held = hold(path, wait=False)
        assert held is not None
        assert path.exists()
        held.close()
        assert not path.exists()


@pytest.mark.parametrize("machine", ["here", "elsewhere"])
def test_a_living_holder_keeps_it(path: Place, machine: str) -> None:
    with holder(path, here(path) if machine == "here" else machine) as other:
        assert hold(path, wait=False) is None
        threading.Timer(2.5, other.stdin.close).start()  # type: ignore[union-attr]
        with hold(path, wait=True) as held:  # type: ignore[union-attr]
            assert held is not None
            assert other.wait(10) == 0


def test_the_dead_of_this_machine_are_known_at_once(path: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(path, here(path)) as other:
        other.kill()
    monkeypatch.setattr(lease, "LEASE", 1000.0)
    held = hold(path, wait=False)
    assert held is not None
    held.close()


def test_a_lost_machine_keeps_nothing(path: Place) -> None:
    with holder(path, "elsewhere") as other:
        other.kill()
    began = time.monotonic()
    held = hold(path, wait=False)
    assert held is not None
    assert time.monotonic() - began >= lease.LEASE
    held.close()


def test_who_comes_back_too_late_ends(path: Place) -> None:
    """A machine that was cut off for a while must not go on beside its successor."""
    with holder(path, "elsewhere") as other:
        write_text(path, "another successor")
        assert other.wait(10) == os.EX_TEMPFAIL
    assert path.read_text() == "another successor"


def test_of_two_who_wait_for_a_lost_machine_one_gets_it(path: Place) -> None:
    write_text(path, "lost 0")
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
