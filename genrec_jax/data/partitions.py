"""Second and third stage of an import: partitions are sorted into runs, and runs are put together user by user.

A run holds the events of a partition's users in the dataset's order, except that a user's place among all users is
still unknown. Users of a run come in order of first appearance in the log, as they do in the dataset: so the events of
any range of the dataset's users are one stretch of every run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec_jax.data.log import LogMapping
from genrec_jax.data.log_columns import Vocabulary, are_integers
from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.segments import record_type, user_hashes
from genrec_jax.data.side_tables import constant_per_key
from genrec_jax.data.work import Advance


@dataclasses.dataclass(frozen=True)
class Part:
    """Users of partition ``number`` of ``partitions``: of those that lie in it, every ``shares``-th, from ``share`` on.

    A partition that is too large to be sorted at once is sorted in shares, each of which reads all of it.
    """

    number: int
    partitions: int
    share: int
    shares: int

    @property
    def name(self) -> str:
        return f"run-{self.number:06d}-{self.share:06d}"

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """[n] bool, of users that lie in the partition."""
        return hashes // np.uint64(self.partitions) % np.uint64(self.shares) == self.share


@dataclasses.dataclass(frozen=True)
class SortPlan:
    """What sorting must know of the log: ``segments`` (names in reading order) and the ``starts`` of their rows.

    units: of time per second. text_users: whether user keys are typed as text.
    """

    mapping: LogMapping
    segments: tuple[str, ...]
    starts: tuple[int, ...]
    units: int
    text_users: bool

    @property
    def user_features(self) -> tuple[str, ...]:
        return tuple(feature.name for level, feature in self.mapping.features if level == "user")

    @property
    def run_type(self) -> np.dtype:
        """One event of a run: second of time, not yet from the origin; request, counted within the user."""
        fields: list[Any] = [("item", "<i4"), ("second", "<i8"), ("labels", "u1", (len(self.mapping.labels),))]
        if self.mapping.request is not None:
            fields.append(("request", "<i4"))
        fields += [(f"feature {f.name}", "<i4") for level, f in self.mapping.features if level == "event"]
        return np.dtype(fields)

    @property
    def user_type(self) -> np.dtype:
        """One user of a run: the first row in the log, where its events start in the run, how many, and requests."""
        fields = [("first", "<i8"), ("start", "<i8"), ("count", "<i8"), ("requests", "<i4")]
        return np.dtype(fields + [(f"feature {name}", "<i4") for name in self.user_features])


def sort_part(pieces: Pieces, plan: SortPlan, part: Part, *, advance: Advance) -> tuple[dict[str, Any], list[Extent]]:
    """Sorts the events of a part by (user, time, order, reading order) into a run.

    What is wrong with them is in the result, as what the first event at fault is by some order, so that the caller can
    name the same one whatever the partitions: ``unsorted`` and ``varying`` by row; ``interrupted``, [user's first row,
    row]; ``latest``, [-second, user's first row, row].
    """
    mapping = plan.mapping
    users = Vocabulary(first=0)
    rows, row = _collected(pieces, plan, part, users)
    user = rows["user"]
    result: dict[str, Any] = {"unsorted": None, "varying": {}, "interrupted": None, "latest": None}
    extents = []
    if mapping.promise_sorted:
        result["unsorted"] = _unsorted(user, rows["time"], row)
    table = np.zeros(len(users), plan.user_type)
    table["first"][user[::-1]] = row[::-1]  # reversed: the first row of a user is written last
    for name in plan.user_features:
        table[f"feature {name}"], bad = constant_per_key(user, rows[f"feature {name}"], len(users))
        result["varying"][name] = None if bad is None else int(row[bad])
    tie_breaks = [rows["order"]] if mapping.order is not None else []
    order = np.lexsort([*tie_breaks, rows["time"], user])  # the last key is the first; stable, in reading order
    texts = list(users.ids)
    if mapping.min_events:
        order, kept, items = _frequent(pieces, user, rows["item"], order, mapping.min_events)
        table, texts = table[kept], [texts[old] for old in kept]
        user = np.searchsorted(kept, user)
        extents.append(pieces.save(f"{part.name}.items", items))
    rows, row, user = rows[order], row[order], user[order]
    run = np.empty(len(rows), plan.run_type)
    for name in run.dtype.names or ():
        if name not in ("second", "request"):
            run[name] = rows[name]
    run["second"] = rows["time"] // plan.units
    table["count"] = np.bincount(user, minlength=len(table))
    table["start"] = np.cumsum(table["count"]) - table["count"]
    if mapping.request is not None:
        run["request"], table["requests"], bad = _requests(user, rows["request"], table["start"])
        result["interrupted"] = None if bad is None else [int(table["first"][user[bad]]), int(row[bad])]
    if len(run):
        latest = np.flatnonzero(run["second"] == run["second"].max())
        at = int(latest[np.argmin(table["first"][user[latest]])])
        result["earliest"] = int(run["second"].min())
        result["latest"] = [-int(run["second"][at]), int(table["first"][user[at]]), int(row[at])]
    extents += [
        pieces.save(f"{part.name}.events", run),
        pieces.save(f"{part.name}.users", table),
        pieces.save_keys(f"{part.name}.keys", texts),
    ]
    integers = not plan.text_users and are_integers(pieces.keys(f"{part.name}.keys"))
    advance(len(user), len(user))
    return result | {"events": len(run), "users": len(table), "integers": integers}, extents


def _collected(pieces: Pieces, plan: SortPlan, part: Part, users: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """The part's rows in reading order, all keys in the dataset's numbers but users in the part's; rows in the log."""
    record = record_type(plan.mapping)
    blocks, numbers = [np.empty(0, record)], [np.empty(0, np.int64)]
    names = ["item", *(name for name in record.names or () if name.startswith("feature "))]
    for segment, start in zip(plan.segments, plan.starts):
        first, stop = pieces.read(f"{segment}.row-starts", np.int64, part.number, 2).tolist()
        if first == stop:
            continue
        first_user, stop_user = pieces.read(f"{segment}.user-starts", np.int64, part.number, 2).tolist()
        block = pieces.read(f"{segment}.rows", record, first, stop - first)
        block["user"] -= first_user
        texts = pieces.keys(f"{segment}.users", first_user, stop_user - first_user)
        if part.shares > 1:
            kept = part.holds(user_hashes(texts.to_pylist()))
            block = block[kept[block["user"]]]
            number = np.full(len(kept), -1)
            number[kept] = users.encode(texts.filter(kept))
        else:
            number = users.encode(texts)
        block["user"] = number[block["user"]]
        for name in names:
            block[name] = pieces.read(f"{segment}.{name.replace(' ', '-')}.map", np.int32)[block[name]]
        blocks.append(block)
        numbers.append(start + block["row"].astype(np.int64))
    return np.concatenate(blocks), np.concatenate(numbers)


def _unsorted(user: np.ndarray, time: np.ndarray, row: np.ndarray) -> int | None:
    """The first row whose time is before that of the same user's row before."""
    order = np.argsort(user, kind="stable")
    falls = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
    return int(row[order[1:][falls]].min()) if falls.any() else None


def _frequent(
    pieces: Pieces, user: np.ndarray, item: np.ndarray, order: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See ``LogMapping.min_events``: ``order`` without the events that go, the users that stay, the items that do."""
    enough = (np.bincount(user)[user] >= least) & (pieces.read("item-counts", np.int64)[item] >= least)
    left = np.bincount(user[enough], minlength=int(user.max(initial=-1)) + 1)
    kept = enough & (left[user] >= least)
    return order[kept[order]], np.flatnonzero(left >= least), np.unique(item[enough]).astype(np.int64)


def _requests(user: np.ndarray, request: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(place of each event's request within its user, requests of each user, first event that resumes a request)."""
    opens = np.ones(len(user), bool)
    opens[1:] = (user[1:] != user[:-1]) | (request[1:] != request[:-1])
    count = np.cumsum(opens)
    opening = np.flatnonzero(opens)
    by_key = np.lexsort((opening, request[opening], user[opening]))
    again = (np.diff(user[opening][by_key]) == 0) & (request[opening][by_key][1:] == request[opening][by_key][:-1])
    bad = int(opening[by_key[1:][again]].min()) if again.any() else None
    before = count[starts] - 1 if len(user) else count
    return count - 1 - before[user], np.bincount(user[opening], minlength=len(starts)), bad


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """How runs become the dataset's columns. origin: second of the first event. remap: items are numbered anew."""

    sort: SortPlan
    runs: tuple[str, ...]
    origin: int
    remap: bool


def merge_users(
    pieces: Pieces, plan: MergePlan, number: int, first: int, stop: int, *, advance: Advance
) -> tuple[dict[str, Any], list[Extent]]:
    """Writes shard ``number``, the events of users ``first..stop-1``, into its place in the dataset's columns."""
    offsets = pieces.read("offsets", np.int64, first, stop - first + 1)
    begin, events = int(offsets[0]), int(offsets[-1] - offsets[0])
    whole = np.empty(events, plan.sort.run_type)
    for run in plan.runs:
        low, high = pieces.read(f"{run}.bounds", np.int64, number, 2).tolist()
        if low == high:
            continue
        place = pieces.read(f"{run}.places", np.int32, low, high - low) - first
        table = pieces.read(f"{run}.users", plan.sort.user_type, low, high - low)
        at = int(table["start"][0])
        block = pieces.read(f"{run}.events", plan.sort.run_type, at, int(table["count"].sum()))
        shift = offsets[place] - begin - (table["start"] - at)
        whole[np.repeat(shift, table["count"]) + np.arange(len(block))] = block
    item = pieces.read("item-renumbered", np.int32)[whole["item"]] if plan.remap else whole["item"]
    columns = {"item": item, "time": whole["second"] - plan.origin, "labels": whole["labels"]}
    if plan.sort.mapping.request is not None:
        base = pieces.read("requests", np.int64, first, stop - first)
        columns["request"] = whole["request"] + np.repeat(base, np.diff(offsets))
    for name in whole.dtype.names or ():
        if name.startswith("feature "):
            columns[name.removeprefix("feature ")] = whole[name]
    extents = [pieces.put(f"dataset/events/{name}", begin, values) for name, values in columns.items()]
    advance(events, events)
    return {"events": events}, extents


def shares_of(events: Sequence[int], most: int) -> list[Part]:
    """The parts in which partitions of that many ``events`` are sorted, ``most`` events at a time or so."""
    parts = []
    for number, count in enumerate(events):
        shares = -(-count // most)
        parts += [Part(number, len(events), share, shares) for share in range(shares)]
    return parts
