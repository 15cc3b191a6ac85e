"""The GPU benchmark where there is no GPU: its tiny run, its accounts, its checks, and how it survives failing jobs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_report
from benchmarks.gpu_attention import make_tokens
from benchmarks.gpu_cases import (
    BIASED,
    CHECKS,
    FIRST_SHAPES,
    MAIN,
    PLAIN_BACKENDS,
    QUICK_CHECKS,
    QUICK_RECIPE,
    RECIPE,
    SHORT,
    TARGETS,
    Check,
    Job,
    Shape,
    later_shapes,
    published,
    queue,
)
from benchmarks.gpu_checks import run_check
from benchmarks.gpu_timing import Effort, measure
from benchmarks.gpu_worker import Worker
from kernels_pallas.hstu_attention import BACKENDS, reference, visible
from tests.data.helpers import random_dataset

ROOT = pathlib.Path(__file__).resolve().parents[2]
H200 = gpu_report.machine_of({"device": "NVIDIA H200", "platform": "gpu", "matmul_tflops": 790.0, "copy_tb_s": 4.3})


def test_quick_run_as_a_command(tmp_path):
    """A run of under a minute on a machine without a GPU: every job leaves a record, none fails, and it says so."""
    out, minutes = tmp_path / "gpu.json", 0.9
    # What the GPU machine lacks must not be needed.
    for name in ("grain", "tyro", "polars"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--minutes", str(minutes), "--out", out]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["seconds"] < 60 * minutes
    statuses = {}
    for record in found["records"]:
        name = " ".join(record[k] for k in ("section", "case", "implementation", "direction", "dtype")).split()
        statuses[" ".join(name)] = record["status"]
    usable = [name for name in BACKENDS if statuses[f"probe can it run here {name}"] == "ok"]
    assert set(PLAIN_BACKENDS) <= set(usable)
    assert sorted(list(statuses)[1 + len(BACKENDS) :]) == sorted(job.title for job in queue(usable, True, None))
    assert set(statuses.values()) <= {"ok", "unsupported", "out of time"}  # the last on a busy machine
    done_cudnn = [r for r in found["records"] if r["implementation"] == "cudnn" and r["status"] != "out of time"]
    assert all("not available" in r["note"] for r in done_cudnn)
    assert len(found["targets"]) == len(TARGETS) + 1
    assert all(t["met"] is None for t in found["targets"])
    assert done.stdout.count("not measured") == len(TARGETS) + 1


def test_refuses_a_full_run_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--only", "train", "--out", str(tmp_path / "x.json"), "--minutes", "1"]) == 2
    assert "--quick" in capsys.readouterr().err


def test_a_recipe_is_trained_from_end_to_end(tmp_path):
    """Two epochs of the quick recipe on a log of another size, which the target is not judged by."""
    data, out = tmp_path / "data", tmp_path / "x.json"
    random_dataset(data, users=200)
    assert gpu.main(["--quick", "--only", "recipe", "--data", str(data), "--out", str(out), "--minutes", "4"]) == 0
    found = json.loads(out.read_text())
    (record,) = [r for r in found["records"] if r["section"] == "recipe"]
    assert (record["status"], record["case"], record["trial_status"], record["epochs"]) == (
        "ok",
        QUICK_RECIPE,
        "done",
        2,
    )
    assert record["trial_steps"] == 4  # of 128 users
    assert 0 < record["seconds"] == record["trial_wall_seconds"] - record["trial_compile_seconds"]
    assert f"HR@10 {record['hr@10']:.4f}" in record["note"]
    assert found["targets"][-1]["met"] is None


@pytest.mark.parametrize("data", [[], ["--data", "nowhere"]])
def test_a_recipe_without_data_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "recipe", *data, "--out", str(tmp_path / "x.json")])
    assert ("nowhere is not a dataset folder" if data else "--only recipe needs --data") in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_recipe_is_judged_on_the_published_data_alone():
    record = {"section": "recipe", "case": RECIPE, "direction": "", "status": "ok", "passed": True, "seconds": 90.5}
    whole = record | {"users": 6040, "items": 3883, "epochs": 101.0}
    for changed, verdict in (
        ({}, (90.5, False)),
        ({"seconds": 89.5}, (89.5, True)),
        ({"epochs": 2.0}, (None, None)),
        ({"users": 200}, (None, None)),
        ({"passed": False}, (None, None)),
    ):
        last = gpu_report.summary([whole | changed])[-1]
        assert (last["measured"], last["met"]) == verdict


def test_an_exhausted_budget_starts_nothing(tmp_path):
    out = tmp_path / "deep" / "x.json"
    assert gpu.main(["--quick", "--minutes", "0", "--out", str(out)]) == 0
    records = json.loads(out.read_text())["records"]
    assert records
    assert {r["status"] for r in records} == {"out of time"}


def test_worker_outlives_failing_hanging_and_dying_jobs():
    worker = Worker()
    good = Job("probe", "probe", "reference")
    try:
        assert worker.run(Job("probe", "probe", "no such backend"), 60)["note"].startswith("ValueError: unknown impl")
        first = worker._process.pid
        assert worker.run(good, 60)["status"] == "ok"
        assert worker._process.pid == first  # an ordinary failure costs no restart
        assert worker.run(good, 0.0)["status"] == "stopped"
        assert worker.run(good, 60)["status"] == "ok"
        assert worker._process.pid != first
        worker._process.kill()
        worker._process.join()
        assert "died" in worker.run(good, 60)["note"]
        assert worker.run(good, 60)["status"] == "ok"
    finally:
        worker.close()


def test_flops_agree_with_published_times():
    """NVIDIA's absolute times at batch 32, H = 4, T = 4096 give NVIDIA's rates."""
    for shape, direction, ms in (
        (MAIN[0], "forward", 1.04),
        (MAIN[0], "backward", 3.12),
        (MAIN[1], "forward", 0.66),
        (MAIN[1], "backward", 1.79),
    ):
        rate = shape.flops(direction) / (1e-3 * ms) / 1e12
        assert rate == pytest.approx(getattr(published(shape), direction), rel=0.01)
    assert published(SHORT).forward == 86
    assert published(Shape(128, 4096, 4, 16)).forward == 595
    assert published(BIASED) is None


def test_flops_and_bytes_by_hand():
    shape = Shape(64, 100, 5, 3, layout="padded")
    lengths = [int(n) for n in shape.lengths]
    assert min(lengths) >= 64
    assert max(lengths) <= 100
    assert len(set(lengths)) > 1
    assert shape.flops("forward") == sum(4 * 3 * 64 * n * n / 2 for n in lengths)
    assert shape.flops("backward") == 2.5 * shape.flops("forward")
    assert shape.bytes("forward") == 8 * 3 * 64 * sum(lengths)
    assert dataclasses.replace(shape, layout="packed").rows == (1, sum(lengths))


@pytest.mark.parametrize("layout", ["uniform", "padded", "packed"])
def test_tokens_hold_the_pairs_that_are_counted(layout):
    shape = Shape(64, 96, 3, layout=layout)
    tokens = make_tokens(shape)
    assert tokens.segment.shape == shape.rows
    assert int(visible(tokens).sum()) == sum(n * (n + 1) // 2 for n in shape.lengths)
    assert int(tokens.key_time.min()) >= 0


def test_roof_and_bound():
    """The intensity is T / 4 FLOP per byte forward: 64 at T = 256, times 4.3 TB/s."""
    assert gpu_report.roof(SHORT, "forward", H200) == (pytest.approx(64 * 4.3), "bytes")
    assert gpu_report.roof(MAIN[0], "forward", H200) == (790.0, "tensor cores")
    assert gpu_report.roof(MAIN[1], "forward", H200) == (790.0, "tensor cores + special functions")


def test_order_of_the_queue():
    jobs = queue(["reference", "xla", "kernel"], False, None)
    assert len(jobs) == len(set(jobs))
    assert all((j.section, j.implementation) == ("tests", "kernel") for j in jobs[: 2 * len(CHECKS)])
    timed = [j for j in jobs if j.section == "attention" and j.implementation == "kernel"]
    assert [j.shape for j in timed if j.direction == "forward"] == [*FIRST_SHAPES, *later_shapes()]
    assert [j.shape for j in timed if j.direction == "backward"] == [*FIRST_SHAPES, *later_shapes()]
    assert {j.section for j in queue(["xla"], False, "train")} == {"train"}
    with_data = queue(["reference", "xla", "kernel"], False, None, "folder")
    assert [j for j in with_data if j.section != "recipe"] == jobs
    recipe = Job("recipe", RECIPE, data="folder")
    assert with_data[with_data.index(recipe) - 1] == Job("train", "middle")
    without_kernels = queue(["xla"], False, "attention")
    assert without_kernels[0].implementation == "xla"


def timed(shape, direction, tflops, name="kernel", **other):
    ms = shape.flops(direction) / tflops / 1e9
    record = {"status": "ok", "batch": shape.batch, "ms_p10": ms, "ms_median": ms, "tflops": tflops, "note": ""}
    record |= {"program_us": 1000.0, "dispatch_us": 50.0}
    job = Job("attention", shape.name, name, direction, "bfloat16", shape)
    return gpu_report.complete(job, record | other, H200)


def test_targets_are_judged_by_our_own_fastest_at_the_full_batch():
    records = [
        timed(MAIN[0], "forward", 540.0),
        timed(MAIN[0], "forward", 300.0, "xla"),
        timed(MAIN[0], "forward", 600.0, "cudnn"),
        timed(MAIN[0], "backward", 439.0),
        timed(MAIN[0], "backward", 700.0, "reference", batch=4),
        timed(BIASED, "forward", 540.0 / 1.25),
        timed(BIASED, "backward", 439.0 / 1.5),
        timed(SHORT, "forward", 172.0, status="failed"),
    ]
    verdicts = {(t["case"], t["direction"]): (t["measured"], t["met"]) for t in gpu_report.summary(records)}
    assert verdicts[MAIN[0].name, "forward"] == (540.0, True)
    assert verdicts[MAIN[0].name, "backward"] == (439.0, False)
    assert verdicts[BIASED.name, "forward"] == (pytest.approx(1.25), True)
    assert verdicts[BIASED.name, "backward"] == (pytest.approx(1.5), False)
    assert verdicts[SHORT.name, "forward"] == (None, None)


def test_a_completed_record():
    record = timed(MAIN[0], "forward", 561.0)
    assert record["over_published"] == pytest.approx(561 / 528)
    assert record["of_roof"] == pytest.approx(561 / 790)
    assert "561" in gpu_report.line(record)
    assert "ABOVE THE ROOF" in timed(MAIN[0], "forward", 900.0)["note"]
    assert "dispatch" in timed(MAIN[0], "forward", 500.0, dispatch_us=900.0)["note"]
    step = gpu_report.complete(Job("train", "large"), {"status": "ok", "tflops": 395.0, "note": ""}, H200)
    assert (step["mfu_measured"], step["mfu_nominal"]) == (0.5, pytest.approx(395 / 989))


def test_the_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    gpu_report.write(path, {"a": float("nan")}, [])
    gpu_report.write(path, {"a": 1}, [{"section": "tests", "case": "", "direction": "", "status": "ok", "x": np.nan}])
    assert json.loads(path.read_text())["records"][0]["x"] is None
    assert list(tmp_path.iterdir()) == [path]


def test_measure_counts_one_program(monkeypatch):
    """With a clock that each run advances by a known step."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.gpu_timing.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def run():
        now[0] += 0.002
        return jnp.zeros(())

    times = measure(run, Effort(samples=50, sample_seconds=0.01, limit=10.0))
    assert (times.samples, times.runs) == (50, 5)
    assert times.p10 == pytest.approx(0.002)
    assert times.median == pytest.approx(0.002)
    assert measure(run, Effort(samples=50, sample_seconds=0.01, limit=0.1)).samples < 50


@pytest.fixture
def broken(monkeypatch):
    """Installs a backend that spoils the reference's output."""

    def install(spoil):
        module = types.ModuleType("broken")
        module.prepare = reference.prepare
        module.hstu = lambda *arguments, **options: spoil(reference.hstu(*arguments, **options), arguments[3].tokens)
        monkeypatch.setitem(sys.modules, "broken", module)
        monkeypatch.setitem(BACKENDS, "broken", "broken")
        return Job("tests", "x", "broken", dtype="float32", check=Check((0, 1, 17, 40), (0, 0, 3, 0)))

    return install


def test_a_check_finds_a_wrong_scale(broken):
    record = run_check(broken(lambda out, tokens: 1.0001 * out))
    assert not record["passed"]
    assert "out: error" in record["note"]


def test_a_check_finds_dirty_padding(broken):
    record = run_check(broken(lambda out, tokens: jnp.where(tokens.segment[..., None, None] > 0, out, 1e-30)))
    assert not record["passed"]
    assert record["note"] == "out: padding is not zero"


def test_a_check_finds_nan(broken):
    assert not run_check(broken(lambda out, tokens: out.at[0, 3].set(jnp.nan)))["passed"]


def test_a_check_finds_bits_that_change(broken):
    draws = iter(range(1000))

    def tremble(out, tokens):
        noise = jax.pure_callback(lambda: np.float32(next(draws) % 2), jax.ShapeDtypeStruct((), jnp.float32))
        return out * (1 + jax.lax.stop_gradient(noise) * 2.0**-23)

    record = run_check(broken(tremble))
    assert not record["passed"]
    assert "out: differs from run to run" in record["note"]


def test_a_check_passes_the_reference():
    (check,) = QUICK_CHECKS.values()
    record = run_check(Job("tests", "x", "reference", dtype="bfloat16", check=check))
    assert record["passed"]
    assert set(record["errors_over_allowed"]) == {"out", "dq", "dk", "dv", "dposition", "dtime"}
    assert all(0 < ratio <= 1 for ratio in record["errors_over_allowed"].values())
