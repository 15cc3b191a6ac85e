"""``genrec stream``: trained trials go on where their training part ended, and predict every period before training on
it, beside the fixed split."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from experiments.folder import only_launcher, read_result
from experiments.paired import tops
from experiments.table import read_trials
from genrec_jax.config import Trial
from genrec_jax.errors import UserError
from genrec_jax.train.cache import enable_compilation_cache
from genrec_jax.train.loop import read_trial
from genrec_jax.train.places import write_text
from genrec_jax.train.stream import Period, Scored, stream

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DAY = _SECONDS["d"]


def stream_command(folders: Sequence[Path], out: Path, period: str, rate: float) -> None:
    """Streams the trials, or a study's at the largest compute that all its families reached; prints the NE of each and
    writes ``OUT/stream.csv``, a line per trial and part of the fixed split.

    Raises UserError for a folder without a finished ranking trial, before anything is written.
    """
    seconds = parse_period(period)
    if not 0 < rate <= 1e6:
        raise UserError(f"--rate must be positive, not {rate}")
    trials = [(folder, _finished(folder)) for given in folders for folder in _trials(given)]
    enable_compilation_cache()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with only_launcher(out):
        for folder, trial in trials:
            found = stream(trial, folder, out / trial.hash, seconds=seconds, rate=rate, on_period=_reporter(trial))
            rows += [_row(trial, part, scores) for part, scores in found.items()]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out / "stream.csv", text.getvalue())
    _print(rows)


def parse_period(text: str) -> int:
    """Seconds of, for example, ``1d`` or ``12h``. Raises UserError for anything else, and for less than a second."""
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    if match is None or not int(match[1]):
        raise UserError(f"--period {text!r} is not a whole number of s, m, h, d or w, for example 1d")
    return int(match[1]) * _SECONDS[match[2]]


def _trials(folder: Path) -> list[Path]:
    """The folder itself, or of a study the trials of its families at the top."""
    if not (folder / "trials").is_dir():
        return [folder]
    names = [name for group in tops(read_trials(folder)) for top in group for name in top.trials]
    found = [folder / "trials" / name for name in dict.fromkeys(names)]
    if not found:
        raise UserError(f"{folder} has no finished ranking trials at the top of its families' ladders")
    return found


def _finished(folder: Path) -> Trial:
    result = read_result(folder)
    if result is None or result["status"] != "done":
        raise UserError(f"{folder} holds no finished trial")
    trial = read_trial(folder)
    if trial.model.goal != "ranking":
        raise UserError(f"{folder} holds a retrieval trial: it is evaluated on users' last events, not over time")
    if trial.data.split != "time":
        raise UserError(f"{folder} holds a trial that was split by users: its training part reaches to the end")
    return trial


def _row(trial: Trial, part: str, scores: Scored) -> dict[str, Any]:
    apart = scores.apart()
    return {
        "trial": trial.hash,
        "model": trial.model.name,
        "seed": trial.seed,
        "part": part,
        "impressions": int(scores.fixed.rows.sum()),
        "users": len(scores.fixed.users),
        "fixed_ne": float(scores.fixed.mean_ne()),
        "streamed_ne": float(scores.streamed.mean_ne()),
        "difference": apart.value,
        "error": apart.error,
        "low": apart.low,
        "high": apart.high,
    }


def _reporter(trial: Trial) -> Any:
    console = Console(highlight=False)

    def report(number: int, count: int, period: Period, scores: Scored) -> None:
        fixed, streamed = float(scores.fixed.mean_ne()), float(scores.streamed.mean_ne())
        console.print(
            f"{trial.hash} {trial.model.name} period {number} of {count} (day {period.start / _DAY:.1f}, "
            f"{period.part}): {scores.fixed.rows.sum()} impressions, NE fixed {fixed:.4f}, streamed {streamed:.4f}"
        )

    return report


def _print(rows: Sequence[dict[str, Any]]) -> None:
    names = ("trial", "model", "part", "fixed", "streamed", "difference", "95 % interval")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None)
    for row in rows:
        table.add_row(
            *(row["trial"][:6], row["model"], row["part"], f"{row['fixed_ne']:.4f}", f"{row['streamed_ne']:.4f}"),
            *(f"{row['difference']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}"),
        )
    Console(highlight=False).print(table)
