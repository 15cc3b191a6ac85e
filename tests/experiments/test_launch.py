import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import TRAINER, plan, read_journal

from experiments.executors import ExecutorConfig, Training
from experiments.executors.local import LocalExecutor
from experiments.folder import trial_folder
from experiments.launch import ATTEMPTS, Summary, run_study
from experiments.study import PlannedTrial
from genrec_jax.errors import UserError


def launch(planned: list[PlannedTrial], out: Path, workers: int = 1, pack: int = 1) -> Summary:
    return run_study(planned, out, executor=LocalExecutor(workers), quiet=True, how=Training(pack), trainer=TRAINER)


def seeds(count: int, **settings: Any) -> list[PlannedTrial]:
    """Trials that differ in their seeds alone."""
    (one,) = plan(1, **settings)
    changed = [dataclasses.replace(one.trial, seed=seed) for seed in range(count)]
    return [dataclasses.replace(one, trial=trial) for trial in changed]


def folder(out: Path, one: PlannedTrial) -> Path:
    return trial_folder(out, one.trial.hash)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_runs_every_trial_and_records_the_launch(tmp_path: Path) -> None:
    planned = plan(3)
    summary = launch(planned, tmp_path, workers=2)
    assert (summary.total, summary.earlier, summary.done, summary.failed) == (3, 0, 3, ())
    for one in planned:
        assert read(folder(tmp_path, one) / "config.json") == one.trial.to_json()
    record = read(tmp_path / "launch.json")
    results = [read(folder(tmp_path, one) / "result.json") for one in planned]
    assert record["complete"] is True
    assert record["workers"] == 2
    assert record["train_seconds"] == pytest.approx(sum(result["train_seconds"] for result in results))
    assert record["wall_seconds"] > 0
    assert record["attempts"] == {one.trial.hash: 1 for one in planned}


def test_workers_share_the_cores(tmp_path: Path) -> None:
    planned = plan(2)
    launch(planned, tmp_path, workers=2)
    cores = len(os.sched_getaffinity(0))
    used = [read(folder(tmp_path, one) / "result.json")["cpus"] for one in planned]
    assert used == ([1, 1] if cores <= 2 else used)
    assert max(used) <= (cores + 1) // 2


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    planned = plan(2)
    launch(planned[:1], tmp_path)
    table = launch(planned, tmp_path).table
    before = read_journal(folder(tmp_path, planned[0]))
    summary = launch(planned, tmp_path)
    assert (summary.earlier, summary.done) == (2, 2)
    assert read_journal(folder(tmp_path, planned[0])) == before
    assert len(table.read_text().splitlines()) == 3


def test_a_broken_result_is_no_result(tmp_path: Path) -> None:
    (one,) = plan(1)
    launch([one], tmp_path)
    (folder(tmp_path, one) / "result.json").write_text('{"status": "do')
    summary = launch([one], tmp_path)
    assert (summary.earlier, summary.done) == (0, 1)


def test_one_trial_with_two_places_runs_once_and_has_two_rows(tmp_path: Path) -> None:
    (one,) = plan(1)
    summary = launch([one, dataclasses.replace(one, family="other")], tmp_path)
    assert (summary.total, summary.done) == (1, 1)
    assert [event for _, event in read_journal(folder(tmp_path, one))].count("start") == 1
    assert len(summary.table.read_text().splitlines()) == 3


def test_longest_trial_starts_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [dataclasses.replace(one, cost=float(k)) for k, one in enumerate(plan(3))]
    launch(planned, tmp_path)
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start")]
    assert started == [f"start {one.name}" for one in reversed(planned)]


def test_a_first_seed_of_all_goes_before_the_second_of_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a program is compiled once and not by two workers at a time."""
    planned = [
        dataclasses.replace(one, cost=float(cost), trial=dataclasses.replace(one.trial, seed=seed))
        for cost, one in enumerate(plan(2))
        for seed in (0, 1)
    ]
    launch(planned, tmp_path)
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start")]
    small, other_small, large, other_large = [f"start {one.name}" for one in planned]
    assert started == [large, small, other_large, other_small]


def test_a_killed_worker_is_resumed(tmp_path: Path) -> None:
    (one,) = plan(1, behaviour="die once")
    summary = launch([one], tmp_path)
    assert summary.done == 1
    events = [event for _, event in read_journal(folder(tmp_path, one))]
    # Step 3 died before its checkpoint; steps 1 and 2 are not trained again.
    assert events == ["start", "step 1", "step 2", "step 3", "start", "step 3", "step 4", "finish"]
    assert read(tmp_path / "launch.json")["attempts"] == {one.trial.hash: 2}


def test_a_trial_that_always_crashes_is_recorded_and_tried_again_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = plan(1, behaviour="raise")[0], plan(2)[1]
    for _ in range(2):
        summary = launch([bad, good], tmp_path)
        assert (summary.done, summary.failed) == (1, (bad.name,))
        failure = read(folder(tmp_path, bad) / "failure.json")
        assert (failure["kind"], failure["attempts"]) == ("failed", ATTEMPTS)
        assert "the loss is" in failure["message"]
        assert not (folder(tmp_path, bad) / "result.json").exists()
        assert read(tmp_path / "launch.json")["attempts"][bad.trial.hash] == ATTEMPTS
    out = capsys.readouterr().out
    assert f"failed {bad.name} (ValueError: the loss is" in out
    assert "Traceback" in (folder(tmp_path, bad) / "log.txt").read_text()
    assert ",failed," in summary.table.read_text()


def test_a_user_error_is_told_in_one_sentence_and_not_retried(tmp_path: Path) -> None:
    bad, good = plan(1, behaviour="refuse")[0], plan(2)[1]
    with pytest.raises(UserError, match=r"^even width=8 seed=0: data/world: no such dataset$"):
        launch([bad, good], tmp_path)
    assert read(tmp_path / "launch.json")["attempts"] == {bad.trial.hash: 1, good.trial.hash: 1}
    assert read(folder(tmp_path, good) / "result.json")["status"] == "done"
    assert read(folder(tmp_path, bad) / "failure.json")["kind"] == "refused"


def test_a_diverged_trial_is_finished(tmp_path: Path) -> None:
    planned = plan(1, behaviour="diverge")
    assert launch(planned, tmp_path).diverged == 1
    assert launch(planned, tmp_path).earlier == 1


def test_quiet_output_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(plan(1) + plan(1, behaviour="raise"), tmp_path)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "start",
        "done",
        "start",
        "retry",
        "start",
        "retry",
        "start",
        "failed",
    ]
    assert "[1/2" in lines[1]


def test_trials_that_differ_in_seeds_are_packed(tmp_path: Path) -> None:
    planned = [*seeds(5), *plan(3)[1:]]
    summary = launch(planned, tmp_path, pack=3, workers=2)
    assert (summary.done, summary.failed) == (7, ())
    first = [read_journal(folder(tmp_path, one))[0] for one in planned]
    assert [event for _, event in first] == ["pack 3"] * 3 + ["pack 2"] * 2 + ["start"] * 2
    assert len({pid for pid, _ in first}) == 4
    assert read(tmp_path / "launch.json")["attempts"] == {one.trial.hash: 1 for one in planned}


def test_a_pack_that_fails_is_tried_again_trial_by_trial(tmp_path: Path) -> None:
    """The first trial of the pack dies once; the second, not yet begun, must not be taken down again by it."""
    planned = seeds(2, behaviour="die once")
    summary = launch(planned, tmp_path, pack=2)
    assert summary.done == 2
    events = [[event for _, event in read_journal(folder(tmp_path, one))] for one in planned]
    assert events[0] == ["pack 2", "start", "step 1", "step 2", "step 3", "start", "step 3", "step 4", "finish"]
    assert events[1][:2] == ["pack 2", "start"]
    assert events[1].count("finish") == 1
    assert read(tmp_path / "launch.json")["attempts"] == {planned[0].trial.hash: 2, planned[1].trial.hash: 3}


def test_each_trial_of_a_refused_pack_has_its_own_refusal(tmp_path: Path) -> None:
    planned = seeds(2, behaviour="refuse")
    with pytest.raises(UserError, match=r"data/world: no such dataset \(and 1 more trials refused\)$"):
        launch(planned, tmp_path, pack=2)
    for one in planned:
        failure = read(folder(tmp_path, one) / "failure.json")
        assert (failure["kind"], failure["attempts"], failure["log"]) == ("refused", 2, "log.txt")


def test_no_trials_and_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trials"):
        launch([], tmp_path)
    with pytest.raises(UserError, match="--workers"):
        ExecutorConfig(workers=0)
    with pytest.raises(UserError, match="--pack"):
        launch(plan(1), tmp_path, pack=0)
