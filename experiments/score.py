"""``genrec score``: a file of requests in, a file of scores out, a few requests in memory at a time."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from genrec_jax.errors import UserError
from genrec_jax.serve import Request, Scorer
from genrec_jax.serve.programs import CacheType
from genrec_jax.serve.records import SUFFIXES, Row, decode, read_rows
from genrec_jax.train.cache import enable_compilation_cache

_GROUP_ROWS = 1024  # scores written to a parquet file at once
_TOLD = 5  # bad rows told one by one; the others are counted

Scored = tuple[int, Request, np.ndarray]  # row number, request, probabilities [C, A]


def score_command(
    model: Path,
    requests: Path,
    out: Path | None,
    *,
    skip_bad: bool,
    quiet: bool,
    microbatch: int | None,
    cache_mib: int,
    cache_type: CacheType | None,
) -> None:
    """Scores every request of a file in order. Without ``out`` the scores go to stdout, as JSON lines.

    Raises UserError naming file and row for a row that cannot be scored, unless ``skip_bad``: then it is skipped, and
    counted on stderr.
    """
    rows = read_rows(requests)
    if out is not None and out.suffix not in SUFFIXES:
        raise UserError(f"--out {out} must end in {' or '.join(SUFFIXES)}")
    if cache_mib < 0:
        raise UserError("--cache-mib must not be negative")
    enable_compilation_cache()
    options = {"microbatch": microbatch, "cache_type": cache_type}
    scorer = _scorer(model, {key: value for key, value in options.items() if value is not None}, cache_mib << 20)
    bad = 0
    with _writer(out, scorer.schema.tasks) as writer, _progress(quiet or out is None) as advance:

        def fault(number: int, what: str) -> None:
            nonlocal bad
            sentence = f"{requests}, {'line' if requests.suffix == '.jsonl' else 'row'} {number}: {what}"
            if not skip_bad:
                raise UserError(sentence)
            bad += 1
            if bad <= _TOLD:
                print(f"skipped: {sentence}", file=sys.stderr)

        for number, request, scores in _scored(scorer, rows, fault, advance):
            writer.add(number, request, scores)
    if bad:
        print(f"skipped {bad:,} bad rows of {requests}", file=sys.stderr)


def _scorer(model: Path, options: dict[str, Any], cache_bytes: int) -> Scorer:
    if not model.is_file():
        return Scorer.from_trial(model, cache_bytes=cache_bytes, **options)
    if options:
        flag = next(iter(options)).replace("_", "-")
        raise UserError(f"--{flag} was decided when {model} was exported; leave it out")
    return Scorer.load(model, cache_bytes=cache_bytes)


def export_command(trial: Path, out: Path, microbatch: int, cache_type: CacheType) -> None:
    """Writes the trial's scorer as one file."""
    scorer = Scorer.from_trial(trial, microbatch=microbatch, cache_type=cache_type)
    with Console(stderr=True).status("lowering"):
        scorer.export(out)


def _scored(scorer: Scorer, rows: Iterator[Row], fault: Any, advance: Any) -> Iterator[Scored]:
    """The requests of good rows with their scores, in order; ``lanes`` of different users are scored together."""
    catalogue = scorer.catalogue
    if catalogue is None:
        raise UserError("this scorer knows no dataset, so it cannot read requests")
    waiting: list[tuple[int, Request]] = []

    def flush() -> Iterator[Scored]:
        found = scorer.score_all([request for _, request in waiting])
        yield from ((number, request, scores) for (number, request), scores in zip(waiting, found))
        waiting.clear()

    for row in rows:
        advance(row)
        if row.fault:
            fault(row.number, row.fault)
            continue
        try:
            request = decode(row.record, catalogue)
            if request.user is not None and request.user in {waited.user for _, waited in waiting}:
                yield from flush()  # this one may go on where that one ends
            scorer.check(request)
        except UserError as error:
            fault(row.number, str(error))
            continue
        waiting.append((row.number, request))
        if len(waiting) == scorer.shapes.lanes:
            yield from flush()
    yield from flush()


class _Writer(Protocol):
    def add(self, number: int, request: Request, scores: np.ndarray) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """{"row": 3, "user": "u", "scores": {task: [a probability per candidate]}}, one line each."""

    def __init__(self, file: IO[str], tasks: tuple[str, ...]):
        self._file, self._tasks = file, tasks

    def add(self, number: int, request: Request, scores: np.ndarray) -> None:
        # The shortest decimals that give the float32 back.
        named = {task: [float(str(x)) for x in scores[:, i]] for i, task in enumerate(self._tasks)}
        self._file.write(json.dumps({"row": number, "user": request.user, "scores": named}) + "\n")

    def close(self) -> None:
        self._file.flush()


class _Table:
    """The same as columns row, user, scores (a struct of lists)."""

    def __init__(self, path: Path, tasks: tuple[str, ...]):
        self._tasks = tasks
        scores = pa.struct([(task, pa.list_(pa.float32())) for task in tasks])
        self._schema = pa.schema([("row", pa.int64()), ("user", pa.string()), ("scores", scores)])
        self._file = pq.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, number: int, request: Request, scores: np.ndarray) -> None:
        named = {task: scores[:, i] for i, task in enumerate(self._tasks)}
        self._rows.append({"row": number, "user": request.user, "scores": named})
        if len(self._rows) == _GROUP_ROWS:
            self._write()

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


@contextlib.contextmanager
def _writer(out: Path | None, tasks: tuple[str, ...]) -> Iterator[_Writer]:
    """Writes beside ``out`` and renames at the end: ``out`` is whole or as it was."""
    if out is None:
        yield _Lines(sys.stdout, tasks)
        return
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix == ".parquet":
            table = _Table(scratch, tasks)
            yield table
            table.close()
        else:
            with scratch.open("w", encoding="utf-8") as file:
                yield _Lines(file, tasks)
        os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Shows the share of the file read, its rate and the time left, on stderr; yields what tells of a row."""
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=1.0, rate="")
        started, seen = time.perf_counter(), 0

        def advance(row: Row) -> None:
            nonlocal seen
            seen += 1
            rate = seen / max(time.perf_counter() - started, 1e-9)
            progress.update(task, completed=row.done, rate=f"{rate:,.0f} requests/s")

        yield advance
