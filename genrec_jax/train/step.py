"""The state of a trial and its one training step, alone or for several trials at once."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec, Sharding

from genrec_jax.batch import Batch
from genrec_jax.config import TrainConfig
from genrec_jax.distributed.host import KIND
from genrec_jax.distributed.mesh import gathered, placed, row_axes, rows_of, shares, summed
from genrec_jax.distributed.tables import Lent, Returned, asked_on, borrow, give_back, lent_on, move_lent, specs_with
from genrec_jax.errors import UserError
from genrec_jax.models.mup import rates
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import divisions
from genrec_jax.train.optimizer import Scalars, make_optimizer, make_row_rule, update_in_parts
from genrec_jax.train.rows import Holding, Place, RowRule, hold_rows, lookups, move_rows, row_states, told, with_rows
from genrec_jax.train.rows import rows_of as rows_at
from kernels_pallas.target import target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """params: parameters (float32); opt: optimiser state; step: scalar int32; key: of dropout and sampling."""

    params: Any
    opt: Any
    step: jax.Array
    key: jax.Array


Metrics = dict[str, jax.Array]
Step = Callable[[State, Batch], tuple[State, Metrics]]
TrialStep = Callable[[State, Batch, Scalars], tuple[State, Metrics]]


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int, tables: RowRule | None = None) -> State:
    """``tables``: the row-wise rule of the embedding tables, whose states then stand beside the optimiser's."""
    opt = jax.jit(optimizer.init)(params)
    if tables is not None:
        opt = {"dense": opt, "rows": jax.jit(functools.partial(row_states, tables))(params)}
    return State(params, opt, jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed)))


def placed_state(make: Callable[[], State], mesh: Mesh | None, *, offload: bool = False) -> State:
    """The state that ``make`` makes; on a mesh each device makes its own share, so that it is nowhere whole.

    ``offload``: as of :func:`genrec_jax.distributed.mesh.placed`. What goes to the host's memory is not made on a
    device, which may have no room for it: optimisers begin with zeros.
    """
    if mesh is None and not offload:
        return make()
    shapes = jax.eval_shape(make)
    leaves, tree = jax.tree.flatten(shapes)
    where = jax.tree.leaves(placed(mesh, shapes, offload=offload))
    here = [sharding for sharding in where if sharding.memory_kind != KIND]

    def those_here() -> list[jax.Array]:
        return [x for x, sharding in zip(jax.tree.leaves(make()), where) if sharding.memory_kind != KIND]

    made = iter(jax.jit(those_here, out_shardings=here)())
    return jax.tree.unflatten(
        tree, [_zeros(x, own) if own.memory_kind == KIND else next(made) for x, own in zip(leaves, where)]
    )


def _zeros(like: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    share = np.zeros(sharding.shard_shape(like.shape), like.dtype)
    return jax.make_array_from_callback(like.shape, sharding, lambda _: share)


def bind[M: Model](model: M, params: Any) -> M:
    """The model (abstract or not) with ``params`` in place of its own, without touching the original."""
    state: Any = nnx.split(model, nnx.Param, ...)
    graph, own, rest = state
    nnx.replace_by_pure_dict(own, params)
    return nnx.merge(graph, own, rest)


def pieces_here(train: TrainConfig, mesh: Mesh | None = None) -> int:
    """Parts of a batch: those that a CPU works on one after another (an accelerator takes the batch whole), and as many
    for every device of a mesh. Raises UserError if the batch cannot be divided into them."""
    pieces = math.lcm(train.pieces if target() == "cpu" else 1, shares(mesh))
    if train.batch_rows % pieces:
        raise UserError(
            f"train.batch_rows ({train.batch_rows}) must be a multiple of {pieces} on a mesh of {shares(mesh)}"
        )
    return pieces


def make_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    pieces: int = 1,
    tables: RowRule | None = None,
    mesh: Mesh | None = None,
    where: Any = None,
) -> Step:
    """The jitted :func:`training_step`; the given state is consumed. ``where``: as of :func:`jitted`."""
    step: Step = jitted(training_step(model, optimizer, pieces, tables, mesh), where)
    return step


def jitted(step: Callable[..., Any], where: Any = None) -> Any:
    """The compiled step; the given state is consumed. ``where``: the shardings of a state of which a part lies in the
    host's memory, for the next one; None for a state on the devices."""
    return jax.jit(step, donate_argnums=0, out_shardings=where and (where, None))


def trial_step(model: Model, config: TrainConfig, steps: int, mesh: Mesh | None = None) -> TrialStep:
    """(state, batch, scalars) -> as of :func:`training_step`, for a trial of ``steps`` steps; not jitted.

    Trials that differ in seed and :data:`genrec_jax.train.optimizer.SCALARS` alone share it, and so one compilation.
    """

    def step(state: State, batch: Batch, scalars: Scalars) -> tuple[State, Metrics]:
        own = dataclasses.replace(config, **scalars)
        optimizer, rule = make_optimizer(own, steps, factors), make_row_rule(own, steps, factors)
        return training_step(model, optimizer, pieces_here(own, mesh), rule, mesh)(state, batch)

    factors = rates(model)
    return step


def training_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    pieces: int = 1,
    tables: RowRule | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """(state, batch) -> (next state, {loss: mean per target, targets, grad_norm}).

    ``pieces`` > 1 sums the gradient over that many equal parts of the batch, each with its own draws of dropout and
    negatives. One device works on them one after another, so that a part's activations stay in a CPU's caches, and
    skips a part without events. The mean is over the targets of the whole batch.
    ``tables``: the row-wise rule of the embedding tables; None if they are the optimiser's.
    ``mesh``: its devices share the pieces, whose number must be a multiple of theirs, and the state, as
    :func:`genrec_jax.distributed.mesh.placed` says; the numbers are those of one device with as many pieces, but for
    the order of the sums.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        parts = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
        keys = jax.random.split(key, pieces) if pieces > 1 else key[None]
        params = state.params
        held: dict[Place, Holding] = {}
        lent: dict[Place, Lent] = {}
        back: dict[Place, Returned] = {}
        if tables is not None:
            ids = _asked(model, params, key, parts, keys, mesh)
            far = lent_on(mesh, params, ids)
            params, held = hold_rows(params, {path: own for path, own in ids.items() if path not in far})
            if mesh is not None:
                params, lent = borrow(mesh, params, {path: ids[path] for path in far})
        near = {path: own.ids for path, own in held.items()}
        if mesh is None:
            (total, targets), grads = _summed(model, params, near, key, parts, keys)
        else:
            at_hand = {path: own.ids for path, own in lent.items()}
            (total, targets), grads = _summed_on(mesh, model, params, near, at_hand, key, parts, keys)
            grads, back = give_back(mesh, grads, lent)
        share = 1.0 / jnp.maximum(targets, 1)
        grads = jax.tree.map(lambda g: g * share, grads)
        kept = state.opt if tables is None else state.opt["dense"]
        updates, opt = update_in_parts(optimizer, grads, kept, params)
        moved = optax.apply_updates(with_rows(params, {path: rows_at(updates, path) for path in lent}), updates)
        if tables is not None:
            own = jax.random.fold_in(key, 2)
            new, rows = move_rows(tables, state.params, state.opt["rows"], held, updates, state.step, own)
            moved, opt = with_rows(moved, new), {"dense": opt, "rows": rows}
            if mesh is not None:
                new, rows = move_lent(mesh, tables, state.params, rows, lent, back, updates, state.step, own)
                moved, opt = with_rows(moved, new), {**opt, "rows": rows}
        metrics = {"loss": total * share, "targets": targets, "grad_norm": optax.tree.norm(grads)}
        after = State(moved, opt, state.step + 1, state.key)
        return after if mesh is None else jax.lax.with_sharding_constraint(after, placed(mesh, after)), metrics

    return step


def _rngs(key: jax.Array, own: jax.Array) -> nnx.Rngs:
    """Of the piece whose key is ``own``, in a batch whose key is ``key``.

    Made where they are used: their counters may only change at the trace level that made them. The stream "batch" is
    for what all pieces of a batch have in common.
    """
    return nnx.Rngs(own, batch=jax.random.fold_in(key, 1))


def _asked(
    model: Model, params: Any, key: jax.Array, parts: Batch, keys: jax.Array, mesh: Mesh | None
) -> dict[Place, jax.Array]:
    """The rows [pieces, N] that the pieces ask each table for."""

    def ask(params: Any, key: jax.Array, parts: Batch, keys: jax.Array) -> dict[Place, jax.Array]:
        # Bound where it is used: what a model holds may only change at the trace level that made it.
        return jax.lax.map(lambda part: lookups(bind(model, params), part[0], _rngs(key, part[1])), (parts, keys))

    if mesh is None:
        return ask(params, key, parts, keys)
    return asked_on(mesh, model, ask, params, (PartitionSpec(), rows_of(mesh), rows_of(mesh)), key, parts, keys)


_Sums = tuple[tuple[jax.Array, jax.Array], Any]


def _summed(
    model: Model,
    params: Any,
    held: dict[Place, jax.Array],
    key: jax.Array,
    parts: Batch,
    keys: jax.Array,
    whole: Callable[[Any], Any] = lambda params: params,
) -> _Sums:
    """((sum of losses, targets), gradient) over pieces [pieces, rows, ...]; ``held``: the ids of the rows that stand in
    place of tables; ``whole``: what makes parameters of the ``params``, by which the gradient is taken."""

    def total_loss(params: Any, part: Batch, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        return told(bind(model, whole(params)), held).loss(part, _rngs(key, own))

    gradient = jax.value_and_grad(total_loss, has_aux=True)

    def add(summed: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        rows = part[0]
        events = jnp.any(rows.history.segment > 0) | jnp.any(rows.candidates.segment > 0)
        more = functools.partial(jax.tree.map, jnp.add, summed)
        return jax.lax.cond(events, lambda: more(gradient(params, *part)), lambda: summed), None

    if len(keys) == 1:
        return gradient(params, jax.tree.map(lambda x: x[0], parts), keys[0])
    zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, (parts, keys))[0]


def _summed_on(
    mesh: Mesh,
    model: Model,
    params: Any,
    held: dict[Place, jax.Array],
    lent: dict[Place, jax.Array],
    *arguments: Any,
) -> _Sums:
    """As :func:`_summed`, by the devices of a mesh; ``lent``: the ids of rows that stand in place of tables, others on
    every device, and so are their gradients."""
    rows, all_of_it = rows_of(mesh), PartitionSpec()
    specs, gathers = specs_with(mesh, params, lent)
    whole = functools.partial(gathered, mesh, specs=gathers, divided=divisions(model))

    def local(
        params: Any, held: dict[Place, jax.Array], lent: dict[Place, jax.Array], key: Any, parts: Batch, keys: Any
    ) -> _Sums:
        sums, grads = _summed(model, params, {**held, **lent}, key, parts, keys, whole)
        return jax.lax.psum(sums, row_axes(mesh)), summed(mesh, grads, specs)

    on_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    takes = (specs, all_of_it, rows, all_of_it, rows, rows)
    return on_mesh(local, in_specs=takes, out_specs=(all_of_it, specs))(params, held, lent, *arguments)
