"""Whatever runs the trials: the same table, the same failures, and nothing lost with a node, a job or a launcher."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from fake_trainer import TRAINER, alive, assert_sound, plan, read_journal, read_table, until

from experiments.cli import main
from experiments.executors import Executor, ExecutorConfig, ExecutorName, make_executor
from experiments.executors.local import LocalExecutor
from experiments.folder import trial_folder
from experiments.launch import run_study
from experiments.study import PlannedTrial
from genrec_jax.errors import UserError
from genrec_jax.train.places import place
from tests import bucket

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The fake trainer, and a bucket, are there on every node and in every job."""
    with pytest.MonkeyPatch.context() as patch:
        bucket.use(tmp_path_factory.mktemp("t"), patch)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE)]))
        yield


def mixed(waiting: int, good: int) -> list[PlannedTrial]:
    """Trials that wait to be told to go on, some that do not, and three that fail, die once and are refused."""
    behaviours = ["wait"] * waiting + [""] * good + ["raise", "die once", "refuse"]
    return [plan(k + 1, behaviour=behaviour)[k] for k, behaviour in enumerate(behaviours)]


def let_go(out: Path, planned: list[PlannedTrial]) -> None:
    for one in planned:
        folder = trial_folder(out, one.trial.hash)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "go").touch()


def events(out: Path, one: PlannedTrial) -> list[str]:
    return [event for _, event in read_journal(trial_folder(out, one.trial.hash))]


def outcome(planned: list[PlannedTrial], out: Path, executor: Executor) -> dict[str, Any]:
    """Everything that a launch leaves, but for its times and places."""
    with pytest.raises(UserError) as refused:
        run_study(planned, out, executor=executor, quiet=True, trainer=TRAINER)
    assert_sound(out)
    failures = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/failure.json")}
    return {"table": read_table(out), "failures": failures, "said": str(refused.value)}


def attempts(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "launch.json").read_text())["attempts"]
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A Ray cluster of three nodes with a CPU each: its address, and the process that takes nodes away."""
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, str(HERE / "ray_nodes.py"), "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip(), cluster


def test_ray_comes_to_what_local_processes_do_and_survives_the_loss_of_a_node(
    tmp_path: Path, nodes: tuple[str, "subprocess.Popen[str]"], capfd: pytest.CaptureFixture[str]
) -> None:
    planned = mixed(waiting=3, good=6)
    here, there = tmp_path / "local", tmp_path / "ray"
    let_go(here, planned)
    expected = outcome(planned, here, LocalExecutor(2))
    address, cluster = nodes
    executor = make_executor(ExecutorConfig("ray", address=address))

    def lose_a_node() -> None:
        assert cluster.stdin is not None
        until(lambda: all("wait" in events(there, one) for one in planned[:3]), seconds=120)
        cluster.stdin.write("remove\n")
        cluster.stdin.flush()
        workers = [read_journal(trial_folder(there, one.trial.hash))[0][0] for one in planned[:3]]
        until(lambda: not all(alive(pid) for pid in workers), seconds=60)
        let_go(there, planned)

    disturber = threading.Thread(target=lose_a_node)
    disturber.start()
    assert outcome(planned, there, executor) == expected
    disturber.join()
    more = {key: count - attempts(here)[key] for key, count in attempts(there).items()}
    assert sorted(more.values()) == [0] * 11 + [1]  # the trial of the lost node was started once more
    assert "retry" in capfd.readouterr().out


def test_ray_ends_attempts_with_the_launcher(tmp_path: Path, nodes: tuple[str, "subprocess.Popen[str]"]) -> None:
    planned = plan(1, behaviour="wait")
    config = ExecutorConfig("ray", address=nodes[0])

    def interrupt() -> None:
        until(lambda: "wait" in events(tmp_path, planned[0]), seconds=120)
        os.kill(os.getpid(), signal.SIGINT)

    disturber = threading.Thread(target=interrupt)
    disturber.start()
    with pytest.raises(SystemExit) as stop:
        run_study(planned, tmp_path, executor=make_executor(config), quiet=True, trainer=TRAINER)
    disturber.join()
    assert stop.value.code == 130
    ((worker, _), *_) = read_journal(trial_folder(tmp_path, planned[0].trial.hash))
    assert not alive(worker)
    assert events(tmp_path, planned[0])[-1] == "saved"
    let_go(tmp_path, planned)
    assert run_study(planned, tmp_path, executor=make_executor(config), quiet=True, trainer=TRAINER).done == 1
    assert_sound(tmp_path)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with SLURM, as far as anybody can tell."""
    pytest.importorskip("submitit")
    fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm" / "state"))
    monkeypatch.setattr("experiments.executors.slurm._SECONDS_BETWEEN_QUESTIONS", 0.5, raising=True)
    return tmp_path / "slurm"


def job_of(out: Path, one: PlannedTrial) -> str:
    job: str = json.loads((trial_folder(out, one.trial.hash) / "slurm" / "job.json").read_text())["job"]
    return job


def test_slurm_comes_to_what_local_processes_do_through_preemption_and_the_loss_of_a_node(
    tmp_path: Path, slurm: Path
) -> None:
    planned = mixed(waiting=1, good=0)
    here, there = tmp_path / "local", tmp_path / "there"
    let_go(here, planned)
    expected = outcome(planned, here, LocalExecutor(4))
    steady = planned[0]

    def disturb() -> None:
        until(lambda: "wait" in events(there, steady), seconds=120)
        fake_slurm.preempt(job_of(there, steady))
        until(lambda: events(there, steady).count("wait") == 2, seconds=120)
        assert "saved" in events(there, steady)
        fake_slurm.fail(job_of(there, steady))
        let_go(there, planned)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    options = ("partition=gpu", "time=30", "exclusive")
    executor = make_executor(ExecutorConfig("slurm", workers=2, cpus=3, gpus=1, slurm=options))
    assert outcome(planned, there, executor) == expected
    disturber.join()
    # Preempted, the same job goes on, which is no attempt of the launcher's; after the loss of its node another does.
    assert attempts(there) == attempts(here) | {steady.trial.hash: 2}
    asked = fake_slurm.options(job_of(there, steady))
    assert asked["job-name"] == f"genrec-{steady.trial.hash}"
    assert (asked["partition"], asked["time"], asked["exclusive"]) == ("gpu", "30", "")
    assert (asked["cpus-per-task"], asked["gpus-per-node"]) == ("3", "1")


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_a_study_in_a_store(
    name: ExecutorName, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes and launcher have it in common, and no folder; SLURM's own files lie below the working directory."""
    monkeypatch.chdir(tmp_path)
    planned, out = plan(2), place(f"bucket://one/{name}")
    address = request.getfixturevalue("nodes")[0] if name == "ray" else None
    if name == "slurm":
        request.getfixturevalue("slurm")
    executor = make_executor(ExecutorConfig(name, address=address))
    assert run_study(planned, out, executor=executor, quiet=True, trainer=TRAINER).done == 2
    run_study(planned, tmp_path / "here", executor=LocalExecutor(2), quiet=True, trainer=TRAINER)
    assert read_table(out) == read_table(tmp_path / "here")
    for one in planned:
        folder = trial_folder(out, one.trial.hash)
        assert json.loads((folder / "attempt.json").read_text())["where"] == socket.gethostname()
        assert [event for _, event in read_journal(folder)][-1] == "finish"
        assert (folder / "slurm" / "job.json").is_file() == (name == "slurm")


def launcher(out: Path) -> "subprocess.Popen[str]":
    script = [sys.executable, str(HERE / "launch_fake.py"), str(out), "1", "0", "slurm", "wait"]
    return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_slurm_job_outlives_its_launcher_and_is_cancelled_with_it(tmp_path: Path, slurm: Path) -> None:
    out = tmp_path / "out"
    (one,) = plan(1, step_seconds=0.0, behaviour="wait")
    first = launcher(out)
    until(lambda: "wait" in events(out, one), seconds=120)
    first.kill()
    first.communicate()
    second = launcher(out)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"start {one.name} on ")
    second.send_signal(signal.SIGINT)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 130, said
    assert said.splitlines()[-1] == "stopped with 0 of 1 trials finished; run the same command again to go on"
    assert fake_slurm.status("1").startswith("CANCELLED")
    assert events(out, one) == [
        "start",
        "step 1",
        "step 2",
        "wait",
        "saved",
    ]  # the second took over the job of the first
    let_go(out, [one])
    third = launcher(out)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0, said
    until(lambda: fake_slurm.status("2") == "COMPLETED")
    assert_sound(out)


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "quickstart", "--data", "nowhere", *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (said.startswith("error: "), said.count("\n")) == (True, 1)
    return said


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_one_sentence(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install 'genrec-lab[{name}]'" in fails(capsys, "--executor", name)


def test_a_cluster_that_does_not_answer_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert f"no Ray cluster answers at {address}" in fails(capsys, "--executor", "ray", "--address", address)


def test_options_that_do_not_go_together_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, named in (
        (["--address", "auto"], "--address goes with --executor ray"),
        (["--executor", "slurm", "--address", "auto"], "--address"),
        (["--gpus", "1"], "--gpus goes with --executor ray or slurm"),
        (["--executor", "ray", "--slurm", "time=1"], "--slurm"),
        (["--workers", "0"], "--workers"),
        (["--executor", "ray", "--cpus", "0"], "--cpus"),
        (["--executor", "ray", "--gpus", "-1"], "--gpus"),
        (["--mesh", "data=2", "--pack", "2"], "--mesh goes with --pack 1"),
        (["--mesh", "rows=2"], "--mesh 'rows=2' is not of the form"),
    ):
        assert named in fails(capsys, *flags), flags


def test_what_slurm_cannot_take_is_one_sentence(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, named in (
        (["--gpus", "0.5"], "--gpus"),
        (["--slurm", "time=1:00:00"], "number of minutes"),
        (["--slurm", "=gpu"], "KEY=VALUE"),
    ):
        assert named in fails(capsys, "--executor", "slurm", *flags), flags


def test_where_there_is_no_slurm_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "sbatch" in fails(capsys, "--executor", "slurm")


def test_a_job_that_sbatch_refuses_is_one_sentence(tmp_path: Path, slurm: Path) -> None:
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="invalid partition"):
        run_study(
            plan(1), tmp_path / "out", executor=make_executor(ExecutorConfig("slurm")), quiet=True, trainer=TRAINER
        )
