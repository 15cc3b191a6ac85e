"""What training steps and scorings take on GPUs that are not here: estimates from the models' own accounts."""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from genrec_jax.batch import Shape
from genrec_jax.config import Trial
from genrec_jax.data.pipeline import evaluation_shape
from genrec_jax.data.schema import Schema
from genrec_jax.distributed.collectives import Collective, ring
from genrec_jax.distributed.mesh import along, context_of, row_axes, share_of, shares, tensor_of
from genrec_jax.distributed.plan import PROGRAMS, Plan, Program, check_devices, held, scoring_on, state_on, trained
from genrec_jax.distributed.tables import boxes_for, lent_on
from genrec_jax.distributed.tensor import place
from genrec_jax.distributed.topology import NODE, Topology
from genrec_jax.errors import UserError
from genrec_jax.models.base import Ranker
from genrec_jax.nn.cost import Exchange
from genrec_jax.nn.stack import divisions, over_devices, rematerialised
from genrec_jax.train.estimate import abstract_batch, corpus, scoring_flops
from genrec_jax.train.evaluate import users_at_once
from genrec_jax.train.rows import Place, asked_by, lookups
from genrec_jax.train.rows import rows_of as rows_of_table
from genrec_jax.train.step import bind


def estimated_plans(
    trial: Trial,
    schema: Schema,
    topology: Topology,
    sizes: dict[str, int],
    steps: int,
    remat: bool = False,
    programs: Sequence[Program] = PROGRAMS,
) -> list[Plan]:
    """As `genrec_jax.distributed.plan.compiled_plans`, for GPUs: nothing is compiled.

    The state is exact, and what devices send is the hand count of docs/scaling_out.md. Beside the state a device holds:

    - in training the activations of its rows, as the blocks state them, the gradient, the whole of what is divided and
      gathered, and of large tables with a row-wise rule the rows at hand, their gradient and boxes of either; of a
      retriever also the vectors of all items, or of those at hand, with their gradient. Traffic: activations written
      once and read once, and once more written where they are computed again; the state, too; parameters read in
      either pass.
    - in scoring no more activations than rematerialisation keeps, what is gathered, and a retriever's vectors of all
      items with some users' scores of them. Traffic: activations and items written once and read as often as used.
    """
    check_devices(sizes, topology)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    if trial.train.batch_rows % shares(mesh):
        raise UserError(f"train.batch_rows ({trial.train.batch_rows}) must be a multiple of {shares(mesh)}")
    shape = {"training": trial.data.shape, "scoring": evaluation_shape(trial.data, trial.model.goal)}
    state = state_on(mesh, trial, schema, steps)
    plan = Plan(topology, sizes, held(state))
    found = []
    for one in programs:
        device = _Device(trial, schema, topology, mesh, shape[one], state.params)
        found.append(device.training(plan, remat=remat) if one == "training" else device.scoring(plan))
    return found


class _Device:
    """A device's part of a program, on its rows of a batch; what devices send meanwhile gathers in ``collectives``."""

    def __init__(
        self,
        trial: Trial,
        schema: Schema,
        topology: Topology,
        mesh: AbstractMesh,
        shape: Shape,
        params: Any,
    ):
        self._trial, self._topology, self._mesh, self._shape = trial, topology, mesh, shape
        self._rows = trial.train.batch_rows // shares(mesh)
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self._batch = abstract_batch(schema, shape, self._rows)
        self._tasks = len(schema.tasks)
        self._alone = trained(trial, schema)
        self._model = over_devices(trained(trial, schema), context_of(mesh), tensor_of(mesh))
        self._full = self._model.cost(shape)
        self._least = rematerialised(self._model).cost(shape)
        self.collectives: list[Collective] = []

    def training(self, plan: Plan, *, remat: bool) -> Plan:
        cost, whole_state = self._least if remat else self._full, self._trial.train.embedding_optimizer == "adamw"
        asked = {} if whole_state else self._asked(lambda m, batch: lookups(m, batch, nnx.Rngs(0, batch=1)))
        lent, borrowed = self._lend(asked, backward=True)
        used, copies = self._parameters(asked, backward=True)
        at_hand = {path: ids * (1 if path in lent else shares(self._mesh)) for path, ids in asked.items()}
        for path in (path for path in asked if path not in lent):  # the rows of the whole batch, on every device
            count, width = rows_of_table(self._params, path).shape
            size = 4.0 * min(at_hand[path], count) * width
            self._send("all-reduce", row_axes(self._mesh), size)
            used += size
        if not isinstance(self._alone, Ranker):  # the vectors of items, and their gradient
            items, width = corpus(self._alone)
            shared_rows = self._trial.model.item_rows > 0
            used += 8.0 * width * (items if shared_rows else min([items, *at_hand.values()]))
        self._exchange(cost.exchanges, backward=True)
        activations, full = (one.activation_bytes * self._rows for one in (cost, self._full))
        gradients = used + copies + borrowed
        moved = sum(plan.state.values()) if whole_state else plan.state["parameters"] + plan.state["optimiser"]
        flops = 3.0 * self._alone.cost(self._shape).flops * self._rows * shares(self._mesh) / self._mesh.size
        return dataclasses.replace(
            plan,
            batch=self._batch_bytes(),
            temporaries=activations + gradients,
            flops=flops,
            more_flops=(3.0 * self._full.flops + cost.again_flops) * self._rows - flops,
            traffic=2.0 * full + (full - activations) + 2.0 * moved + 2.0 * used + gradients,
            collectives=tuple(self.collectives),
        )

    def scoring(self, plan: Plan) -> Plan:
        mesh, users = self._mesh, self._rows * self._shape.segments
        plan = scoring_on(plan, mesh, self._alone, self._shape, self._rows * shares(mesh), self._params)
        asked = self._asked(lambda m, batch: asked_by(m, lambda: m(batch))) if isinstance(self._alone, Ranker) else {}
        lent, borrowed = self._lend(asked, backward=False)
        used, copies = self._parameters(lent, backward=False)
        self._exchange(self._full.exchanges, backward=False)
        activations, full = (one.activation_bytes * self._rows for one in (self._least, self._full))
        traffic = 2.0 * full + used + copies + borrowed + plan.state["parameters"]
        if isinstance(self._alone, Ranker):
            scores = 4.0 * self._rows * self._shape.slots * self._tasks
        else:
            items, width = corpus(self._alone)
            at_once = min(users, users_at_once(items))
            vectors = 4.0 * items * width
            activations += vectors + 4.0 * items * at_once
            traffic += vectors * (1 + math.ceil(users / at_once)) + 2 * 4.0 * items * users
            scores = 4.0 * users
        self._send("all-gather", row_axes(mesh), scores * shares(mesh))
        return dataclasses.replace(
            plan,
            batch=self._batch_bytes(),
            temporaries=activations + copies + borrowed,
            more_flops=scoring_flops(self._model, self._shape) * self._rows - plan.flops,
            traffic=traffic,
            collectives=tuple(self.collectives),
        )

    def _send(self, kind: str, axes: Iterable[str], payload: float) -> None:
        """One collective among the devices along ``axes``; those along the last axes of a mesh stand side by side."""
        sizes, over = dict(self._mesh.shape), tuple(axis for axis in axes if axis in self._mesh.shape)
        group = math.prod(sizes[axis] for axis in over)
        if group > 1 and payload:
            order = list(sizes)
            span = math.prod(sizes[axis] for axis in order[min(map(order.index, over)) :])
            found = ring(kind, group, payload, between_nodes=self._topology.chip.gpu and span > NODE)
            self.collectives.append(found)

    def _exchange(self, exchanges: Iterable[Exchange], *, backward: bool) -> None:
        """What the blocks state, for the rows of a device."""
        for one in exchanges:
            self._send(one.kind, (one.axis,), self._rows * one.forward)
            if backward:
                self._send(one.kind, (one.axis,), self._rows * one.backward)

    def _parameters(self, without: Collection[Place], *, backward: bool) -> tuple[float, float]:
        """Gathers all parameters but the tables ``without``, and sums their gradients: (bytes that a device computes
        with, bytes of those among them that it holds no more than a share of)."""
        mesh, devices = self._mesh, self._mesh.shape.get("model", 1)
        apart, sent, used, copies = divisions(self._model), collections.Counter[tuple[str, tuple[str, ...]]](), 0.0, 0.0
        for path, x in jax.tree_util.tree_leaves_with_path(self._params):
            names, spec = place(path), share_of(mesh, x.shape, path)
            if names[:-1] in without:
                continue
            over = tuple(axis for axis in row_axes(mesh) if along(spec, axis) is not None)
            taken, stored = names in apart, along(spec, "model") is not None
            size = math.prod(x.shape) * (4.0 if backward else x.dtype.itemsize)
            share, own = size / (devices if stored else 1), size / (devices if taken else 1)
            used, copies = used + own, copies + own * bool(over or stored)
            sent["all-gather", over] += share
            if stored:
                sent["all-to-all" if taken else "all-gather", ("model",)] += own
            if not backward:
                continue
            sent["reduce-scatter", over] += share
            others = tuple(axis for axis in row_axes(mesh) if axis not in over)
            sent["all-reduce", others] += share / math.prod(mesh.shape[axis] for axis in over)
            if taken:
                sent["all-to-all" if stored else "all-gather", ("model",)] += own if stored else size
            if "blocks" in names:
                sent["all-reduce", ("context",)] += own
            if names[-2:-1] == ("bias",):  # of relative positions and times: every device has some of the heads
                sent["all-reduce", ("model",)] += size
        for (kind, axes), payload in sent.items():
            self._send(kind, axes, payload)
        return used, copies

    def _asked(self, ask: Any) -> dict[Place, int]:
        """How many rows a device asks each table for, one asked twice counted twice; ``ask``: of (model, batch)."""
        found = jax.eval_shape(lambda p, batch: ask(bind(self._alone, p), batch), self._params, self._batch)
        return {path: ids.size for path, ids in found.items()}

    def _lend(self, asked: dict[Place, int], *, backward: bool) -> tuple[list[Place], float]:
        """Which of the tables are lent, and the bytes of the rows at hand and of boxes; of their gradients, too."""
        borrowed, lent = 0.0, lent_on(self._mesh, self._params, asked)
        for path in lent:
            table = rows_of_table(self._params, path)
            count, width = table.shape
            boxes = boxes_for(self._mesh, asked[path], count)
            sent = boxes.devices * boxes.room
            # Ids, rows, gradients.
            for number in (4.0, float(table.dtype.itemsize * width), 4.0 * width * backward):
                self._send("all-to-all", boxes.axes, sent * number)
            borrowed += 4.0 * (1 + backward) * (min(asked[path], count) + sent) * width
        return lent, borrowed

    def _batch_bytes(self) -> float:
        return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self._batch)))
