"""What a training step takes on devices that are not here: on a TPU the step itself, compiled by its own compiler; on
GPUs, whose compiler needs one, an estimate from the accounts that the models state."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from genrec_jax.config import Trial
from genrec_jax.data.schema import Schema
from genrec_jax.distributed.collectives import Collective, collectives, ring
from genrec_jax.distributed.mesh import context_of, make_mesh, placed, rows_of, share_of, shares, tensor_of
from genrec_jax.distributed.tables import boxes_for, lent_on
from genrec_jax.distributed.topology import Topology
from genrec_jax.errors import UserError
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import over_devices, rematerialised
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.estimate import abstract_batch, abstract_model, init_params
from genrec_jax.train.optimizer import is_table, make_optimizer, make_row_rule
from genrec_jax.train.rows import Place, lookups
from genrec_jax.train.rows import rows_of as rows_of_table
from genrec_jax.train.step import bind, init_state, make_step, pieces_here
from kernels_pallas.target import compiling_for


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on each device of a mesh.

    state: bytes of what it holds between steps, by kind. batch, temporaries: bytes beside it while it runs, by the
    compiler's account. flops: the model's own account (3 x forward), a device's share. traffic: bytes to and from
    HBM, by the compiler's account. problem: why it does not fit, in which case all after ``state`` is 0.
    """

    topology: Topology
    mesh: dict[str, int]
    state: dict[str, float]
    batch: float = 0.0
    temporaries: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    collectives: tuple[Collective, ...] = ()
    problem: str = ""

    @property
    def memory(self) -> float:
        """Bytes on a device while a step runs."""
        return sum(self.state.values()) + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return not self.problem and self.memory <= self.room

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(one.sent for one in self.collectives)

    @property
    def room(self) -> float:
        """Bytes of HBM of a device."""
        return self.topology.chip.memory / self.topology.chip.devices

    def seconds(self) -> dict[str, float]:
        """The least a step can take, by what takes it: products, HBM, links. They may run beside one another."""
        chip, share = self.topology.chip, self.topology.chip.devices
        return {
            "products": self.flops / (chip.flops / share),
            "HBM": self.traffic / (chip.bandwidth / share),
            "links": self.sent / (self.topology.links / share),
        }

    @property
    def step_seconds(self) -> float:
        """A bound from below: no step is shorter than its longest part."""
        return max(self.seconds().values())

    @property
    def mfu(self) -> float:
        """Of that bound: none can be higher."""
        return self.seconds()["products"] / self.step_seconds if self.step_seconds else 0.0


def plan_step(
    trial: Trial, schema: Schema, topology: Topology, sizes: dict[str, int], steps: int, remat: bool = False
) -> Plan:
    """Compiles the step that `genrec train` would run, for every device of the topology; nothing is allocated.

    ``steps``: of the trial, for the schedule of its learning rate. ``remat``: as of `train`. Call `topology.prepare`
    first. Raises UserError for a mesh that the topology or the batch cannot be divided by.
    """
    from jax.experimental import topologies

    _check_devices(sizes, topology)
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    with compiling_for("tpu"):
        return plan_on(make_mesh(sizes, found.devices), trial, schema, topology, steps, remat)


def plan_on(mesh: Mesh, trial: Trial, schema: Schema, topology: Topology, steps: int, remat: bool = False) -> Plan:
    """As :func:`plan_step`, for the devices of a mesh."""
    pieces = pieces_here(trial.train, mesh)
    model = _trained(trial, schema)
    model = over_devices(rematerialised(model) if remat else model, context_of(mesh), tensor_of(mesh))
    optimizer, rule = make_optimizer(trial.train, steps), make_row_rule(trial.train, steps)
    state = jax.eval_shape(lambda: init_state(init_params(trial, schema), optimizer, trial.seed, rule))
    there = jax.tree.map(_on, state, placed(mesh, state))
    rows = NamedSharding(mesh, rows_of(mesh))
    batch = jax.tree.map(lambda x: _on(x, rows), abstract_batch(trial, schema))
    held, sizes = _held(there), dict(mesh.shape)
    step: Any = make_step(model, optimizer, pieces, rule, mesh)
    try:
        compiled = step.lower(there, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(topology, sizes, held, problem=_reason(str(error)))
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Plan(
        topology,
        sizes,
        held,
        batch=memory.argument_size_in_bytes - sum(held.values()),
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=3.0 * model.cost(trial.data.shape).flops * trial.train.batch_rows / mesh.size,
        traffic=counted.get("bytes accessed", 0.0),
        collectives=collectives(compiled.as_text(), mesh.size),
    )


def _trained(trial: Trial, schema: Schema) -> Model:
    """The trial's abstract model, fit for its loss, which may need to know how popular items are; these numbers do not
    matter."""
    popularity = Popularity(np.ones(schema.items, np.int64)) if trial.model.goal == "retrieval" else None
    return abstract_model(trial, schema, popularity)


def estimated_step(
    trial: Trial, schema: Schema, topology: Topology, sizes: dict[str, int], steps: int, remat: bool = False
) -> Plan:
    """As :func:`plan_step`, for GPUs: nothing is compiled.

    The state is exact. Beside it a device holds the activations of its rows, as the blocks state them, the gradient,
    the whole of what is divided and gathered, and of large tables with a row-wise rule the rows at hand, their gradient
    and boxes of either. Traffic: activations and the state written once and read once, parameters read
    in either pass. Collectives: the hand count of docs/scaling_out.md. Raises UserError for what the
    accounts do not know: a context, a division of heads, rematerialisation.
    """
    _check_devices(sizes, topology)
    if remat or "context" in sizes or "model" in sizes:
        raise UserError(f"a plan for {topology.name} is an estimate that knows no --remat, no context and no model")
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    if trial.train.batch_rows % shares(mesh):
        raise UserError(f"train.batch_rows ({trial.train.batch_rows}) must be a multiple of {shares(mesh)}")
    optimizer, rule = make_optimizer(trial.train, steps), make_row_rule(trial.train, steps)
    state = jax.eval_shape(lambda: init_state(init_params(trial, schema), optimizer, trial.seed, rule))
    held = _held(jax.tree.map(_on, state, placed(mesh, state)))
    rows, model = trial.train.batch_rows // mesh.size, _trained(trial, schema)
    row = model.cost(trial.data.shape)
    asked = {} if rule is None else _asked(model, trial, schema, state.params, rows)
    lent = {path: asked.pop(path) for path in lent_on(mesh, state.params, asked)}
    by_axes = _by_axes(mesh, state.params, {**asked, **lent})
    for path, ids in asked.items():  # the rows of the whole batch, on every device
        count, width = rows_of_table(state.params, path).shape
        by_axes[()] = by_axes.get((), 0.0) + 4.0 * min(ids * mesh.size, count) * width
    found, borrowed = [], 0.0
    for axes, payload in by_axes.items():
        size = math.prod(mesh.shape[axis] for axis in axes)
        found += [("all-gather", size, payload), ("reduce-scatter", size, payload)] if axes else []
        found += [("all-reduce", mesh.size // size, payload / size)]
    for path, ids in lent.items():
        table = rows_of_table(state.params, path)
        boxes = boxes_for(mesh, ids, len(table))
        sent = boxes.devices * boxes.room
        for one in (4.0, float(table.dtype.itemsize * table.shape[1]), 4.0 * table.shape[1]):  # ids, rows, gradients
            found += [("all-to-all", boxes.devices, sent * one)]
        borrowed += 8.0 * (min(ids, len(table)) + sent) * table.shape[1]
    whole, activations = sum(by_axes.values()), row.activation_bytes * rows
    gradients = whole + sum(payload for axes, payload in by_axes.items() if axes) + borrowed
    return Plan(
        topology,
        sizes,
        held,
        batch=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract_batch(trial, schema)))
        / mesh.size,
        temporaries=activations + gradients,
        flops=3.0 * row.flops * rows,
        traffic=2.0 * activations + 2.0 * sum(held.values()) + 2.0 * whole + gradients,
        collectives=tuple(ring(kind, size, payload) for kind, size, payload in found if size > 1),
    )


def _asked(model: Model, trial: Trial, schema: Schema, params: Any, rows: int) -> dict[Place, int]:
    """How many rows a device that works on ``rows`` of a batch asks each table for, one asked twice counted twice."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), abstract_batch(trial, schema))
    asked = jax.eval_shape(lambda p, b: lookups(bind(model, p), b, nnx.Rngs(0, batch=1)), params, batch)
    return {path: ids.size for path, ids in asked.items()}


def _by_axes(mesh: AbstractMesh, params: Any, tables: Collection[Place]) -> dict[tuple[str, ...], float]:
    """Bytes, in float32, of the parameters without ``tables``, by the axes that divide them."""
    found: dict[tuple[str, ...], float] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if tuple(key.key for key in path[:-1]) not in tables:
            axes = tuple(jax.tree.leaves(tuple(share_of(mesh, x.shape, path))))
            found[axes] = found.get(axes, 0.0) + 4.0 * math.prod(x.shape)
    return found


def _check_devices(sizes: dict[str, int], topology: Topology) -> None:
    if math.prod(sizes.values()) != topology.devices:
        raise UserError(f"the mesh has {math.prod(sizes.values())} devices, {topology.name} has {topology.devices}")


def _on(x: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _held(state: Any) -> dict[str, float]:
    """Bytes on a device of a placed state, by kind."""
    kinds = {"parameters": 0.0, "tables": 0.0, "optimiser": 0.0, "optimiser of tables": 0.0}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        table, of_params = is_table(path) or "rows" in jax.tree_util.keystr(path[:2]), path[0].name == "params"
        kind = ("tables" if table else "parameters") if of_params else "optimiser of tables" if table else "optimiser"
        kinds[kind] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return kinds


def _reason(message: str) -> str:
    """Of the compiler, in a sentence."""
    needed = re.search(r"\(([0-9.]+[KMGT])\)\s+exceeds\s+available\s+HBM\s+\(([0-9.]+[KMGT])\)", message)
    if needed:
        return f"the activations and temporaries of a step alone take {needed[1]}iB of a device's {needed[2]}iB"
    used = re.search(r"Used ([0-9.]+[KMGT]) of ([0-9.]+[KMGT]) hbm", message)
    return f"a step takes {used[1]}iB of a device's {used[2]}iB" if used else message.strip().splitlines()[0][:200]
