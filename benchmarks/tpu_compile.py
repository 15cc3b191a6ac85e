"""Compiles the attention kernels for TPUs and GPUs that are not there, and fails when a kernel got worse.

`make compile-check`, or ``python -m benchmarks.tpu_compile [--only WORD ...]``. The TPU kernels go through the real
compiler (libtpu) for v5e, v5p, v6e and 7x; the GPU kernels are lowered for Hopper. Exit status 1: a case does not
compile, or the schedule of a full tile is longer than its ceiling.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.compile_cases import GPU, TARGETS, TOPOLOGIES, VMEM, Case, Result, grid
from benchmarks.llo import DUMP_FLAGS, Branch, Kernel

ROOT = Path(__file__).resolve().parent.parent
# The compiler lives in a folder of its own: jax would look for a TPU at every start if it could import it.
LIBTPU = Path(sys.prefix) / "libtpu"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}
PROCESSES = 2
JOB_CASES = 15  # of one process, so that both processes end together
CASE_SECONDS = 900.0

TILE = 512
# Multiply-adds of one core per cycle, and the side of the square of weights that a matrix unit holds.
MACS = {"v5e": 2**16, "v5p": 2**16, "v6e": 2**18, "7x": 2**18}
MXU_SIDE = {"v5e": 128, "v5p": 128, "v6e": 256, "7x": 256}
MATMUL_ROWS = 16  # of bfloat16 in one matrix unit instruction

# The branches (`pl.when`) of the kernels, in the order of their programs; those in brackets exist with bias alone.
BRANCHES = {
    "hstu_forward": "first [few] full fill [irregular] masked dirty last",
    "hstu_backward": (
        "first opens [tables] [few] full fill [irregular] masked dirty [few-times] [times] [diagonals]"
        " [irregular-diagonals] last closes"
    ),
}
ATTENDS = ("few", "full", "masked", "dirty", "irregular-diagonals")  # those that multiply matrices
# What a step in the middle of a row of tiles runs, for each kind of tile: one with all pairs visible and few time
# buckets (it lies far from the diagonal), one with all pairs visible, one that the mask crosses.
STEPS = {
    "few": ("few", "few-times", "diagonals"),
    "full": ("full", "times", "diagonals"),
    "edge": ("fill", "masked", "times", "diagonals"),
}

# Bundles of such a step for 512 x 512 pairs and one head at T=2048 H=4, measured and 3 % on top:
# (target, D): forward (full; few, full with bias), backward (full; few, full with bias).
GATE_LENGTH, GATE_HEADS = 2048, 4
CEILINGS: dict[tuple[str, int], tuple[int, int, int, int, int, int]] = {
    ("v5e", 64): (1035, 1200, 1668, 2825, 3261, 3747),
    ("v5e", 128): (1040, 1179, 1612, 2753, 3345, 3724),
    ("v5e", 256): (1938, 2144, 2466, 4990, 5635, 5740),
    ("v5p", 64): (1076, 1267, 1690, 2851, 3374, 3851),
    ("v5p", 128): (1078, 1211, 1660, 2737, 3510, 3857),
    ("v5p", 256): (1990, 2054, 2559, 5085, 5775, 5739),
    ("v6e", 64): (648, 911, 1373, 1791, 2409, 2813),
    ("v6e", 128): (615, 888, 1306, 1700, 2388, 2760),
    ("v6e", 256): (650, 920, 1328, 1774, 2440, 2793),
    ("7x", 64): (710, 932, 1371, 1642, 2254, 2802),
    ("7x", 128): (667, 970, 1396, 1778, 2312, 2701),
    ("7x", 256): (726, 940, 1266, 1531, 2075, 2547),
}
# What the forward kernel has to reach at D=128: (plain, bias).
TARGET_BUNDLES = {"v5e": (1100, 1250), "v6e": (720, 1030)}


class Cost(NamedTuple):
    """The grid step of a 512 x 512 tile, per head; loops of unknown length in it count as run once."""

    bundles: float
    cycles: float
    loops: int


def products(case: Case) -> int:
    """Matrix products of a tile."""
    return 5 if case.backward else 2


def ideal_cycles(case: Case, dim: int | None = None) -> float:
    """Cycles of a 512 x 512 tile and head of ``dim`` (the case's own) with every cell of every matrix unit at work."""
    return products(case) * TILE * TILE * (dim or case.dim) / MACS[case.target]


def padded(case: Case) -> int:
    """The head dimension that the matrix units work through: their squares are filled up."""
    side = MXU_SIDE[case.target]
    return -(-case.dim // side) * side


def matmuls(case: Case) -> int:
    """Matrix unit instructions of a 512 x 512 tile and head."""
    side = MXU_SIDE[case.target]
    return products(case) * (TILE // MATMUL_ROWS) * (TILE // side) * (padded(case) // side)


def named_branches(case: Case, kernel: Kernel) -> dict[str, Branch] | None:
    """A kernel's branches by name; None if they are not those of `BRANCHES`."""
    for name, text in BRANCHES.items():
        if name in kernel.name:
            words = [word.strip("[]") for word in text.split() if case.bias or not word.startswith("[")]
            branches = dict(zip(words, kernel.branches))
            attends = all(bool(branch.matmuls) == (word in ATTENDS) for word, branch in branches.items())
            return branches if attends and len(words) == len(kernel.branches) else None
    return None


def tile_costs(case: Case, kernels: Sequence[Kernel]) -> dict[str, Cost]:
    """Cost of each kind of tile over all kernels of a case; empty if a kernel's branches are not known.

    A step may cover any number of heads: the matrix products it issues tell how many.
    """
    named = [(kernel.step, branches) for kernel in kernels if (branches := named_branches(case, kernel))]
    if not named or len(named) != len(kernels):
        return {}
    tiles = sum(branches["full"].matmuls for _, branches in named) / matmuls(case)

    def cost(names: Sequence[str]) -> Cost:
        parts = [part for step, own in named for part in (step, *(own[name] for name in names if name in own))]
        bundles, cycles = sum(part.bundles for part in parts), sum(part.cycles for part in parts)
        return Cost(bundles / tiles, cycles / tiles, sum(part.loops for part in parts))

    return {kind: cost(names) for kind, names in STEPS.items() if kind != "few" or case.bias}


def ceiling(case: Case, kind: str) -> int | None:
    """Most bundles that a kind of tile may take; None where there is no gate."""
    if (case.length, case.heads) != (GATE_LENGTH, GATE_HEADS) or kind == "edge":
        return None
    place = 0 if not case.bias else 1 if kind == "few" else 2
    limits = CEILINGS.get((case.target, case.dim))
    return limits[3 * case.backward + place] if limits else None


def complaint(result: Result) -> str:
    """Why a result fails the check; empty if it passes."""
    if result.reason:
        return result.reason
    if result.case.target == GPU:
        return ""
    used = max(kernel.vmem for kernel in result.kernels)
    if used > VMEM[result.case.target]:
        return f"uses {used / 2**20:.1f} MiB of VMEM, the core has {VMEM[result.case.target] / 2**20:.0f}"
    costs = tile_costs(result.case, result.kernels)
    if not costs:
        found = ", ".join(f"{kernel.name}: {len(kernel.branches)}" for kernel in result.kernels)
        return f"the branches of the kernels are not those of BRANCHES in {Path(__file__).name} ({found})"
    limits = ((kind, cost, ceiling(result.case, kind)) for kind, cost in costs.items())
    high = [
        f"a {kind} tile takes {cost.bundles:.0f} bundles, the ceiling is {limit}"
        for kind, cost, limit in limits
        if limit is not None and cost.bundles > limit
    ]
    return "; ".join(high)


def environment(dumps: Path) -> dict[str, str]:
    """Of a compiling process."""
    flags = {"LIBTPU_INIT_ARGS": DUMP_FLAGS.format(folder=dumps)}
    path = os.pathsep.join([str(ROOT), str(LIBTPU)])
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return kept | ENVIRONMENT | flags | {"PYTHONPATH": path}


def compile_cases(cases: Sequence[Case]) -> Iterator[Result]:
    """Results in order; a case whose process ends or hangs gets that as its reason, the rest a new process."""
    left = list(cases)
    while left:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "stderr", "w+") as errors:
            with _compiler(left, Path(folder) / "dumps", errors) as process:
                try:
                    while left and (line := _line(process, CASE_SECONDS)):
                        yield _result(json.loads(line))
                        left.pop(0)
                        began = time.perf_counter()
                    code = process.wait()
                finally:
                    process.kill()
            if left:
                errors.seek(0)
                said = [text for text in errors.read().splitlines() if text.strip()]
                reason = f"the compiler's process ended with status {code}: {said[-1] if said else 'no message'}"
                yield Result(left.pop(0), reason[:400], time.perf_counter() - began)


def _compiler(cases: Sequence[Case], dumps: Path, errors: IO[str]) -> subprocess.Popen[str]:
    """A process at work on the cases."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compile_cases", str(dumps)],
        env=environment(dumps),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        json.dump([asdict(case) for case in cases], pipe)
    return process


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line of a process, which is killed if it takes longer; empty at its end."""
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


def _result(record: dict[str, Any]) -> Result:
    kernels = tuple(
        Kernel(**{**one, "step": Branch(**one["step"]), "branches": tuple(Branch(**each) for each in one["branches"])})
        for one in record["kernels"]
    )
    return Result(Case(**record["case"]), record["reason"], record["seconds"], kernels)


def compile_all(cases: Sequence[Case], show: Callable[[Result], None]) -> list[Result]:
    """Compiles in `PROCESSES` processes, each of them cases of one target; results in the order of ``cases``."""
    jobs = []
    for target in TARGETS:
        own = [case for case in cases if case.target == target]
        jobs += [own[start : start + JOB_CASES] for start in range(0, len(own), JOB_CASES)]
    done: dict[Case, Result] = {}

    def work(job: Sequence[Case]) -> None:
        for result in compile_cases(job):
            done[result.case] = result
            show(result)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(work, jobs))
    return [done[case] for case in cases]


def describe(result: Result) -> str:
    """One line."""
    name = f"{result.case.name:48}"
    if wrong := complaint(result):
        return f"FAIL  {name} {wrong}"
    if result.case.target == GPU:
        return f"ok    {name} lowered in {result.seconds:.1f} s"
    vmem = max(kernel.vmem for kernel in result.kernels) / 2**20
    costs = tile_costs(result.case, result.kernels)
    text = ", ".join(f"{kind} {cost.bundles:.0f}" for kind, cost in costs.items())
    return f"ok    {name} {vmem:5.1f} MiB VMEM  {result.seconds:5.1f} s  bundles: {text}"


def gate_table(results: Sequence[Result]) -> Table:
    """The schedules at the gate's shape beside the ideal, the ceiling and the target."""
    table = Table(title=f"step of a tile of {TILE} x {TILE} pairs, per head (T={GATE_LENGTH} H={GATE_HEADS})")
    titles = "kernel", "tile", "D", "bundles", "cycles", "ideal", "padded", "of ideal", "of padded", "ceiling", "target"
    for title in titles:
        table.add_column(title, justify="left" if title in ("kernel", "tile") else "right")
    for result in results:
        case = result.case
        if case.target == GPU or result.reason or (case.length, case.heads) != (GATE_LENGTH, GATE_HEADS):
            continue
        name = f"{case.target} {'backward' if case.backward else 'forward'} {'bias' if case.bias else 'plain'}"
        wanted = None if case.backward or case.dim != 128 else TARGET_BUNDLES.get(case.target)
        for kind, cost in tile_costs(case, result.kernels).items():
            ideal, full, limit = ideal_cycles(case), ideal_cycles(case, padded(case)), ceiling(case, kind)
            more = "+" if cost.loops else ""
            table.add_row(
                name,
                kind,
                str(case.dim),
                f"{cost.bundles:.0f}{more}",
                f"{cost.cycles:.0f}{more}",
                f"{ideal:.0f}",
                f"{full:.0f}",
                f"{ideal / cost.cycles:.0%}",
                f"{full / cost.cycles:.0%}",
                "" if limit is None else str(limit),
                "" if wanted is None or kind == "edge" else f"<= {wanted[case.bias]}",
            )
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name has all of these words")
    parser.add_argument("--all", action="store_true", help="every T, D and H with every other, not the covering ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--quiet", action="store_true", help="print failures and the last line only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cases = [case for case in grid(options.all) if set(options.only) <= set(case.name.split())]
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    if not cases:
        console.print(f"no case has all of {options.only}; names are like: {grid()[0].name}")
        return 2
    if any(case.target in TOPOLOGIES for case in cases) and not has_compiler():
        console.print("the TPU compiler (libtpu) is not installed; `make compile-check` installs it")
        return 2
    began = time.perf_counter()
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=options.quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))

        def show(result: Result) -> None:
            progress.advance(task)
            if not options.quiet or complaint(result):
                progress.console.print(describe(result), soft_wrap=True, markup=False)

        results = compile_all(cases, show)
    table = gate_table(results)
    if table.rows and not options.quiet:
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps([_record(result) for result in results], indent=1) + "\n")
    failed = [result for result in results if complaint(result)]
    minutes = (time.perf_counter() - began) / 60
    console.print(f"{len(results) - len(failed)} of {len(results)} cases pass ({minutes:.1f} min)")
    return 1 if failed else 0


def has_compiler() -> bool:
    return LIBTPU.is_dir() or importlib.util.find_spec("libtpu") is not None


def _record(result: Result) -> dict[str, Any]:
    """A result as JSON, with what is derived from it."""
    costs = {kind: cost._asdict() for kind, cost in tile_costs(result.case, result.kernels).items()}
    return asdict(result) | {"complaint": complaint(result), "tiles": costs}


if __name__ == "__main__":
    sys.exit(main())
