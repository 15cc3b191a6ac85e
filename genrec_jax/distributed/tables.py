"""Large tables on a mesh: each of the devices that divide the rows of a batch owns a block of a table's rows, and lends
the others those that they ask for (as TorchRec's row-wise sharding does: Ivchenko et al., RecSys 2022).

A device asks for a row once, however often its part of the batch reads it. The owner sums what those who borrowed a row
return of its gradient, so that it counts once in the gradient's norm, and moves it. What a device sends and holds grows
with its own part of the batch, not with the whole, nor with the table.

Ids are dealt out over the blocks (`genrec_jax.nn.embedding.place_of`), so the rows that a device asks another for are
about as many as in a random draw. Every two devices exchange a box of rows whose size is known beforehand, an even
share and six standard deviations of such a draw. Where a box would overflow all the same, the rows are dealt into
several rounds by their places in the block, in which all devices take part: round k of R has the places p with p % R ==
k. So copies of a row that several devices borrowed come back in the same round. The boxes are padded, where
`jax.lax.ragged_all_to_all` would send no more than there is, for XLA has that on accelerators alone.

Devices along other axes of the mesh do the same exchange, each for itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from genrec_jax.distributed.collectives import SELDOM
from genrec_jax.distributed.mesh import gathered, lent_rows, row_axes, rows_of, shares, specs_of
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import divisions
from genrec_jax.train.rows import Holding, Place, RowRule, RowState, holding, key_of, move_held, name_of, with_rows
from genrec_jax.train.rows import rows_of as table_of

_TILE = 8  # a box is a multiple of as many rows


@dataclasses.dataclass(frozen=True)
class Boxes:
    """How ``devices`` along ``axes`` exchange rows of a table of which each owns a ``block``: ``room`` rows at a time
    between any two. Its methods are for functions inside `jax.shard_map`."""

    axes: tuple[str, ...]
    devices: int
    block: int
    room: int

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return self.devices * self.block

    def rounds(self, ids: jax.Array) -> jax.Array:
        """The smallest power of two of rounds in which no box of any device overflows; ``ids`` [U] as of `Lent`.

        There is one: in as many rounds as a block has rows each box has one row.
        """

        def overflow(boxes: jax.Array) -> jax.Array:
            """``boxes`` [U], ascending: the box of each row; -1 for none."""
            early, late = boxes[: -self.room], boxes[self.room :]
            return jax.lax.pmax(jnp.any((early == late) & (late >= 0)), self.axes)

        def of(rounds: jax.Array) -> jax.Array:
            return jnp.where(ids < self.rows, ids // self.block * rounds + ids % self.block % rounds, -1)

        def twice(found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return 2 * found[0], overflow(jnp.sort(of(2 * found[0])))

        one = jnp.ones((), jnp.int32)
        if len(ids) <= self.room:
            return one
        with jax.named_scope(SELDOM):  # with one round the rows are in order of their boxes
            return jax.lax.while_loop(lambda found: found[1], twice, (one, overflow(of(one))))[0]

    def slots(self, ids: jax.Array, rounds: jax.Array, number: jax.Array | int) -> jax.Array:
        """Where rows [U] stand in the boxes that a device sends in a round; past their end if not in this one."""
        taking = (ids < self.rows) & (ids % self.block % rounds == number)
        before = jnp.cumsum(taking) - taking
        owner = jnp.minimum(ids // self.block, self.devices - 1)
        firsts = jnp.searchsorted(ids, jnp.arange(self.devices, dtype=ids.dtype) * self.block)
        place = owner * self.room + before - before.at[firsts].get(mode="clip")[owner]
        return jnp.where(taking, place, self.devices * self.room).astype(jnp.int32)

    def send(self, x: jax.Array, slots: jax.Array, fill: int = 0) -> jax.Array:
        """x [U, ...] in boxes to their owners; what the others send: [devices x room, ...]."""
        boxes = jnp.full((self.devices * self.room, *x.shape[1:]), fill, x.dtype)
        return self.swap(boxes.at[slots].set(x, mode="drop"))

    def swap(self, boxes: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(boxes, self.axes, 0, 0, tiled=True)

    def ask(self, ids: jax.Array, slots: jax.Array) -> jax.Array:
        """The places in its own block that others ask a device for; ``block`` where a box is not full."""
        return self.send(ids % self.block, slots, self.block)

    def lend(self, table: jax.Array, wanted: jax.Array) -> jax.Array:
        """The rows that others want, to them; those that they lend. As bits: XLA would widen bfloat16 on the way."""
        rows = table.at[wanted].get(mode="clip")
        bits = jax.lax.bitcast_convert_type(rows, {2: jnp.uint16, 4: jnp.uint32}[rows.dtype.itemsize])
        return jax.lax.bitcast_convert_type(self.swap(bits), rows.dtype)

    def borrow(self, table: jax.Array, asked: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """table [block, D], asked [N] -> (ids [U], their rows [U, D], rounds, what others ask for in the first)."""
        ids = jnp.unique(asked.astype(jnp.int32), size=min(asked.size, self.rows), fill_value=self.rows)
        rounds = self.rounds(ids)

        def round_of(number: jax.Array | int, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            slots = self.slots(ids, rounds, number)
            wanted = self.ask(ids, slots)
            lent = self.lend(table, wanted)
            here = (slots < len(lent))[:, None]
            return jnp.where(here, lent.at[slots].get(mode="clip"), rows), wanted

        rows, wanted = round_of(0, jnp.zeros((len(ids), table.shape[1]), table.dtype))
        rows = _more(rounds, lambda number, rows: round_of(number, rows)[0], rows)
        return ids, rows, rounds, wanted

    def give_back(self, grads: jax.Array, slots: jax.Array, wanted: jax.Array) -> tuple[Holding, jax.Array]:
        """Which rows of its block a device gets gradients of in a round, and their sums [V, D]."""
        own = holding(wanted, self.block)
        sums = jnp.zeros((len(own.ids), grads.shape[1]), grads.dtype)
        return own, sums.at[jnp.searchsorted(own.ids, wanted)].add(self.send(grads, slots), mode="drop")

    def one_round(
        self, ids: jax.Array, grads: jax.Array, rounds: jax.Array, number: jax.Array | int
    ) -> tuple[Holding, jax.Array]:
        """:meth:`give_back` of a round whose askers are not known."""
        slots = self.slots(ids, rounds, number)
        return self.give_back(grads, slots, self.ask(ids, slots))


def _more[T](rounds: jax.Array, body: Callable[[jax.Array, T], T], start: T) -> T:
    """The rounds after the first; seldom any."""
    with jax.named_scope(SELDOM):
        return jax.lax.fori_loop(1, rounds, body, start)


def room_for(ids: int, devices: int, block: int) -> int:
    """Rows of a box, when a device asks for as many ``ids``."""
    even = ids / devices
    return min(block, -(-int(even + 6 * math.sqrt(even)) // _TILE) * _TILE)


def boxes_for(mesh: Mesh | AbstractMesh, ids: int, rows: int) -> Boxes:
    """``ids``: how many a device asks for; ``rows``: of the whole table."""
    devices = shares(mesh)
    return Boxes(row_axes(mesh), devices, rows // devices, room_for(ids, devices, rows // devices))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lent:
    """What the devices of a mesh have borrowed of one table; arrays are divided over them.

    ids [devices U] int32: the rows that each has at hand, by their places in the table, ascending, each once; past its
    end where a device has fewer. wanted [devices devices room]: what the others ask each for in the first round.
    rounds: of the exchange, a scalar.
    """

    ids: jax.Array
    wanted: jax.Array
    rounds: jax.Array
    boxes: Boxes = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Returned:
    """What owners got back of one table.

    grads [devices U, D]: of the rows at hand on the devices. own: the rows whose gradients came in the first round.
    rest [devices]: the norm of the gradients of those that come later.
    """

    grads: jax.Array
    own: Holding
    rest: jax.Array


def lent_on(mesh: Mesh | AbstractMesh | None, params: Any, paths: Iterable[Place]) -> list[Place]:
    """Which of the tables at ``paths`` the devices of a mesh lend each other."""
    if mesh is None:
        return []
    named = {path: (*map(jax.tree_util.DictKey, path), jax.tree_util.DictKey("rows_table")) for path in paths}
    return [path for path, place in named.items() if lent_rows(mesh, table_of(params, path).shape, place)]


def specs_with(mesh: Mesh, params: Any, lent: Iterable[Place]) -> tuple[Any, Any]:
    """How parameters with rows that are ``lent`` in place of tables are divided, and how far they are to be gathered:
    each device keeps the rows it has at hand."""
    specs = with_rows(specs_of(mesh, params), dict.fromkeys(lent, rows_of(mesh)))
    return specs, with_rows(specs, dict.fromkeys(lent, PartitionSpec()))


def asked_on(
    mesh: Mesh, model: Model, ask: Callable[..., Any], params: Any, takes: tuple[PartitionSpec, ...], *given: Any
) -> Any:
    """What ``ask(params, *given)`` says that the devices, each with its share of what is ``given``, ask tables for; see
    `genrec_jax.train.rows.asked_by`. Numbers of the parameters make no difference to it: none are read."""

    def local(*given: Any) -> Any:
        shapes, whole = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params), PartitionSpec()
        own = gathered(mesh, shapes, jax.tree.map(lambda _: whole, params), divisions(model))
        return ask(own, *given)

    return _on(mesh, local, takes, rows_of(mesh))(*given)


def borrow(mesh: Mesh, params: Any, asked: dict[Place, jax.Array]) -> tuple[Any, dict[Place, Lent]]:
    """The parameters with the rows that the devices ask for, float32 [devices U, D], in place of tables, and which.

    ``asked`` [pieces, N], divided over the devices: the rows that the pieces of a batch ask each table for.
    """
    lent, rows = {}, {}
    for path, ids in asked.items():
        table = table_of(params, path)
        boxes = boxes_for(mesh, ids.size // shares(mesh), len(table))

        def local(table: jax.Array, ids: jax.Array, boxes: Boxes = boxes) -> Any:
            return boxes.borrow(table, ids.reshape(-1))

        own, whole = rows_of(mesh), PartitionSpec()
        found = _on(mesh, local, (own, own), (own, own, whole, own))(table, ids)
        lent[path] = Lent(found[0], found[3], found[2], boxes)
        rows[path] = found[1].astype(jnp.float32)
    return with_rows(params, rows), lent


def give_back(mesh: Mesh, grads: Any, lent: dict[Place, Lent]) -> tuple[Any, dict[Place, Returned]]:
    """``grads`` with owners' sums [devices (V + 1), D] in place of the gradients of rows at hand. The last row of each
    device is not one of the table's: its norm is that of the rows that come in later rounds."""
    returned, sums = {}, {}
    for path, one in lent.items():

        def local(ids: jax.Array, wanted: jax.Array, rounds: jax.Array, grads: jax.Array, boxes: Boxes) -> Any:
            own, sums = boxes.give_back(grads, boxes.slots(ids, rounds, 0), wanted)

            def squares(number: jax.Array, before: jax.Array) -> jax.Array:
                return before + jnp.sum(jnp.square(boxes.one_round(ids, grads, rounds, number)[1]))

            rest = jnp.sqrt(_more(rounds, squares, jnp.zeros(())))
            last = jnp.zeros((1, sums.shape[1])).at[0, 0].set(rest)
            return own, jnp.concatenate([sums, last]), rest[None]

        own, whole = rows_of(mesh), PartitionSpec()
        exchange = _on(mesh, functools.partial(local, boxes=one.boxes), (own, own, whole, own), own)
        held, sums[path], rest = exchange(one.ids, one.wanted, one.rounds, table_of(grads, path))
        returned[path] = Returned(table_of(grads, path), held, rest)
    return with_rows(grads, sums), returned


def move_lent(
    mesh: Mesh,
    rule: RowRule,
    params: Any,
    states: dict[str, RowState],
    lent: dict[Place, Lent],
    returned: dict[Place, Returned],
    updates: Any,
    step: jax.Array,
    key: jax.Array,
) -> tuple[dict[Place, jax.Array], dict[str, RowState]]:
    """As `genrec_jax.train.rows.move_rows`, by the owners. ``updates``: what the optimiser made of the gradients of
    :func:`give_back`, each times one number."""
    moved, states = {}, dict(states)
    for path, one in lent.items():

        def local(
            table: jax.Array,
            state: RowState,
            lent: Lent,
            back: Returned,
            own: jax.Array,
            step: jax.Array,
            key: jax.Array,
        ) -> tuple[jax.Array, RowState]:
            boxes = lent.boxes
            first = jax.lax.axis_index(boxes.axes) * boxes.block
            rest = back.rest[0]
            factor = jnp.where(rest == 0, 0.0, own[-1, 0] / jnp.where(rest == 0, 1.0, rest))

            def later(number: jax.Array) -> tuple[Holding, jax.Array]:
                with jax.named_scope(SELDOM):
                    held, sums = boxes.one_round(lent.ids, back.grads, lent.rounds, number)
                return held, factor * sums

            def move(number: jax.Array, moved: tuple[jax.Array, RowState]) -> tuple[jax.Array, RowState]:
                held, sums = jax.lax.cond(number == 0, lambda _: (back.own, own[:-1]), later, number)
                return move_held(rule, *moved, held, sums, step, key, first)

            # All rounds in one loop: what it hands on in the host's memory a TPU's compiler works on in place.
            return jax.lax.fori_loop(0, lent.rounds, move, (table, state))

        named, own, whole = name_of(path), rows_of(mesh), PartitionSpec()
        of_lent = jax.tree.map(lambda x, of=(whole, own): of[x.ndim], one)
        specs = (own, own, of_lent, own, own, whole, whole)
        moved[path], states[named] = _on(mesh, local, specs, own)(
            table_of(params, path),
            states[named],
            one,
            returned[path],
            table_of(updates, path),
            step,
            key_of(key, path),
        )
    return moved, states


def _on(mesh: Mesh, local: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
    return jax.shard_map(local, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)
