"""The results table, derived from the trial folders: one row per trial and place in a study."""

import csv
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.folder import read_record, read_result
from genrec_jax.train.places import Place, write_text

FIRST = ("trial", "study", "family", "label", "seed", "status", "axis", "axis_value", "dataset")
Row = dict[str, Any]


def rebuild_table(out: Place) -> list[Row]:
    """Reads every trial folder of OUT and replaces ``OUT/results.csv``; the same folders give the same bytes."""
    rows = read_trials(out)
    _write(out / "results.csv", list(rows[0]) if rows else list(FIRST), rows)
    return rows


def read_trials(out: Place) -> list[Row]:
    """The rows of the table, all with the same columns in the same order; None for an empty cell.

    A trial without a result has status "failed" or "unfinished" and empty metric columns.
    """
    with ThreadPoolExecutor(16) as pool:  # a store may take a tenth of a second for every file
        trials = list(pool.map(_read, sorted((out / "trials").glob("*/"))))
    found = [trial for trial in trials if trial is not None]
    names = {trial["path"]: trial["result"]["dataset"] for trial in found if "dataset" in trial["result"]}
    rows = [row for trial in found for row in _rows(trial, names)]
    rows.sort(
        key=lambda row: (
            row["study"],
            row["family"],
            _order(row["axis_value"]),
            row["label"],
            row["seed"],
            row["trial"],
        )
    )
    columns = [*FIRST, *sorted({key for row in rows for key in row} - set(FIRST))]
    return [{column: row.get(column) for column in columns} for row in rows]


def flatten(record: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Scalars of a nested record, keys joined; lists and nulls are left out."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{name}": inner for name, inner in flatten(value, separator).items()}
        elif isinstance(value, str | int | float):
            flat[key] = value
    return flat


def _read(folder: Place) -> dict[str, Any] | None:
    """What one folder knows; None for a folder that no launcher made."""
    config, plan = read_record(folder / "config.json"), read_record(folder / "plan.json")
    if config is None or plan is None:
        return None
    result = read_result(folder)
    if result is not None:
        status = result["status"]
    else:
        status = "failed" if (folder / "failure.json").exists() else "unfinished"
    return {
        "trial": folder.name,
        "config": flatten(config, "."),
        "path": config["data"]["path"],
        "placements": plan["placements"],
        "status": status,
        "result": flatten(result or {}),
    }


def _rows(trial: Mapping[str, Any], dataset_names: Mapping[str, str]) -> list[Row]:
    """One row per placement. ``dataset_names``: what finished trials call the dataset in each folder."""
    config, result = trial["config"], trial["result"]
    measured = {key: value for key, value in result.items() if key not in FIRST}
    rows = []
    for place in trial["placements"]:
        axis_value = place["axis_value"]
        if axis_value is None:
            axis_value = result.get(place["axis"], config.get(place["axis"]))
        row = {key: place[key] for key in ("study", "family", "label", "axis")} | {"recipe": place.get("recipe", "")}
        row |= {"trial": trial["trial"], "seed": config["seed"], "status": trial["status"], "axis_value": axis_value}
        row["dataset"] = dataset_names.get(trial["path"], Path(trial["path"]).name)
        rows.append(_settings(config) | row | measured)
    return rows


def _settings(config: Mapping[str, Any]) -> Row:
    """What was set, by plain names (``history``, ``learning_rate``); the model's own sizes as ``model.*``.

    The data's path is left out (the dataset's name stands for it) and ``steps``, whose resolved number is measured.
    """
    plain = {key.partition(".")[2]: value for key, value in config.items() if key.startswith(("data.", "train."))}
    sizes = {key: value for key, value in config.items() if key.startswith("model.")}
    return {
        key: value for key, value in plain.items() if key not in ("path", "digest", "steps", "eval_impressions")
    } | sizes


def _order(axis_value: float | None) -> tuple[bool, float]:
    """Numbers by size, then nothing."""
    return axis_value is None, axis_value or 0.0


def _write(path: Place, columns: list[str], rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
