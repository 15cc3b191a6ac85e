"""A study in an object store comes to the table that it has in a folder, whatever is killed and whenever."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_trainer import TRAINER, alive, journals, plan, read_table, until

from experiments.cli import main
from experiments.executors.local import LocalExecutor
from experiments.folder import only_launcher
from experiments.launch import run_study
from genrec_jax.train.places import Place, place, write_text
from tests import bucket
from tests.data.helpers import random_dataset

TRIALS = 3
STEP_SECONDS = 0.2


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    bucket.use(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return place("bucket://one/studies/depth")


def start(out: Place) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("launch_fake.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(out), str(TRIALS), str(STEP_SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(out: Place) -> int:
    return sum(event.startswith("step") for lines in journals(out).values() for _, event in lines)


def test_kills(out: Place, tmp_path: Path) -> None:
    """A worker and then the launcher, in the middle of training; the next goes on with what the store has."""
    launcher = start(out)
    until(lambda: steps(out) >= 4, seconds=120)
    pids = {pid for lines in journals(out).values() for pid, _ in lines}
    os.kill(min(pid for pid in pids if alive(pid)), signal.SIGKILL)
    time.sleep(0.2)
    launcher.kill()
    launcher.communicate()
    assert len(list((out / "trials").glob("*/result.json"))) < TRIALS
    launcher = start(out)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, said
    here = tmp_path / "here"
    run_study(plan(TRIALS, step_seconds=STEP_SECONDS), here, executor=LocalExecutor(2), quiet=True, trainer=TRAINER)
    assert read_table(out) == read_table(here)
    turns = [events for lines in journals(out).values() for events in itertools.pairwise(lines)]
    assert any(first == "start" and second != "step 1" for (_, first), (_, second) in turns)
    assert all((folder / "log.txt").is_file() for folder in (out / "trials").glob("*/"))
    assert not list((tmp_path / "tmp").glob("genrec-*/*.at-hand"))


def test_a_second_launcher_is_refused(out: Place) -> None:
    with only_launcher(out):
        second = start(out)
        said, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert said == f"error: another launcher is at work in {out}; let it finish or choose another --out\n"
    assert not list((out / "trials").glob("*/"))


def test_a_page_of_studies_in_a_store_is_that_of_folders(out: Place, tmp_path: Path) -> None:
    for study in ("depth", "width"):
        costs = [1e9, 1e10, 1e11, 1e12, 1e13]
        rows = [f"{study},w,dlrm,{c:g},{0.7 + 2 * c**-0.1:.6f},done,{study}{c:g}\n" for c in costs]
        heading = {"title": study, "summary": f"What of {study}?", "metric": "ne"}
        for studies in (out.parent, tmp_path / "studies"):
            (studies / study).mkdir(parents=True)
            write_text(
                studies / study / "results.csv", "".join(["study,dataset,family,train_flops,ne,status,trial\n", *rows])
            )
            write_text(studies / study / "study.json", json.dumps(heading))
    for studies in (out.parent, tmp_path / "studies"):
        main(["report", str(studies), "--out", str(studies.parent / "page.html")])
    store, here = out.parent.parent, tmp_path
    assert (store / "page.html").read_text() == (here / "page.html").read_text()
    figures = sorted(path.name for path in (here / "page_figures").iterdir())
    assert figures
    assert sorted(path.name for path in (store / "page_figures").glob("*")) == figures


def test_a_trial_in_a_store(out: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = random_dataset(tmp_path / "log", users=20).path
    settings = ["data.history=4", "data.candidates=2", "train.batch_rows=4", "train.steps=3", "model.width=8"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = ["train", "--data", str(data), "--model", "dlrm", *flags, "--quiet", "--out"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(out), "--distributed", "10.0.0.1:8476,0/2"])
    assert "--out with --distributed needs a folder of a file system" in capsys.readouterr().err
    main([*command, str(out)])
    assert json.loads((out / "result.json").read_text())["status"] == "done"
    assert not (out / "lease").exists()
    capsys.readouterr()
    main([*command, str(out)])
    assert "step" not in capsys.readouterr().out  # it has been trained
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(out), "--set", "seed=1"])
    assert f"{out}/config.json belongs to a trial with another configuration" in capsys.readouterr().err


def test_a_study_that_is_not_there_is_one_sentence(out: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(out), "--out", str(out / "page.html")])
    assert capsys.readouterr().err == f"error: {out}: there is no such file or folder\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://bucket/study", "nonsense://bucket/study: no store is known by nonsense://"),
        ("s3://bucket/study", "s3://bucket/study needs more packages: install with pip install 'genrec-lab[s3]'"),
        ("gs://bucket/study", "gs://bucket/study needs more packages: install with pip install 'genrec-lab[gcs]'"),
    ],
)
@pytest.mark.parametrize(
    "command", ["sweep quickstart --data nowhere", "train --model hstu --data nowhere", "report runs"]
)
def test_a_location_that_cannot_be_used_is_one_sentence(
    url: str,
    said: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--out", url])
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not list(tmp_path.iterdir())
