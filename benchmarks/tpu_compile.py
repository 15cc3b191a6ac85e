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
from genrec_jax.distributed.topology import ENVIRONMENT, LIBTPU

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
JOB_CASES = 15  # of one process, so that both processes end together
CASE_SECONDS = 900.0

TILE = 512
# Multiply-adds of one core per cycle, and the side of the square of weights that a matrix unit holds.
MACS = {"v5e": 2**16, "v5p": 2**16, "v6e": 2**18, "7x": 2**18}
MXU_SIDE = {"v5e": 128, "v5p": 128, "v6e": 256, "7x": 256}
MATMUL_ROWS = 16  # of bfloat16 in one matrix unit instruction

# The branches of the kernels (`pl.when`, or a loop of unknown length) in the order of their programs; those in brackets
# exist with bias alone. Loops over squares of 128 x 128 pairs: two with many time buckets, the odd one, one with few;
# for the gradient of the times four squares, one square, the further buckets of one with many.
BRANCHES = {
    "hstu_forward": "first [two-many] [one-many] full [one-few] fill [irregular] masked dirty last",
    "hstu_backward": (
        "first opens [tables] [two-many] [one-many] full [one-few] fill [irregular] masked dirty"
        " [four-sums] [one-sum] [more-sums] [diagonals] [irregular-diagonals] last closes"
    ),
}
ATTENDS = ("full", "masked", "dirty", "irregular-diagonals")  # those that multiply matrices
# How often a step in the middle of a row of tiles runs each branch, or its loop. A "full" tile has all pairs visible;
# with bias none, one or all 16 of its squares have many time buckets: "few", "one", "many". The "edge" of the mask is
# the diagonal: 6 squares hidden, 3 with few buckets and 7 with many, as the gaps of real sequences have it.
STEPS: dict[str, dict[str, int]] = {
    "full": {"full": 1},
    "few": {"full": 1, "four-sums": 4, "diagonals": 1},
    "one": {"full": 1, "one-many": 1, "four-sums": 4, "more-sums": 1, "diagonals": 1},
    "many": {"full": 1, "two-many": 8, "four-sums": 4, "more-sums": 16, "diagonals": 1},
    "edge": {
        **{"two-many": 3, "one-many": 1, "one-few": 3, "fill": 1, "masked": 1},
        **{"four-sums": 2, "one-sum": 2, "more-sums": 7, "diagonals": 1},
    },
}
PLAIN, BIASED = ("full", "edge"), ("few", "one", "many", "edge")  # kinds of tiles

# Bundles of such a step for 512 x 512 pairs and one head at T=2048 H=4, measured and 3 % on top:
# (target, D): forward (full; with bias few, one, many), backward (the same).
GATE_LENGTH, GATE_HEADS = 2048, 4
CEILINGS: dict[tuple[str, int], tuple[int, ...]] = {
    ("v5e", 64): (1035, 1297, 1336, 1872, 2825, 3494, 3598, 5179),
    ("v5e", 128): (1040, 1233, 1273, 1808, 2857, 3463, 3568, 5148),
    ("v5e", 256): (1938, 2157, 2196, 2732, 4990, 5663, 5767, 7344),
    ("v5p", 64): (1076, 1311, 1351, 1882, 2851, 3599, 3704, 5284),
    ("v5p", 128): (1078, 1294, 1333, 1865, 2909, 3546, 3650, 5231),
    ("v5p", 256): (1990, 2217, 2256, 2788, 5085, 5787, 5891, 7468),
    ("v6e", 64): (648, 984, 1020, 1569, 1791, 2605, 2705, 4262),
    ("v6e", 128): (615, 947, 983, 1532, 1758, 2537, 2636, 4197),
    ("v6e", 256): (650, 984, 1020, 1569, 1774, 2579, 2679, 4235),
    ("7x", 64): (710, 997, 1033, 1578, 1642, 2546, 2643, 4155),
    ("7x", 128): (667, 1040, 1076, 1621, 1778, 2649, 2747, 4258),
    ("7x", 256): (726, 1004, 1040, 1585, 1531, 2483, 2580, 4092),
}
# What the forward kernel has to reach at D=128: (plain, bias).
TARGET_BUNDLES = {"v5e": (1100, 1250), "v6e": (720, 1030)}


class Cost(NamedTuple):
    """The grid step of a 512 x 512 tile, per head.

    A loop counts with its entry as often as `STEPS` has it; ``loops`` inside of it count as run once.
    """

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

    def cost(times: dict[str, int]) -> Cost:
        parts = [(own[name], count) for _, own in named for name, count in times.items() if name in own]
        bundles, cycles = (
            sum(getattr(step, what) for step, _ in named) + sum(count * getattr(part, what) for part, count in parts)
            for what in ("bundles", "cycles")
        )
        return Cost(bundles / tiles, cycles / tiles, sum(count * max(0, part.loops - 1) for part, count in parts))

    return {kind: cost(STEPS[kind]) for kind in (BIASED if case.bias else PLAIN)}


def ceiling(case: Case, kind: str) -> int | None:
    """Most bundles that a kind of tile may take; None where there is no gate."""
    if (case.length, case.heads) != (GATE_LENGTH, GATE_HEADS) or kind == "edge":
        return None
    limits = CEILINGS.get((case.target, case.dim))
    return limits[4 * case.backward + (1 + BIASED.index(kind) if case.bias else 0)] if limits else None


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
