"""Writes a synthetic world as a dataset folder, block of users by block, each into its place in the columns.

Beside the usual columns the folder holds ``truth/type.npy`` [U, G], the types of a user in each domain,
``truth/state.npy`` [E], type * S + interest in the domain of the event's item, and ``truth.json``: the world's
parameters, the shard, and the floors on the test part of the standard time split.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.sequences import FORMAT, Sequences, load, write_manifest
from genrec_jax.data.splits import split_by_time
from genrec_jax.data.synthetic.bayes import Truth, read_world, truths
from genrec_jax.data.synthetic.exact import Stream, log
from genrec_jax.data.synthetic.tables import Items, Labels, Popularity, item_tables, label_tables, popularity_periods
from genrec_jax.data.synthetic.world import LONGEST, SESSION_GAP, SHORT_GAP, World
from genrec_jax.data.work import Advance, Task, making
from genrec_jax.errors import UserError

__all__ = ["FLOOR_HISTORIES", "Floors", "floors", "generate", "schema"]

#: Users drawn from one stream. Part of the definition of a world: changing it changes every world.
BLOCK = 1024
#: Histories whose floors are written to ``truth.json`` (None: everything before the request).
FLOOR_HISTORIES = (0, 8, 64, 256, None)
_ORIGIN = 1_700_000_000
_MINIMUM_GAP = 30


def generate(
    world: World,
    out: str | Path,
    *,
    workers: int = 1,
    shard: int = 0,
    shards: int = 1,
    floor_requests: int = 4096,
    quiet: bool = True,
) -> Sequences:
    """Writes the users of one shard (of all, by default) to the dataset folder ``out``, whose name it takes.

    Shards are contiguous runs of user blocks with the same items, types and tables; put end to end, they are the
    unsharded world. workers: processes that write blocks; the result does not depend on it. A run that was killed goes
    on where it was (``data/work.py``). floor_requests: floors are computed on at most this many requests of the test
    part (0: none). Memory, however many events: a block (about 0.3 KB per event of 1024 users) and the popularity's
    table (12 bytes per item and period, shared) per worker, and 60 bytes per user. Raises UserError for an impossible
    shard.
    """
    blocks = -(-world.users // BLOCK)
    if not 0 <= shard < shards <= blocks:
        raise UserError(f"shard {shard} of {shards} is impossible: this world has {blocks} blocks of {BLOCK} users")
    first, last = blocks * shard // shards, blocks * (shard + 1) // shards
    jobs = range(first, last)
    counts = np.concatenate([_request_counts(_stream(world, b), world, _block_users(world, b)) for b in jobs])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts * world.candidates)])
    record: dict[str, Any] = {"world": world.to_json(), "shard": shard, "shards": shards}
    with making(out, {"format": FORMAT, **record}, workers=workers, quiet=quiet) as work:
        _create(work.pieces, world, offsets)
        work.make("popularity", _write_popularity, [Task("popularity", (world,), world.periods)], noun="")
        bounds = offsets[np.minimum(np.arange(last - first + 1) * BLOCK, len(offsets) - 1)].tolist()
        users = [(block - first) * BLOCK for block in jobs]
        work.make(
            "generating",
            _write_block,
            [
                Task(f"block-{block:06d}", (world, block, user, start, stop - start), stop - start)
                for block, user, start, stop in zip(jobs, users, bounds, bounds[1:])
            ],
        )
        work.close()
        folder = work.dataset
        source = {"synthetic": world.to_json(), "shard": shard, "shards": shards}
        with work.showing("hashing"):
            name = Path(out).name
            write_manifest(folder, name=name, schema=schema(world), origin=_ORIGIN, has_requests=True, source=source)
        (folder / "truth.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if floor_requests:
            with work.showing("floors"):
                record |= floors(load(folder), requests=floor_requests).to_json()
            (folder / "truth.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return load(out)


@dataclasses.dataclass(frozen=True)
class Floors:
    """The floors of several histories on one set of impressions, and unseen_items, the share of these impressions whose
    item is in no training event: there no amount of training reaches the floor, which knows every item."""

    truths: tuple[Truth, ...]
    unseen_items: float

    def to_json(self) -> dict[str, Any]:
        return {"unseen_items": self.unseen_items, "floors": [found.to_json() for found in self.truths]}


def floors(sequences: Sequences, *, validation: float = 0.1, test: float = 0.1, requests: int = 4096) -> Floors:
    """The floors of :data:`FLOOR_HISTORIES` on evenly spaced requests of the time split's test part."""
    split = split_by_time(sequences, validation, test)
    start, stop = split.ranges("test")
    k = read_world(sequences.path).candidates
    # A request's events share one time, so the part holds whole requests and events k apart begin one each.
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum((stop - start) // k)])
    chosen = np.unique(np.linspace(0, begins[-1] - 1, min(requests, begins[-1])).astype(np.int64))
    user = np.searchsorted(begins, chosen, side="right") - 1
    request = np.repeat(start[user] + (chosen - begins[user]) * k, k)
    impressions = request + np.tile(np.arange(k), len(chosen))
    shown = sequences.item[impressions]
    seen = np.zeros(sequences.schema.items, bool)
    for first, (item,) in sequences.scan("item"):
        seen[item[split.holds("train", first, len(item))]] = True
    return Floors(
        truths=truths(sequences, impressions, request, FLOOR_HISTORIES),
        unseen_items=float(1 - seen[shown].mean()),
    )


def schema(world: World) -> Schema:
    """Vocabularies of a world's dataset: items, tasks, the user's region and the item's category."""
    categories = max(1, world.clusters // 2)
    features = (Feature("region", world.regions + 1, 1, "user"), Feature("category", categories + 1, 1, "item"))
    return Schema(items=world.items + 1, tasks=world.tasks, features=features)


def _create(pieces: Pieces, world: World, offsets: np.ndarray) -> None:
    """Empty columns of their final size, and the tables that do not depend on blocks."""
    pieces.create({f"dataset/{name}": column for name, column in _columns(world, offsets).items()})
    np.save(pieces.folder / "dataset/offsets.npy", offsets)
    (pieces.folder / "dataset/items").mkdir(exist_ok=True)
    np.save(pieces.folder / "dataset/items/category.npy", item_tables(world).category)


def _columns(world: World, offsets: np.ndarray) -> dict[str, tuple[type, tuple[int, ...]]]:
    users, events = len(offsets) - 1, int(offsets[-1])
    return {
        "users/region": (np.int32, (users,)),
        "truth/type": (np.uint16, (users, world.domains)),
        "truth/state": (np.uint16, (events,)),
        "events/item": (np.int32, (events,)),
        "events/time": (np.int32, (events,)),
        "events/labels": (np.uint8, (events, len(world.tasks))),
        "events/request": (np.int32, (events,)),
    }


def _write_popularity(pieces: Pieces, world: World, *, advance: Advance) -> tuple[dict[str, Any], list[Extent]]:
    """Once for all workers, which map it."""
    sizes: list[int] = []
    for number, (item, mass) in enumerate(popularity_periods(world)):
        pieces.write("popularity.item", item, sum(sizes) * item.itemsize if number else None)
        pieces.write("popularity.mass", mass, sum(sizes) * mass.itemsize if number else None)
        sizes.append(len(item))
        advance(1, 0)
    return {"events": 0}, [pieces.extent(name) for name in ("popularity.item", "popularity.mass")]


def _write_block(
    pieces: Pieces, world: World, block: int, user: int, start: int, events: int, *, advance: Advance
) -> tuple[dict[str, Any], list[Extent]]:
    """Draws one block of users, and writes it from the dataset's ``user`` and event ``start`` on."""
    columns = _draw_block(world, block, *_tables(world, pieces))
    extents = []
    for name, values in columns.items():
        per_user = name in ("users/region", "truth/type")
        extents.append(pieces.put(f"dataset/{name}", user if per_user else start, values))
    advance(events, events)
    return {"events": events}, extents


@functools.lru_cache(maxsize=1)
def _tables(world: World, pieces: Pieces) -> tuple[Labels, Items, Popularity]:
    """Once per process."""
    shown = Popularity(
        np.memmap(pieces.folder / "popularity.item", np.int32, "r"),
        np.memmap(pieces.folder / "popularity.mass", np.float64, "r"),
    )
    return label_tables(world), item_tables(world), shown


def _stream(world: World, block: int) -> Stream:
    return Stream(world.seed, block)


def _block_users(world: World, block: int) -> int:
    return min(BLOCK, world.users - block * BLOCK)


def _request_counts(stream: Stream, world: World, users: int) -> np.ndarray:
    """[users] int64 >= 1, an exponential of the given mean rounded and cut at LONGEST means. A block's first draw."""
    drawn = 0.5 - (world.requests - 0.5) * log(stream.uniform(users))
    return np.clip(np.floor(drawn + 0.5).astype(np.int64), 1, LONGEST * world.requests)


@dataclasses.dataclass(frozen=True)
class _Requests:
    """The R requests of a block, user after user: user [R] (within the block), index [R] (within the user; 0 = first),
    long [R] bool (a long gap before it), time [R] seconds."""

    user: np.ndarray
    index: np.ndarray
    long: np.ndarray
    time: np.ndarray


def _draw_block(world: World, block: int, labels: Labels, items: Items, shown: Popularity) -> dict[str, np.ndarray]:
    """Every column of one block's users. The order of the draws is part of the definition of a world."""
    users = _block_users(world, block)
    stream = _stream(world, block)
    counts = _request_counts(stream, world, users)
    types = stream.below(world.types, users * world.domains).reshape(users, world.domains)
    region = _pick(np.cumsum(labels.region, axis=0).T[types[:, 0]], stream.uniform(users)) + 1
    requests = _draw_requests(stream, world, counts)
    hidden = types[requests.user] * world.states + _draw_states(stream, world, requests)

    k = world.candidates
    time = np.repeat(requests.time, k)
    item = shown.draw(time * world.periods // (world.days * 86400), stream.uniform(len(time)))
    kind = items.kind[item]
    state = hidden[np.repeat(np.arange(len(hidden)), k), labels.domain[kind]]
    pattern = _pick(np.cumsum(labels.pattern, axis=-1)[kind, state], stream.uniform(len(time)))
    return {
        "users/region": region,
        "truth/type": types,
        "truth/state": state,
        "events/item": item,
        "events/time": time,
        "events/labels": pattern[:, None] >> np.arange(len(world.tasks)) & 1,
        "events/request": np.repeat(requests.index, k),
    }


def _pick(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """[n] index drawn by inversion from cumulative [n, m]; the last takes what rounding leaves."""
    return (uniform[:, None] >= cumulative[:, :-1]).sum(axis=1)


def _draw_requests(stream: Stream, world: World, counts: np.ndarray) -> _Requests:
    """Sessions begin at uniform times of the whole span (sorted, and moved apart by what they contain)."""
    user = np.repeat(np.arange(len(counts)), counts)
    start = np.cumsum(counts) - counts
    index = np.arange(len(user)) - start[user]
    long = (stream.uniform(len(user)) < world.long_gap) & (index > 0)
    short = _MINIMUM_GAP + stream.below(SHORT_GAP - _MINIMUM_GAP, len(user))
    least = np.where(index == 0, 0, np.where(long, SESSION_GAP, short))
    elapsed = np.cumsum(least)
    elapsed -= elapsed[start][user]  # the first request's own gap is zero
    slack = world.days * 86400 - elapsed[start + counts - 1]
    # One free offset per session, in ascending order within the user, shared by the session's requests.
    begins = long | (index == 0)
    owner = user[begins]
    offset = stream.below(slack[owner], len(owner))
    offset = offset[np.lexsort((offset, owner))]
    return _Requests(user, index, long, elapsed + offset[np.cumsum(begins) - 1])


def _draw_states(stream: Stream, world: World, requests: _Requests) -> np.ndarray:
    """[R, G] interests: where an interest does not persist, a fresh one; elsewhere the last fresh one."""
    shape = (len(requests.user), world.domains)
    keep = np.where(requests.long, world.long_persistence, world.persistence)[:, None]
    fresh = (stream.uniform(shape[0] * shape[1]).reshape(shape) >= keep) | (requests.index == 0)[:, None]
    drawn = stream.below(world.states, shape[0] * shape[1]).reshape(shape)
    latest = np.maximum.accumulate(np.where(fresh, np.arange(shape[0])[:, None], 0), axis=0)
    return np.take_along_axis(drawn, latest, axis=0)
