"""From records to the table, the verdict on each target and the JSON file."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from benchmarks.gpu_cases import RECIPE, RECIPE_SECONDS, RIVALS, TARGETS, Direction, Job, Shape, Target, published

Record = dict[str, Any]
# By the vendor's data sheets, dense bf16; and special functions: 16 per cycle and multiprocessor, 132 of these at
# 1.83 GHz (the H100 and the H200 are the same processor).
_NOMINAL_TFLOPS = {"H100": 989.0, "H200": 989.0}
_SPECIAL_PER_S = {"H100": 3.9e12, "H200": 3.9e12}
_PUBLISHED_SIZE = (6040, 3883, 101)  # users, items and epochs of the recipe
_CLOSE = 0.75  # a unit busy for this share of the busiest one's time is named beside it


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured ceilings, and what the data sheet says (0 for an unknown device)."""

    platform: str
    matmul_tflops: float
    copy_tb_s: float
    nominal_tflops: float
    special_per_s: float


def machine_of(record: Record) -> Machine:
    kind = record.get("device", "")

    def known(table: dict[str, float]) -> float:
        return next((value for name, value in table.items() if name in kind), 0.0)

    rates = (record["matmul_tflops"], record["copy_tb_s"])
    return Machine(record["platform"], *rates, known(_NOMINAL_TFLOPS), known(_SPECIAL_PER_S))


def roof(shape: Shape, direction: Direction, machine: Machine) -> tuple[float, str]:
    """(TFLOP/s no kernel can exceed here, what bounds the case).

    The roof is the lower of the matmul ceiling and of the bytes at the copy ceiling. Special functions run beside the
    tensor cores and are no part of the roof, but are named where they take as long.
    """
    flops = shape.flops(direction)
    seconds = {
        "tensor cores": flops / (machine.matmul_tflops * 1e12),
        "bytes": shape.bytes(direction) / (machine.copy_tb_s * 1e12),
    }
    limit = flops / max(seconds.values()) / 1e12
    if machine.special_per_s:
        seconds["special functions"] = shape.special() / machine.special_per_s
    longest = max(seconds.values())
    names = [name for name, value in sorted(seconds.items(), key=lambda x: -x[1]) if value >= _CLOSE * longest]
    return limit, " + ".join(names)


def complete(job: Job, record: Record, machine: Machine | None) -> Record:
    """The record with its job's name, the roof, the published number and their ratios."""
    named: Record = {
        "section": job.section,
        "case": job.case,
        "implementation": job.implementation,
        "direction": job.direction,
        "dtype": job.dtype,
    }
    record = named | record
    if record["status"] != "ok" or machine is None or "tflops" not in record:
        return record
    if job.section == "train":
        record["mfu_measured"] = record["tflops"] / machine.matmul_tflops
        if machine.nominal_tflops:
            record["mfu_nominal"] = record["tflops"] / machine.nominal_tflops
        return record
    if job.shape is None or job.direction not in ("forward", "backward"):
        return record
    shape = dataclasses.replace(job.shape, batch=record["batch"])
    record["roof_tflops"], record["bound"] = roof(shape, job.direction, machine)
    record["of_roof"] = record["tflops"] / record["roof_tflops"]
    if to_beat := published(job.shape):
        record["published_tflops"], record["published"] = getattr(to_beat, job.direction), to_beat.source
        record["over_published"] = record["tflops"] / record["published_tflops"]
    notes = [record["note"]] if record["note"] else []
    if machine.platform == "gpu" and record["program_us"] < 1.5 * record["dispatch_us"]:
        notes.append("so short that dispatch may count")
    if record["of_roof"] > 1.05:
        notes.append("ABOVE THE ROOF: do not trust this timing")
    return record | {"note": "; ".join(notes)}


def summary(records: list[Record]) -> list[Record]:
    """Each target with what was measured and whether it is met (None: not measured)."""
    return [*(_judged(target, records) for target in TARGETS), _recipe_judged(records)]


def _recipe_judged(records: list[Record]) -> Record:
    """Whole training of the recipe; on any other data it is not measured."""
    entry: Record = {"case": RECIPE, "direction": "training", "measured": None, "met": None}
    entry |= {"unit": "s after compilation", "target": RECIPE_SECONDS}
    found = [r for r in records if (r["section"], r["case"], r["status"]) == ("recipe", RECIPE, "ok")]
    published = [r for r in found if r["passed"] and (r["users"], r["items"], r["epochs"]) == _PUBLISHED_SIZE]
    if published:
        measured = published[0]["seconds"]
        entry |= {"measured": measured, "met": measured <= RECIPE_SECONDS, "implementation": "the default backends"}
    return entry


def _judged(target: Target, records: list[Record]) -> Record:
    best = _best(target.shape, target.direction, records)
    entry: Record = {"case": target.shape.name, "direction": target.direction, "measured": None, "met": None}
    if target.tflops:
        entry |= {"unit": "TFLOP/s", "target": target.tflops}
        if best:
            measured = best["tflops"]
            entry |= {"measured": measured, "met": measured >= target.tflops, "implementation": best["implementation"]}
        return entry
    entry |= {"unit": "x the time without bias", "target": target.times}
    without = _best(dataclasses.replace(target.shape, bias=False), target.direction, records)
    if best and without:
        measured = best["ms_p10"] / without["ms_p10"]
        entry |= {"measured": measured, "met": measured <= target.times, "implementation": best["implementation"]}
    return entry


def _best(shape: Shape, direction: Direction, records: list[Record]) -> Record | None:
    """The fastest of the lab's own backends at the full batch."""
    found = [
        r
        for r in records
        if (r["section"], r["case"], r["direction"], r["status"]) == ("attention", shape.name, direction, "ok")
        and r["implementation"] not in RIVALS
        and r["batch"] == shape.batch
    ]
    return min(found, key=lambda r: r["ms_p10"], default=None)


def line(record: Record) -> str:
    """One row of the table; also what is printed as soon as a job ends."""
    name = f"{record['case']:<30.30} {record['implementation']:<11} {record['direction'] or record['dtype']:<9}"
    if record["status"] != "ok":
        return f"{name} {record['status']}: {record['note']}"
    if record["section"] == "tests":
        verdict = "pass" if record["passed"] else "FAIL"
        return f"{name} {verdict}, error {record['worst_error_over_allowed']:.2f} of allowed  {record['note']}".rstrip()
    cells = [name]
    if "ms_p10" in record:
        cells.append(f"{record['ms_p10']:9.3f} / {record['ms_median']:9.3f} ms")
    if "tflops" in record:
        cells.append(f"{record['tflops']:7.3g} TFLOP/s")
    if "of_roof" in record:
        cells.append(f"{record['of_roof']:4.0%} of {record['roof_tflops']:4.0f}")
        beat = (
            f"{record['published_tflops']:4.0f} -> {record['over_published']:5.2f}x" if "published" in record else "-"
        )
        cells.append(f"beat {beat:<14} {record['bound']}")
    for key, label in (("mfu_measured", "of the measured matmul"), ("mfu_nominal", "MFU of the nominal peak")):
        if key in record:
            cells.append(f"{record[key]:.1%} {label}")
    if record.get("note"):
        cells.append(f"[{record['note']}]")
    return "  ".join(cells)


def text(header: Record, records: list[Record]) -> str:
    """The whole report for a terminal."""
    rows = ["", f"machine: {header.get('machine', 'unknown')}"]
    titles = {
        "ceilings": "Ceilings",
        "probe": "Backends",
        "tests": "Kernel tests (against float64; each run several times and compared bitwise)",
        "attention": "Attention: P10 / median; TFLOP/s of P10; share of min(byte roof, matmul ceiling); number to beat",
        "train": "Training step (bf16; FLOPs by the model's own account)",
        "recipe": "Recipe (float32, as published; every epoch evaluated on the whole corpus)",
    }
    for section, title in titles.items():
        chosen = [r for r in records if r["section"] == section and r["status"] != "out of time"]
        if chosen:
            rows += ["", title, *(f"  {line(r)}" for r in chosen)]
    late = [r for r in records if r["status"] == "out of time"]
    if late:
        rows += ["", f"Out of time: {len(late)} jobs, the first of them:", *(f"  {line(r)}" for r in late[:5])]
    rows += ["", "Targets (H200)"]
    for t in summary(records):
        bound = "at least" if t["unit"] == "TFLOP/s" else "at most"
        measured = "not measured" if t["met"] is None else f"{t['measured']:.4g}: {'met' if t['met'] else 'NOT MET'}"
        by = f" ({t['implementation']})" if t["met"] is not None else ""
        rows.append(f"  {t['case']:<30} {t['direction']:<9} {bound} {t['target']:g} {t['unit']}: {measured}{by}")
    return "\n".join(rows)


def write(path: pathlib.Path, header: Record, records: list[Record]) -> None:
    """Replaces the file in one step: a run killed at any moment leaves the last complete one."""
    content = _plain(header | {"records": records, "targets": summary(records)})
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(fresh, path)


def _plain(value: Any) -> Any:
    """JSON has no NaN; they become null."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
