"""Which events are trained on, and which are evaluated.

Ranking splits by global time: an event belongs to a part by its own time against two boundaries, so nothing trained on
is later than anything evaluated. Or by users, where what is asked is not how well tomorrow is known: the parts are then
of one distribution, as a law of compute wants them in a log that changes faster than it is long. Retrieval holds out
each user's last two events, or the last, as papers on sequential recommendation do (Kang & McAuley, SASRec, ICDM 2018).
Always a part is one contiguous range of every user's events.
"""

import dataclasses
from typing import Literal

import numpy as np

from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Part ``p`` of user ``u`` is the events ``bounds[p, u]:bounds[p + 1, u]``; bounds [4, U] int64."""

    bounds: np.ndarray

    def ranges(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) [U] int64 of every user's events in the part; equal where the user has none."""
        index = PARTS.index(part)
        return self.bounds[index], self.bounds[index + 1]

    def holds(self, part: Part, first: int, count: int) -> np.ndarray:
        """[count] bool: which of the events from ``first`` on are in the part."""
        return in_ranges(*self.ranges(part), first, count)


def in_ranges(start: np.ndarray, stop: np.ndarray, first: int, count: int) -> np.ndarray:
    """[count] bool: which of the events from ``first`` on are in a range ``start[i]:stop[i]``; ranges ascend."""
    edges = np.zeros(count + 1, np.int64)
    near = slice(int(np.searchsorted(stop, first, "right")), int(np.searchsorted(start, first + count)))
    np.add.at(edges, np.maximum(start[near] - first, 0), 1)
    np.add.at(edges, np.minimum(stop[near] - first, count), -1)
    return np.cumsum(edges[:-1]) > 0


def split_by_time(sequences: Sequences, validation: float, test: float) -> Split:
    """Splits all events by two times, so that the parts hold about ``1 - validation - test``, ``validation``, ``test``.

    An event exactly at a boundary belongs to the later part, with every other event of that second: ties never
    straddle. Raises UserError naming the dataset and the part if a part is empty.
    """
    split = split_at(sequences, boundary_times(sequences, validation, test))
    _refuse_empty(sequences, split, PARTS, "its times leave none; change data.validation or data.test")
    return split


def boundary_times(sequences: Sequences, validation: float, test: float) -> tuple[int, int]:
    """When the validation and the test part of :func:`split_by_time` begin. Raises UserError without events."""
    events = sequences.events
    if events == 0:
        raise UserError(f"dataset {sequences.name!r} has no events")
    ranks = [min(round(share * events), events - 1) for share in (1 - validation - test, 1 - test)]
    first, second = (_ranked_time(sequences, rank) for rank in ranks)
    return first, second


def split_at(sequences: Sequences, times: tuple[int, int]) -> Split:
    """The events before the first time are "train", those from the second on "test"; any part may be empty."""
    first, last = sequences.offsets[:-1], sequences.offsets[1:]
    # A user's events are in time order, so counting those before a boundary finds where the part begins.
    cuts = [first + count for count in _count_before(sequences, list(times))]
    return Split(np.stack([first, *cuts, last]).astype(np.int64))


def split_by_users(sequences: Sequences, validation: float, test: float) -> Split:
    """All events of a share ``validation`` of the users, and of another share ``test``, are held out.

    Fixed by the user's number, and nested: with a smaller ``test`` fewer of the same users are tested. Raises UserError
    naming the dataset and the part if a part is empty.
    """
    first, last = sequences.offsets[:-1], sequences.offsets[1:]
    uniform = _uniform(sequences.users, 0x5B117)
    tested, watched = uniform < test, (uniform >= test) & (uniform < test + validation)
    split = Split(
        np.stack([first, np.where(tested | watched, first, last), np.where(tested, first, last), last]).astype(np.int64)
    )
    _refuse_empty(sequences, split, PARTS, "its users leave none; change data.validation or data.test")
    return split


def split_last(sequences: Sequences, *, validation: bool = True) -> Split:
    """Holds out each user's last event (test) and second-last (validation; without, it is trained on).

    A user with fewer than three events would be evaluated on no or hardly any history: all of its events are
    training. Raises UserError naming the dataset and the part if another part is empty.
    """
    first, last = sequences.offsets[:-1], sequences.offsets[1:]
    held = (last - first >= 3).astype(np.int64)
    split = Split(np.stack([first, last - (1 + validation) * held, last - held, last]).astype(np.int64))
    parts = PARTS if validation else ("train", "test")
    _refuse_empty(sequences, split, parts, "no user has three events or more")
    return split


def kept_users(users: int, fraction: float) -> np.ndarray:
    """[users] bool: the share of users that are trained on. Fixed, and nested: a smaller share is a subset."""
    return _uniform(users, 0xDA7A) < fraction


def _uniform(users: int, salt: int) -> np.ndarray:
    """[users] float64 in [0, 1), fixed."""
    drawn: np.ndarray = (hash64(np.arange(users), salt) >> np.uint64(11)) * 2.0**-53
    return drawn


def hash64(value: np.ndarray, salt: int | np.ndarray = 0) -> np.ndarray:
    """Splitmix64 of each value (Steele et al., OOPSLA 2014): uint64, the same on every machine and version.

    ``value`` has at least one dimension (numpy warns of a scalar's wrap-around, not of an array's).
    """
    x = value.astype(np.uint64)
    x += np.atleast_1d(np.asarray(salt, np.uint64)) * np.uint64(0xD1342543DE82EF95)
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _ranked_time(sequences: Sequences, rank: int) -> int:
    """The time at place ``rank`` (from 0) of all events' sorted times: counts of the high, then of the low 16 bits."""
    found = 0
    for shift in (16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for _, (time,) in sequences.scan("time"):
            bits = time.astype(np.int64) + 2**31  # ascending from 0
            if shift == 0:
                bits = bits[bits >> 16 == found]
            counts += np.bincount(bits >> shift & 0xFFFF, minlength=1 << 16)
        below = np.cumsum(counts)
        place = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[place - 1]) if place else 0
        found = found << 16 | place
    return found - 2**31


def _count_before(sequences: Sequences, times: list[int]) -> list[np.ndarray]:
    """For each of ``times`` the number [U] of every user's events before it."""
    offsets = sequences.offsets
    before = np.zeros((len(times), len(offsets)), np.int64)  # events before the time among all up to each offset
    total = np.zeros(len(times), np.int64)
    for first, (time,) in sequences.scan("time"):
        inside = slice(*np.searchsorted(offsets, [first + 1, first + len(time) + 1]).tolist())
        for number, boundary in enumerate(times):
            count = total[number] + np.cumsum(time < boundary)
            before[number, inside] = count[offsets[inside] - first - 1]
            total[number] = count[-1]
    return list(np.diff(before, axis=1))


def _refuse_empty(sequences: Sequences, split: Split, parts: tuple[Part, ...], reason: str) -> None:
    for part in parts:
        start, stop = split.ranges(part)
        if not (stop > start).any():
            raise UserError(f"dataset {sequences.name!r} has no {part} events: {reason}")
