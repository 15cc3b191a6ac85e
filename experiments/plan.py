"""``genrec plan``: does a trial fit on TPUs or GPUs that are not here, and how long does it take at least?"""

import functools
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
from genrec_jax.distributed.mesh import parse_mesh
from genrec_jax.distributed.plan import Plan, estimated_step, plan_step
from genrec_jax.distributed.topology import Topology, larger, parse_topology, prepare
from genrec_jax.errors import UserError
from genrec_jax.models import registry

Compiled = Callable[[Topology, dict[str, int]], Plan]


def plan_command(
    what: str,
    *,
    topology: str,
    mesh: str | None,
    search: bool,
    remat: bool,
    items: int | None,
    tasks: Sequence[str],
    settings: Sequence[str],
) -> int:
    """Prints the plan; the exit code is 1 where the trial does not fit."""
    where = parse_topology(topology)
    trial, schema, steps = _trial(what, items, tasks, settings)
    if not where.chip.gpu:
        prepare()
    one = estimated_step if where.chip.gpu else plan_step
    compiled = functools.partial(one, trial, schema, steps=max(steps, 1), remat=remat)
    if search:
        if mesh is not None:
            raise UserError("--search looks for a mesh, so it takes no --mesh")
        heads = 1 if where.chip.gpu else getattr(trial.model, "heads", 1)
        return _search(compiled, where, meshes(where.devices, trial.train.batch_rows, heads))
    sizes = {"data": where.devices} if mesh is None else parse_mesh(mesh)
    console = Console(highlight=False)
    plan = compiled(where, sizes)
    console.print(_head(what, plan))
    if where.chip.gpu:
        console.print("estimated from the model's own accounts; nothing was compiled", style="dim")
    if plan.fits:
        console.print(_table(plan, steps))
        return 0
    console.print(_memory(plan))
    console.print(f"It does not fit: {plan.problem or f'a step needs {_bytes(plan.memory)} of {_bytes(plan.room)}'}.")
    console.print(_smallest(compiled, plan, trial.train.batch_rows))
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


def _search(compiled: Compiled, where: Topology, among: Sequence[dict[str, int]]) -> int:
    """Ranks meshes by the time of a step; those that do not fit come last."""
    if not among:
        raise UserError(f"no mesh of {where.devices} devices divides train.batch_rows and model.heads evenly")
    console = Console(highlight=False)
    found = []
    for sizes in among:
        console.print(f"compiling {mesh_name(sizes)}", style="dim")
        found.append(compiled(where, sizes))
    table = Table("mesh", "bytes a device", "sent a step", "step at least", "bound by", "MFU at most", box=None)
    for plan in ranked(found):
        told = [_bytes(plan.memory), _bytes(plan.sent), _time(plan.step_seconds), _bound(plan)]
        table.add_row(
            mesh_name(plan.mesh), *(told if plan.fits else ["does not fit", "", "", ""]), f"{plan.mfu:.1%}" * plan.fits
        )
    console.print(table)
    return 0 if any(plan.fits for plan in found) else 1


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
    return sorted(plans, key=lambda p: (not p.fits, round(p.step_seconds, 6), p.memory))


def _smallest(compiled: Compiled, plan: Plan, rows: int) -> str:
    """The smallest slice of the same chips that the trial fits on, its parameters divided over all devices."""
    for where in larger(plan.topology):
        if rows % where.devices:
            return f"No slice up to {rows} devices (train.batch_rows) was found that it fits on."
        sizes = {"fsdp": where.devices}
        held = sum(plan.state.values()) * math.prod(plan.mesh.values()) / plan.mesh.get("data", 1)
        if held / where.devices > plan.room:  # no need to ask the compiler
            continue
        tried = compiled(where, sizes)
        if tried.fits:
            return f"The smallest slice that it fits on is {where.name} with --mesh {mesh_name(sizes)}: {_fit(tried)}."
    return f"It fits on no slice of {plan.topology.name.partition(':')[0]} chips."


def _fit(plan: Plan) -> str:
    return f"{_bytes(plan.memory)} of {_bytes(plan.room)} a device, a step of {_time(plan.step_seconds)} at least"


def _head(what: str, plan: Plan) -> str:
    chips = f"{plan.topology.chips} chip{'s' * (plan.topology.chips > 1)}"
    return f"{what} on {plan.topology.name} ({chips}), mesh {mesh_name(plan.mesh)}; per device:"


def _memory(plan: Plan) -> Table:
    table = Table(show_header=False, box=None)
    for kind, size in plan.state.items():
        table.add_row(kind, _bytes(size))
    if not plan.problem:
        table.add_row("batch", _bytes(plan.batch))
        table.add_row("activations, temporaries", _bytes(plan.temporaries))
        table.add_row("memory", f"{_bytes(plan.memory)} of {_bytes(plan.room)}")
    return table


def _table(plan: Plan, steps: int) -> Table:
    table = _memory(plan)
    table.add_row("FLOPs of the model", f"{plan.flops:.3g}")
    table.add_row("HBM traffic", _bytes(plan.traffic))
    for kind in KINDS:
        calls = [one.sent for one in plan.collectives if one.kind == kind]
        if calls:
            table.add_row(f"{kind}, {len(calls)} a step", f"{_bytes(sum(calls))} sent")
    for what, seconds in plan.seconds().items():
        table.add_row(f"time of {what}", _time(seconds))
    table.add_row("step", f"{_time(plan.step_seconds)} at least, bound by {_bound(plan)}")
    table.add_row("MFU", f"{plan.mfu:.1%} at most")
    if steps:
        hours = steps * plan.step_seconds / 3600
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
