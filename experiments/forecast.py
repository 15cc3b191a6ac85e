"""Forecasts: what a study's laws say of trials before they run, kept beside what came out (``forecast.json``)."""

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import scaling
from experiments.folder import read_record, read_result, trial_folder
from experiments.study import PlannedTrial, Study
from genrec_jax.errors import UserError
from genrec_jax.train.mirror import brought
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json

_FILE = "forecast.json"


def write_forecasts(study: Study, planned: Sequence[PlannedTrial], out: Place) -> list[str]:
    """Forecasts the metric of every planned trial that has not begun from the laws of the study's finished trials, adds
    this to ``OUT/forecast.json`` and returns it in lines. ``planned``: with their FLOPs as cost.

    What was forecast before stands: a trial is forecast once. Raises UserError, with nothing written, if no planned
    trial is left that has not begun or been forecast, or if no family of these has a law.
    """
    earlier = _read(out)
    known = {row["trial"] for row in earlier}
    left = [one for one in planned if one.trial.hash not in known and not _begun(trial_folder(out, one.trial.hash))]
    if not left:
        raise UserError(f"{out}: every trial of this budget has begun or been forecast already")
    laws, trials = _laws(study, left, out)
    rows = [_row(study, one, laws[one.family, one.cost], trials) for one in left if (one.family, one.cost) in laws]
    if not rows:
        raise UserError(f"{out}: no family of the trials to come has enough finished ones for a law")
    write_json(out / _FILE, {"forecasts": earlier + rows})
    return [_line(row) for row in rows]


def outcomes(out: Place) -> list[str]:
    """What came of the forecasts whose trials have finished, in paragraphs; none without forecasts."""
    rows = [(row, _outcome(out, row)) for row in _read(out)]
    known = [(row, value) for row, value in rows if value is not None]
    if not known:
        return []
    inside = sum(row["low"] <= value <= row["high"] for row, value in known)
    said = f"Of {len(known)} trials forecast before they ran, {inside} came out inside their 95 % intervals."
    return [said, *(f"{_line(row)}; it came to {value:.4f}{_where(row, value)}." for row, value in known)]


def _where(row: Mapping[str, Any], value: float) -> str:
    if row["low"] <= value <= row["high"]:
        return ""
    return f", {'below' if value < row['low'] else 'above'} the interval"


def _read(out: Place) -> list[dict[str, Any]]:
    return list((read_record(out / _FILE) or {}).get("forecasts", []))


def _begun(folder: Place) -> bool:
    """Whether anything of a trial is known."""
    return read_result(folder) is not None or (folder / "metrics.jsonl").is_file()


def _laws(
    study: Study, left: Sequence[PlannedTrial], out: Place
) -> tuple[dict[tuple[str, float | None], tuple[str, Any, float]], int]:
    """(form, prediction, most FLOPs of a finished trial of the family) by family and FLOPs; and how many trials have
    finished, of all families."""
    costs = sorted({one.cost for one in left if one.cost is not None})
    if not (out / "results.csv").is_file():
        raise UserError(f"{out} has no finished trials to forecast from: run a smaller budget first")
    with brought(out) as here:
        table = scaling.read_table([here])
    table = table.where(np.array([name == study.name for name in table.text("study")]))
    analysis = scaling.analyse(table, study.metric, predict_at=costs, axes=False)
    found: dict[tuple[str, float | None], tuple[str, Any, float]] = {}
    for panel in analysis.panels:
        for family in panel.families:
            for said in family.predictions:
                if said.one_run is not None:
                    found[family.name, said.x] = (str(family.chosen), said, float(family.points.x.max()))
    return found, analysis.counts.get("done", 0)


def _row(study: Study, one: PlannedTrial, law: tuple[str, Any, float], trials: int) -> dict[str, Any]:
    form, said, reach = law
    return {
        "trial": one.trial.hash,
        "name": one.name,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_trials": trials,
        "from_flops": reach,
        "train_flops": one.cost,
        "metric": study.metric,
        "form": form,
        "value": said.value,
        "low": said.one_run[0],
        "high": said.one_run[1],
    }


def _line(row: Mapping[str, Any]) -> str:
    beyond = row["train_flops"] / row["from_flops"]
    far = f", {beyond:.1f} times its family's largest trained" if beyond > 1 else ""
    made = f"forecast on {row['made'][:10]} from {row['from_trials']} trials by {row['form']}"
    said = f"{row['value']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
    return f"{row['name']} ({row['train_flops']:.2e} FLOPs{far}), {made}: {said}"


def _outcome(out: Place, row: Mapping[str, Any]) -> float | None:
    result = read_result(trial_folder(out, row["trial"]))
    value = None if result is None else result.get(row["metric"])
    return value if isinstance(value, float) and math.isfinite(value) else None
