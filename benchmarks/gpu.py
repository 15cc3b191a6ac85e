"""Checks and times attention, training steps and a recipe on a GPU: ``python3 benchmarks/gpu.py --out gpu.json``.

One process orders the jobs, keeps the time and writes the JSON file after each; others, replaced when they are lost,
run them. docs/benchmarks/gpu.md says how to read the result.
"""

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import gpu_cases, gpu_report
from benchmarks.gpu_cases import Job
from benchmarks.gpu_worker import Worker

_RESERVE = 5.0  # seconds kept for the report
_LEAST = 3.0  # no job is started with less time left
_TESTERS = 8  # processes that run tests at once: most of a test is compilation, and nothing is timed


class Run:
    """The records so far, and the clock."""

    def __init__(self, out: pathlib.Path, minutes: float, header: dict[str, Any]):
        self.out, self.header = out, header
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes - _RESERVE
        self.worker = Worker()
        self.records: list[dict[str, Any]] = []
        self.machine: gpu_report.Machine | None = None
        self.lock = threading.Lock()

    def do(self, job: Job, worker: Worker | None = None) -> dict[str, Any]:
        """Runs a job, or notes that there is no time for it; writes the file either way."""
        left = self.end - time.monotonic()
        if left < _LEAST:
            record = {"status": "out of time", "note": "not started"}
        else:
            record = (worker or self.worker).run(job, min(job.seconds, left))
            if record["status"] == "stopped" and left < job.seconds:
                record |= {"status": "out of time", "note": f"stopped after {left:.0f} s"}
        record = gpu_report.complete(job, record, self.machine)
        with self.lock:
            self.records.append(record)
            self.write()
            if record["status"] != "out of time":
                seconds = time.monotonic() - self.start
                print(f"[{seconds:4.0f} s] {job.section:<9} {gpu_report.line(record)}", flush=True)
        return record

    def do_all(self, jobs: Iterable[Job]) -> None:
        """Runs jobs in order, tests that follow one another several at a time."""
        for section, group in itertools.groupby(jobs, lambda job: job.section):
            if section == "tests":
                self._do_at_once(list(group))
            else:
                for job in group:
                    self.do(job)

    def _do_at_once(self, jobs: list[Job]) -> None:
        count = min(_TESTERS, max(1, (os.cpu_count() or 1) // 2), len(jobs))
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        workers = [Worker() for _ in range(count)]
        for worker in workers:
            idle.put(worker)

        def test(job: Job) -> None:
            worker = idle.get()
            try:
                self.do(job, worker)
            finally:
                idle.put(worker)

        try:
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                list(pool.map(test, jobs))
        finally:
            for worker in workers:
                worker.close()

    def write(self) -> None:
        gpu_report.write(self.out, self.header | {"seconds": round(time.monotonic() - self.start, 1)}, self.records)


def main(arguments: list[str] | None = None) -> int:
    """0 when every job that was started passed or was refused with a reason; 1 when one failed; 2 without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.data and not (options.data / "dataset.json").is_file():
        parser.error(f"{options.data} is not a dataset folder, as `genrec data import` writes it")
    if options.only == "recipe" and not options.data:
        parser.error("--only recipe needs --data")
    # Several processes share the device; each takes the memory it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    header = {"driver": _driver(), "quick": options.quick, "minutes": options.minutes, "only": options.only}
    run = Run(options.out, options.minutes, header)
    try:
        code = _run_all(run, options)
    finally:
        run.worker.close()
    print(gpu_report.text(run.header, run.records))
    print(f"\n{time.monotonic() - run.start:.0f} s; {options.out}")
    return code


def _run_all(run: Run, options: argparse.Namespace) -> int:
    ceilings = run.do(Job("ceilings", "matmul, copy", quick=options.quick))
    if ceilings["status"] == "ok":
        run.machine = gpu_report.machine_of(ceilings)
        run.header["machine"] = (
            f"{ceilings['device']}, jax {ceilings['jax']}: matmul {ceilings['matmul_tflops']:.4g} TFLOP/s, copy "
            f"{ceilings['copy_tb_s']:.3g} TB/s, dispatch {ceilings['dispatch_us']:.0f} us"
        )
    elif ceilings["status"] == "unsupported":
        print(ceilings["note"], file=sys.stderr)
        return 2
    from kernels_pallas.hstu_attention.api import BACKENDS

    probes = [run.do(Job("probe", "can it run here", name)) for name in BACKENDS]
    usable = [probe["implementation"] for probe in probes if probe["status"] == "ok"]
    run.do_all(gpu_cases.queue(usable, options.quick, options.only, str(options.data or "")))
    failed = [r for r in run.records if r["status"] in ("failed", "stopped") or not r.get("passed", True)]
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Checks and times the attention kernels and a training step on a GPU.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"), help="written after every case")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget of the whole run (default: 9)")
    parser.add_argument("--only", choices=("tests", "attention", "train", "recipe"), help="one part alone")
    parser.add_argument("--data", type=pathlib.Path, help="imported MovieLens-1M: trains the HSTU-large recipe, too")
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, on any machine")
    return parser


def _driver() -> str:
    """Name and driver of the first GPU as the vendor's tool gives them; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
