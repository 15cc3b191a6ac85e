"""What a person reads: the dry run, the lines, the live table."""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_trainer import FakeConfig, plan
from rich.console import Console

from experiments import progress
from experiments.dry_run import print_plan, with_cost
from experiments.folder import trial_folder
from experiments.progress import Lines, LiveTable, duration
from experiments.slots import make_slots
from genrec_jax.config import Trial


@dataclass(frozen=True)
class Estimate:
    flops: float
    memory_bytes: float
    seconds: float


def estimate(trial: Trial) -> Estimate:
    assert isinstance(trial.model, FakeConfig)
    return Estimate(trial.model.width * 1e12, trial.model.width * 2.0**20, trial.model.width * 10.0)


def test_dry_run_prints_every_trial_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(3)
    print_plan([*planned, dataclasses.replace(planned[0], family="again")], estimate, workers=2)
    *lines, times = capsys.readouterr().out.splitlines()
    assert times == "times: fake at an assumed share of this machine's matmul rate"
    assert lines[1].split()[:4] == [planned[0].trial.hash, "even", "width=8", "seed=0"]
    assert lines[1].split()[4:] == ["8.00e+12", "8", "MB", "1", "min", "20", "s"]
    assert len(lines) == 6
    # 8 + 9 + 10 of everything; two at a time: 10 beside 9, then 8 after 9.
    assert lines[-1].split()[:5] == ["total", "3", "trials,", "2", "at"]
    assert lines[-1].split()[7:] == ["2.70e+13", "19", "MB", "2", "min", "50", "s"]
    assert len({len(line) for line in lines}) == 1


def test_dry_run_takes_its_times_from_finished_trials_of_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(4)
    for one, status, seconds in zip(planned, ("done", "diverged", "failed", "done"), (2.0, 4.0, 1e9, 1.0)):
        folder = trial_folder(tmp_path, one.trial.hash)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(one.trial.to_json()))
        result = {"status": status, "train_seconds": seconds, "train_flops": 1e12}
        (folder / "result.json").write_text(json.dumps(result))
    print_plan(planned, estimate, workers=1, out=tmp_path)
    *lines, total, times = capsys.readouterr().out.splitlines()
    # The median of 0.5, 0.25 and 1 TFLOP/s; the failed trial has no say.
    assert [line.split()[-2:] for line in lines[1:3]] == [["16.0", "s"], ["18.0", "s"]]
    assert total.split()[-4:] == ["1", "min", "16", "s"]
    assert times == "times: fake at the median rate of the study's finished trials"
    print_plan(planned, estimate, workers=1, out=tmp_path / "nothing yet")
    assert capsys.readouterr().out.endswith("assumed share of this machine's matmul rate\n")


def test_cost_is_the_flops() -> None:
    assert [one.cost for one in with_cost(plan(2), lambda trial: estimate(trial).flops)] == [8e12, 9e12]


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.46, "9.5 s"), (247, "4 min 07 s"), (3600, "1 h 00 min"), (7500.9, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_weighs_trials_by_cost(clock: list[float]) -> None:
    lines = Lines(total=4, earlier=1, weight=10.0, every=None)
    assert lines.seconds_left() is None
    lines.started("a", "a", 1.0)
    lines.started("b", "b", 4.0)
    clock[0] = 10.0
    lines.ended("a", "done", "")
    assert lines.seconds_left() == pytest.approx(90.0)
    lines.progress("b", {"step": 50, "steps": 100, "loss": 0.5, "examples_per_second": 1.0})
    assert lines.seconds_left() == pytest.approx(10 * 7 / 3)


def test_time_left_of_a_resumed_trial_counts_only_what_it_trained(clock: list[float]) -> None:
    lines = Lines(total=1, earlier=0, weight=1.0, every=None)
    lines.started("a", "a", 1.0)
    record = {"steps": 100, "loss": 0.5, "examples_per_second": 1.0}
    lines.progress("a", {"step": 80, **record})
    clock[0] = 5.0
    lines.progress("a", {"step": 90, **record})
    assert lines.running["a"].seconds_left(5.0) == pytest.approx(5.0)


def test_lines_report_progress_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(total=1, earlier=0, weight=1.0, every=30.0)
    lines.started("a", "hstu", 1.0)
    lines.tick()
    clock[0] = 31.0
    lines.progress("a", {"step": 1, "steps": 3, "loss": 0.5, "examples_per_second": 99.6})
    clock[0] = 32.0
    lines.progress("a", {"step": 2, "steps": 3, "loss": 0.4, "examples_per_second": 99.6})
    lines.tick()
    lines.tick()
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["start hstu", "      hstu: step 2/3, loss 0.4000, 100 examples/s, 1.0 s left"]


def test_live_table_shows_the_trials_at_work() -> None:
    screen = io.StringIO()
    live = LiveTable(total=2, earlier=1, weight=1.0, console=Console(file=screen, force_terminal=True, width=120))
    live.started("a", "hstu [x] depth=2", 1.0)
    live.progress("a", {"step": 2, "steps": 4, "loss": 0.25, "examples_per_second": 1234.0})
    live.tick()
    live.close()
    for text in ("hstu [x] depth=2", "step 2/4", "loss 0.2500", "1234 examples/s", "1/2 trials"):
        assert text in screen.getvalue()


def test_slots_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.cpus for slot in make_slots(2)] == [(0, 2, 4), (1, 3)]
    assert make_slots(1)[0].cpus == ()
    assert [slot.cpus for slot in make_slots(7)][4:] == [(4,), (0,), (1,)]
    assert make_slots(2)[0].environment == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [dict(slot.environment) for slot in make_slots(2)] == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    assert make_slots(3)[2].environment == {"CUDA_VISIBLE_DEVICES": "5", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
