"""What training steps and scorings take on devices that are not here: on a TPU the programs themselves, compiled by its
own compiler. GPUs, whose compiler needs one, are in genrec_jax/distributed/estimates.py."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from genrec_jax.batch import Batch, Shape
from genrec_jax.config import Trial
from genrec_jax.data.pipeline import evaluation_shape
from genrec_jax.data.schema import Schema
from genrec_jax.distributed.collectives import Collective, collectives
from genrec_jax.distributed.host import KIND
from genrec_jax.distributed.mesh import context_of, make_mesh, placed, rows_of, share_of, tensor_of
from genrec_jax.distributed.tables import lent_on
from genrec_jax.distributed.tensor import place
from genrec_jax.distributed.topology import ADAPTER, Topology
from genrec_jax.errors import UserError
from genrec_jax.models.base import Ranker
from genrec_jax.models.mup import rates
from genrec_jax.models.registry import Model
from genrec_jax.nn.embedding import tables
from genrec_jax.nn.stack import over_devices, rematerialised
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.estimate import abstract_batch, abstract_model, init_params, scoring_flops
from genrec_jax.train.evaluate import batch_rows, scoring
from genrec_jax.train.optimizer import is_table, make_optimizer, make_row_rule
from genrec_jax.train.step import State, init_state, make_step, pieces_here
from kernels_pallas.target import compiling_for

Program = Literal["training", "scoring"]
PROGRAMS: tuple[Program, ...] = ("training", "scoring")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program on each device of a mesh: a training step, or the scoring of an evaluation's batch, beside which the
    trial's state stays where it is.

    state: bytes of what it holds between steps, by kind. host: bytes of what the host's memory holds instead. batch,
    temporaries: bytes beside the state while it runs, by the compiler's account. gathered: bytes of divided tables that
    every device has whole meanwhile, among the temporaries (of a scoring). flops: the model's own account (3 x forward;
    of a scoring 1 x), a device's share. more_flops: what a device computes beside them, with others alike or once more
    (estimates alone). traffic: bytes to and from HBM, by the compiler's account. requests: that a batch to be scored
    holds, on all devices together. problem: why it does not fit, in which case the others after ``gathered`` are 0.
    """

    topology: Topology
    mesh: dict[str, int]
    state: dict[str, float]
    host: float = 0.0
    batch: float = 0.0
    temporaries: float = 0.0
    gathered: float = 0.0
    flops: float = 0.0
    more_flops: float = 0.0
    traffic: float = 0.0
    collectives: tuple[Collective, ...] = ()
    requests: int = 0
    problem: str = ""

    @property
    def memory(self) -> float:
        """Bytes on a device while the program runs."""
        return sum(self.state.values()) + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return not self.problem and self.memory <= self.room

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.sent for one in self.collectives)

    @property
    def room(self) -> float:
        """Bytes of HBM of a device."""
        return self.topology.chip.memory / self.topology.chip.devices

    def seconds(self) -> dict[str, float]:
        """The least the program can take, by what takes it: products, HBM, links. They may run beside one another."""
        chip, share = self.topology.chip, self.topology.chip.devices
        links = sum(one.sent / (ADAPTER if one.between_nodes else chip.links / share) for one in self.collectives)
        return {
            "products": (self.flops + self.more_flops) / (chip.flops / share),
            "HBM": self.traffic / (chip.bandwidth / share),
            "links": links,
        }

    @property
    def least_seconds(self) -> float:
        """A bound from below: no program is shorter than its longest part."""
        return max(self.seconds().values())

    @property
    def mfu(self) -> float:
        """Of that bound: none can be higher."""
        own = self.flops / (self.topology.chip.flops / self.topology.chip.devices)
        return own / self.least_seconds if self.least_seconds else 0.0

    @property
    def requests_per_second(self) -> float:
        """Of that bound, on all devices together: none can be higher."""
        return self.requests / self.least_seconds if self.least_seconds else 0.0


def compiled_plans(
    trial: Trial,
    schema: Schema,
    topology: Topology,
    sizes: dict[str, int],
    steps: int,
    remat: bool = False,
    offload: bool = False,
    programs: Sequence[Program] = PROGRAMS,
) -> list[Plan]:
    """Compiles what `genrec train` would run, for every device of the topology; nothing is allocated.

    ``steps``: of the trial, for the schedule of its learning rate. ``remat``, ``offload``: as of `train`. Call
    `topology.prepare` first. Raises UserError for a mesh that the topology or the batch cannot be divided by.
    """
    from jax.experimental import topologies

    check_devices(sizes, topology)
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    with compiling_for("tpu"):
        return plans_on(make_mesh(sizes, found.devices), trial, schema, topology, steps, remat, offload, programs)


def plans_on(
    mesh: Mesh,
    trial: Trial,
    schema: Schema,
    topology: Topology,
    steps: int,
    remat: bool = False,
    offload: bool = False,
    programs: Sequence[Program] = PROGRAMS,
) -> list[Plan]:
    """As :func:`compiled_plans`, for the devices of a mesh."""
    alone, model = trained(trial, schema), trained(trial, schema)
    model = over_devices(rematerialised(model) if remat else model, context_of(mesh), tensor_of(mesh))
    state = state_on(mesh, trial, schema, steps, offload=offload)
    where = jax.tree.map(lambda x: x.sharding, state) if offload else None
    plan = Plan(topology, dict(mesh.shape), held(state), held_by_host(state))
    rows = NamedSharding(mesh, rows_of(mesh))
    drafts: list[tuple[Plan, Any]] = []
    for program in programs:
        step: Any
        if program == "training":
            shape, number = trial.data.shape, trial.train.batch_rows
            factors = rates(model)
            optimizer, rule = make_optimizer(trial.train, steps, factors), make_row_rule(trial.train, steps, factors)
            step = make_step(model, optimizer, pieces_here(trial.train, mesh), rule, mesh, where)
            draft = dataclasses.replace(plan, flops=3.0 * alone.cost(shape).flops * number / mesh.size)
        else:
            shape, number = evaluation_shape(trial.data, trial.model.goal), batch_rows(trial.train, mesh)
            step = _beside_state(scoring(model, mesh))
            draft = scoring_on(plan, mesh, alone, shape, number, state.params)
        batch = jax.tree.map(lambda x: _on(x, rows), abstract_batch(schema, shape, number))
        drafts.append((draft, step.lower(state, batch)))
    with ThreadPoolExecutor(len(drafts)) as pool:  # the compiler leaves cores idle
        return list(pool.map(lambda draft: _compiled(*draft), drafts))


def _beside_state(score: Callable[[Any, Batch], jax.Array]) -> Any:
    """(state, batch) -> scores: what is not read of the state takes its room all the same."""
    return jax.jit(lambda state, batch: score(state.params, batch), keep_unused=True)


def _compiled(draft: Plan, lowered: Any) -> Plan:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(draft, flops=0.0, problem=_reason(str(error)))
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return dataclasses.replace(
        draft,
        batch=memory.argument_size_in_bytes - sum(draft.state.values()),
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        traffic=counted.get("bytes accessed", 0.0),
        collectives=collectives(compiled.as_text(), math.prod(draft.mesh.values())),
    )


def scoring_on(plan: Plan, mesh: Mesh | AbstractMesh, model: Model, shape: Shape, rows: int, params: Any) -> Plan:
    """The plan of a scoring of ``rows`` of a ``shape``, as far as it is known without a compiler. ``model``: told of no
    devices."""
    lent = lent_on(mesh, params, tables(model)) if isinstance(model, Ranker) else ()
    whole = [
        math.prod(x.shape) * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if is_table(path) and place(path)[:-1] not in lent and share_of(mesh, x.shape, path) != PartitionSpec()
    ]
    flops = scoring_flops(model, shape) * rows / mesh.size
    return dataclasses.replace(plan, gathered=float(sum(whole)), flops=flops, requests=rows * shape.segments)


def trained(trial: Trial, schema: Schema) -> Model:
    """The trial's abstract model, fit for its loss, which may need to know how popular items are; these numbers do not
    matter."""
    popularity = Popularity(np.ones(schema.items, np.int64)) if trial.model.goal == "retrieval" else None
    return abstract_model(trial, schema, popularity)


def state_on(mesh: Mesh | AbstractMesh, trial: Trial, schema: Schema, steps: int, *, offload: bool = False) -> State:
    """The shapes of a trial's state, and where they are."""
    optimizer, rule = make_optimizer(trial.train, steps), make_row_rule(trial.train, steps)
    state = jax.eval_shape(lambda: init_state(init_params(trial, schema), optimizer, trial.seed, rule))
    return jax.tree.map(_on, state, placed(mesh, state, offload=offload))


def check_devices(sizes: dict[str, int], topology: Topology) -> None:
    """Raises UserError for a mesh of another number of devices."""
    if math.prod(sizes.values()) != topology.devices:
        raise UserError(f"the mesh has {math.prod(sizes.values())} devices, {topology.name} has {topology.devices}")


def _on(x: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def held(state: Any) -> dict[str, float]:
    """Bytes on a device of a placed state, by kind."""
    kinds = {"parameters": 0.0, "tables": 0.0, "optimiser": 0.0, "optimiser of tables": 0.0}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.sharding.memory_kind == KIND:
            continue
        table, of_params = is_table(path) or "rows" in jax.tree_util.keystr(path[:2]), path[0].name == "params"
        kind = ("tables" if table else "parameters") if of_params else "optimiser of tables" if table else "optimiser"
        kinds[kind] += _share(x)
    return kinds


def held_by_host(state: Any) -> float:
    """Bytes of a device's share that lie in the host's memory."""
    return sum(_share(x) for x in jax.tree.leaves(state) if x.sharding.memory_kind == KIND)


def _share(x: jax.ShapeDtypeStruct) -> float:
    assert x.sharding is not None
    return float(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)


def _reason(message: str) -> str:
    """Of the compiler, in a sentence."""
    needed = re.search(r"\(([0-9.]+[KMGT])\)\s+exceeds\s+available\s+HBM\s+\(([0-9.]+[KMGT])\)", message)
    if needed:
        return f"its activations and temporaries alone take {needed[1]}iB of a device's {needed[2]}iB"
    used = re.search(r"Used ([0-9.]+[KMGT]) of ([0-9.]+[KMGT]) hbm", message)
    return f"it takes {used[1]}iB of a device's {used[2]}iB" if used else message.strip().splitlines()[0][:200]
