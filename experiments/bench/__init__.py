"""``genrec bench``: speed and memory of this machine, in ratios where a ratio says more than a time."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from genrec_jax.errors import UserError


def _retrieval(data: Path | None) -> list[str]:
    from experiments.bench.retrieval_step import run

    found = run(7)
    return [
        f"training step {found['lab_ms']:.0f} ms, plain JAX {found['plain_ms']:.0f} ms: "
        f"{found['plain_over_lab']:.2f}x (medians of 7, side by side)",
        f"{found['gflop']:.1f} GFLOP a step, {found['achieved_gflops']:.1f} GFLOP/s of the machine's own matmul "
        f"peak of {found['peak_gflops']:.0f} GFLOP/s: {100 * found['achieved_gflops'] / found['peak_gflops']:.1f} %",
    ]


def _evaluation(data: Path | None) -> list[str]:
    from experiments.bench.evaluation import ITEMS, USERS, run

    found = run()
    return [
        f"HSTU-large, {USERS:,} users against {ITEMS:,} items: {found['seconds']:.1f} s (median of 3), "
        f"{found['first_seconds']:.1f} s the first time, with compilation"
    ]


def _import(data: Path | None) -> list[str]:
    from experiments.bench.importing import run

    found = run(data)
    what = "Globo" if data else "a random log of Globo's size"
    return [f"2,988,181 clicks of {what}: {found['seconds']:.1f} s, peak {found['peak_gib']:.2f} GiB resident"]


def _pipeline(data: Path | None) -> list[str]:
    from experiments.bench.feeding import run

    return [
        f"{family}: {found['delivered']:,.0f} rows/s delivered, {found['consumed']:,.0f} consumed: "
        f"{found['ratio']:.1f}x"
        for family, found in run().items()
    ]


def _overhead(data: Path | None) -> list[str]:
    from experiments.bench.overhead import run

    found = run()
    return [
        f"12 trials, one worker, warm cache: {found['wall_seconds']:.1f} s for {found['train_seconds']:.1f} s of "
        f"training: {100 * found['overhead']:.1f} % overhead"
    ]


def _packing(data: Path | None) -> list[str]:
    from experiments.bench.packing import TRIALS, run

    return [
        f"{family}, {TRIALS} trials of rung s0, one worker: {found['alone_wall']:.2f} s a trial one after another, "
        f"{found['packed_wall']:.2f} s packed: {found['ratio']:.2f}x the trials an hour; training loops "
        f"{found['alone_training']:.2f} and {found['packed_training']:.2f} s: {found['training_ratio']:.2f}x "
        f"(medians of 3); load average {os.getloadavg()[0]:.1f}"
        for family, found in run().items()
    ]


def _attention(data: Path | None) -> Iterator[str]:
    from experiments.bench.attention import Found, run

    return run(Found())


def _thinning(data: Path | None) -> list[str]:
    from experiments.bench.thinning import ALPHA, LENGTH, USERS, run

    found = run()
    return [
        f"alpha {ALPHA}, {USERS} histories of {LENGTH:,}: {100 * found['removed']:.1f} % of the events and "
        f"{100 * found['pairs']:.1f} % of the pairs removed, {found['rows']:.0f} packed rows",
        f"training takes {found['thinned_ms']:.0f} ms a history, {found['whole_ms']:.0f} ms whole: "
        f"{found['ratio']:.2f}x (one pass, side by side; a packed row {found['row_ms']:.0f} ms); load average "
        f"{os.getloadavg()[0]:.1f}",
    ]


def _tables(data: Path | None) -> list[str]:
    from experiments.bench.tables import WIDTH, run

    found = run()
    least = found[min(found)]
    lines = [
        f"{rows:,} rows of {WIDTH}: {own['ms']:.1f} ms a step, {own['ms'] / least['ms']:.2f}x the smallest table's; "
        f"table and state {own['held'] / 2**30:.2f} GiB, peak {own['peak'] / 2**30:.2f} GiB"
        for rows, own in found.items()
    ]
    most, base = found[max(found)], least["peak"] - least["held"]
    beside = (most["peak"] - base) / most["held"]
    return [*lines, f"a process without table takes {base / 2**30:.2f} GiB; the rest is {beside:.2f}x what is held"]


def _serving(data: Path | None) -> Iterator[str]:
    from experiments.bench.serving import run

    return run()


_BENCHMARKS: dict[str, Callable[[Path | None], Iterable[str]]] = {
    "retrieval": _retrieval,
    "evaluation": _evaluation,
    "import": _import,
    "pipeline": _pipeline,
    "overhead": _overhead,
    "packing": _packing,
    "attention": _attention,
    "thinning": _thinning,
    "tables": _tables,
    "serving": _serving,
}


def run(name: str, data: Path | None = None) -> None:
    """Prints one benchmark, or all. ``data``: a Globo folder for ``import``. Raises UserError for an unknown name."""
    if name != "all" and name not in _BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; there is: all, {', '.join(_BENCHMARKS)}")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("jax", "flax", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    for key in _BENCHMARKS if name == "all" else [name]:
        for line in _BENCHMARKS[key](data):
            print(f"{key:>10}  {line}", flush=True)
