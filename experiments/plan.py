"""``genrec plan``: does a trial fit on TPUs or GPUs that are not here, and how long does it take at least?"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.recipes import names, read
from experiments.trial import parse_settings
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.distributed.collectives import KINDS
from genrec_jax.distributed.estimates import estimated_plans
from genrec_jax.distributed.mesh import parse_mesh
from genrec_jax.distributed.plan import PROGRAMS, Plan, Program, compiled_plans
from genrec_jax.distributed.topology import Topology, parse_topology, prepare, slices
from genrec_jax.errors import UserError
from genrec_jax.models import registry

# Of a trial, on a topology, with a mesh, these of its programs.
Planned = Callable[[Topology, dict[str, int], Sequence[Program]], list[Plan]]


def plan_command(
    what: str,
    *,
    topology: str,
    mesh: str | None,
    search: bool,
    quick: bool,
    remat: bool,
    offload: bool,
    items: int | None,
    tasks: Sequence[str],
    settings: Sequence[str],
) -> int:
    """Prints the plan; the exit code is 1 where the trial does not fit."""
    where = parse_topology(topology)
    trial, schema, steps = _trial(what, items, tasks, settings)
    if where.chip.gpu and offload:
        raise UserError("--offload is planned for TPUs alone: estimates for GPUs do not know the host's memory")
    if where.chip.gpu and quick:
        raise UserError("--quick is for TPUs alone: for GPUs nothing is compiled")
    if not where.chip.gpu:
        prepare(quick=quick)

    def planned(where: Topology, sizes: dict[str, int], programs: Sequence[Program] = PROGRAMS) -> list[Plan]:
        if where.chip.gpu:
            return estimated_plans(trial, schema, where, sizes, max(steps, 1), remat, programs)
        return compiled_plans(trial, schema, where, sizes, max(steps, 1), remat, offload, programs)

    console = Console(highlight=False)
    if quick:
        console.print("compiled with little optimisation: memory, traffic and what is sent are rough", style="dim")
    if where.chip.gpu:
        console.print("estimated from the model's own accounts; nothing was compiled", style="dim")
    if search:
        if mesh is not None:
            raise UserError("--search looks for a mesh, so it takes no --mesh")
        among = meshes(where.devices, trial.train.batch_rows, getattr(trial.model, "heads", 1))
        return _search(console, planned, where, among)
    sizes = {"data": where.devices} if mesh is None else parse_mesh(mesh)
    training, scoring = planned(where, sizes)
    chips = f"{where.chips} chip{'s' * (where.chips > 1)}"
    console.print(f"{what} on {where.name} ({chips}), mesh {mesh_name(sizes)}; per device:")
    console.print(_table(training, steps))
    console.print(f"scoring a batch of {scoring.requests:,} requests beside that state; per device:")
    console.print(_table(scoring, 0))
    for name, plan in (("A training step", training), ("Scoring", scoring)):
        if not plan.fits:
            console.print(_why(name, plan))
    if training.fits and scoring.fits:
        return 0
    console.print(_smallest(planned, training, trial.train.batch_rows))
    return 1


def _trial(what: str, items: int | None, tasks: Sequence[str], settings: Sequence[str]) -> tuple[Trial, Schema, int]:
    """The trial, what it knows of its data, and its number of steps (0: not known)."""
    if what in names():
        if items is not None or tasks:
            raise UserError(f"--items and --task go with a model; {what} is a recipe, which knows its dataset")
        recipe = read(what)
        trial = override(recipe.trial("original", 0), parse_settings(settings))
        epoch = -(-(recipe.users or 0) // trial.train.batch_rows)  # recipes draw whole users for a batch
        steps = trial.train.steps or round(epoch * trial.train.epochs)
        return trial, Schema(recipe.items + 1, ()), steps
    if what not in registry.names():
        raise UserError(
            f"{what!r} is neither a recipe ({', '.join(names())}) nor a model ({', '.join(registry.names())})"
        )
    if items is None:
        raise UserError(f"a plan for the model {what} needs --items, the number of items of its data")
    if items < 1:
        raise UserError(f"--items must be at least 1, not {items}")
    trial = override(default_trial(what), parse_settings(settings))
    ranks = trial.model.goal == "ranking"
    return trial, Schema(items + 1, tuple(tasks) or (("click",) if ranks else ())), trial.train.steps


def _search(console: Console, planned: Planned, where: Topology, among: Sequence[dict[str, int]]) -> int:
    """Ranks meshes by the time of a step; those that do not fit come last. Scoring is asked of the first alone, or, if
    it does not fit there, of the first where it does."""
    if not among:
        raise UserError(f"no mesh of {where.devices} devices divides train.batch_rows and model.heads evenly")
    found = []
    for sizes in among:
        console.print(f"planning {mesh_name(sizes)}", style="dim")
        found += planned(where, sizes, ("training",))
    table = Table(box=None)
    table.add_column("mesh", no_wrap=True)
    for column in ("bytes a device", "sent a step", "step at least", "bound by", "MFU at most"):
        table.add_column(column)
    for plan in ranked(found):
        told = [_bytes(plan.memory), _bytes(plan.sent), _time(plan.least_seconds), _bound(plan), f"{plan.mfu:.1%}"]
        table.add_row(mesh_name(plan.mesh), *(told if plan.fits else ["does not fit"]))
    console.print(table)
    for plan in ranked(found):
        if not plan.fits:
            break
        (scoring,) = planned(where, plan.mesh, ("scoring",))
        if scoring.fits:
            console.print(f"scoring with {mesh_name(plan.mesh)}: {_fit(scoring, 'batch')}, {_rate(scoring)}")
            return 0
        console.print(_why(f"Scoring with {mesh_name(plan.mesh)}", scoring))
    return 1


def meshes(devices: int, rows: int, heads: int) -> list[dict[str, int]]:
    """Rows alone, parameters divided too, and two between; tokens of a row, or heads, divided among 2 and among the
    most that divide the heads. Those that divide the ``rows`` of a batch evenly."""
    if devices == 1:
        return [{"data": 1}]
    between = sorted({2 ** round(share * math.log2(devices)) for share in (1 / 3, 2 / 3)} - {1, devices})
    mixed = [{"data": devices // size, "fsdp": size} for size in between if devices % size == 0]
    within = sorted({2, math.gcd(heads, devices)} - {1}) if heads % 2 == 0 and devices % 2 == 0 else []
    divided = [
        ({"fsdp": devices // size} if size < devices else {}) | {axis: size}
        for axis in ("context", "model")
        for size in within
    ]
    found = [{"data": devices}, *mixed, {"fsdp": devices}, *divided]
    return [sizes for sizes in found if rows % math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp")) == 0]


def ranked(plans: Iterable[Plan]) -> list[Plan]:
    """Those that fit first, the fastest of them first, of equals the one that needs least memory."""
    return sorted(plans, key=lambda p: (not p.fits, round(p.least_seconds, 6), p.memory))


def _smallest(planned: Planned, plan: Plan, rows: int) -> str:
    """The smallest slice of the same chips that the trial fits on, its parameters divided over all devices."""
    state = sum(plan.state.values()) * math.prod(plan.mesh.values()) / plan.mesh.get("data", 1)
    divided = plan.mesh == {"fsdp": plan.topology.devices}
    for where in slices(plan.topology):
        if divided and where.chips <= plan.topology.chips:  # fewer devices hold more each
            continue
        if rows % where.devices:
            return f"No slice up to {rows} devices (train.batch_rows) was found that it fits on."
        if state / where.devices > plan.room:  # no need to ask the compiler
            continue
        sizes = {"fsdp": where.devices}
        training, scoring = planned(where, sizes, PROGRAMS)
        if training.fits and scoring.fits:
            return (
                f"The smallest slice that it fits on is {where.name} with --mesh {mesh_name(sizes)}: "
                f"{_fit(training, 'step')}; scoring {_fit(scoring, 'batch')}."
            )
    return f"It fits on no slice of {plan.topology.kind} chips."


def _why(name: str, plan: Plan) -> str:
    """That a program does not fit, and why."""
    reason = plan.problem or f"it needs {_bytes(plan.memory)} of {_bytes(plan.room)} a device"
    tables = f" (every device gathers {_bytes(plan.gathered)} of tables)" if plan.gathered else ""
    return f"{name} does not fit: {reason}{tables}."


def _fit(plan: Plan, what: str) -> str:
    return f"{_bytes(plan.memory)} of {_bytes(plan.room)} a device, a {what} of {_time(plan.least_seconds)} at least"


def _rate(plan: Plan) -> str:
    return f"{plan.requests_per_second:,.0f} requests a second at most"


def _table(plan: Plan, steps: int) -> Table:
    """A plan in full. ``steps``: of the trial, 0 if they are not known, or for a scoring."""
    table = Table(show_header=False, box=None)
    if not plan.requests:
        for kind, size in plan.state.items():
            table.add_row(kind, _bytes(size))
    if plan.gathered:
        table.add_row("tables, gathered", _bytes(plan.gathered))
    if plan.problem:
        return table
    table.add_row("batch", _bytes(plan.batch))
    table.add_row("activations, temporaries", _bytes(plan.temporaries))
    table.add_row("memory", f"{_bytes(plan.memory)} of {_bytes(plan.room)}")
    if plan.host:
        table.add_row("in the host's memory", _bytes(plan.host))
    if not plan.fits:
        return table
    table.add_row("FLOPs of the model", f"{plan.flops:.3g}")
    if plan.more_flops > 0.001 * plan.flops:
        table.add_row("alike or again", f"{plan.more_flops:.3g}")
    table.add_row("HBM traffic", _bytes(plan.traffic))
    what = "batch" if plan.requests else "step"
    for kind in KINDS:
        calls = [one.sent for one in plan.collectives if one.kind == kind]
        if calls:
            table.add_row(f"{kind}, {len(calls)} a {what}", f"{_bytes(sum(calls))} sent")
    for part, seconds in plan.seconds().items():
        table.add_row(f"time of {part}", _time(seconds))
    table.add_row(what, f"{_time(plan.least_seconds)} at least, bound by {_bound(plan)}")
    if plan.requests:
        table.add_row("rate", _rate(plan))
        return table
    table.add_row("MFU", f"{plan.mfu:.1%} at most")
    if steps:
        hours = steps * plan.least_seconds / 3600
        table.add_row(
            f"{steps:,} steps", f"{_time(3600 * hours)} at least, {hours * plan.topology.chips:.3g} chip-hours"
        )
    return table


def _bound(plan: Plan) -> str:
    times: dict[str, Any] = plan.seconds()
    return max(times, key=times.__getitem__)


def mesh_name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1024
    raise AssertionError


def _time(seconds: float) -> str:
    for factor, unit in ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h")):
        limit = {"us": 1e-3, "ms": 1.0, "s": 120.0, "min": 7200.0, "h": math.inf}[unit]
        if seconds < limit:
            return f"{seconds / factor:.3g} {unit}"
    raise AssertionError
