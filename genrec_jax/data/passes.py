"""What every pass over the training rows holds, how it is packed, and in which order its rows come.

A pass takes all rows as they are, unless the configuration draws anew for each: ``data.rows_per_user`` takes some of
every user's rows, ``data.stochastic_length`` thins long histories. Lengths then differ from pass to pass, so each is
packed for itself; with ``data.packing`` "batch", each batch is. Everything is a function of (rows, configuration, seed,
pass): position p of the endless stream lies in the pass in which the rows of the passes before it run out, so a stream
can be entered anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from genrec_jax.config import DataConfig
from genrec_jax.data import rows as row_tables
from genrec_jax.data.packing import EMPTY, plan_segments
from genrec_jax.data.rows import RowTable
from genrec_jax.data.splits import hash64
from genrec_jax.data.stochastic_length import StochasticLength
from genrec_jax.models.base import Rows

_ROUNDS = 6
_SAMPLED_BATCHES = 64  # that tell how full rows packed by the batch are
_DRAW, _PACK = np.uint64(3), np.uint64(4)


@dataclass(frozen=True)
class Tally:
    """What some packed rows hold: segments (histories), events in them, the sum of their squared lengths, targets.

    occupied: the rows among them that hold anything.
    """

    rows: float
    occupied: float
    segments: float
    events: float
    squares: float
    targets: float

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(self._numbers, other._numbers)))

    def __mul__(self, share: float) -> "Tally":
        return Tally(*(share * a for a in self._numbers))

    @property
    def _numbers(self) -> tuple[float, ...]:
        return self.rows, self.occupied, self.segments, self.events, self.squares, self.targets


@dataclass(frozen=True)
class Pass:
    """index [n]: the rows of the table in it; lengths [n]: of their histories; tally: of all of them.

    plan [R, S] int64: the rows of the table that share each packed row, EMPTY for none; None where batches are packed.
    """

    index: np.ndarray
    lengths: np.ndarray
    plan: np.ndarray | None
    tally: Tally


class Passes:
    """The passes over ``table``. Picklable, and safe to share between threads: what it remembers can be made again.

    With packing "pass" a batch may end one pass and begin the next. With packing "batch" it holds rows of one pass
    alone: the last batch of a pass is filled up with empty rows, as every batch is once it is packed.
    """

    def __init__(self, kind: Rows, table: RowTable, config: DataConfig, batch_rows: int, seed: int):
        self._kind, self._table, self._seed = kind, table, seed
        self._history, self._segments, self._per_user = config.history, config.segments, config.rows_per_user
        self._batch_rows = batch_rows if config.packing == "batch" else 0
        self.thinning = _thinning(config, seed)
        self._drawn = self.thinning is not None or self._per_user > 0
        self._recent: dict[int, Pass] = {}
        self._tallies: dict[int, Tally] = {}
        self._near = (0, 0)  # a pass that was asked for, and where it starts

    def __getitem__(self, epoch: int) -> Pass:
        key = epoch if self._drawn else 0
        found = self._recent.get(key)
        if found is None:
            found = self._make(key)
            self._recent = {key: found}
        return found

    def tally(self, rows: int) -> Tally:
        """Of the stream's first ``rows`` packed rows; the last, unfinished pass is counted by the share that is in."""
        if not self._drawn:
            return self[0].tally * (rows / self[0].tally.rows)
        total, epoch = Tally(0, 0, 0, 0, 0, 0), 0
        while total.rows < rows:
            one = self._tally(epoch)
            total += one * min(1.0, (rows - total.rows) / one.rows)
            epoch += 1
        return total

    def rows(self, epochs: float) -> float:
        """Packed rows in that many passes."""
        if not self._drawn:
            return epochs * self[0].tally.rows
        whole = int(epochs)
        rest = epochs - whole
        ended = sum(self._tally(epoch).rows for epoch in range(whole))
        return ended + (rest * self._tally(whole).rows if rest else 0.0)

    def at(self, position: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(pass, its rows of the table [n, S]) one after the other for consecutive positions [P] of the stream.

        Each pass has an order of its own. Passes that are all alike are handed out together, as pass 0.
        """
        if not self._drawn:
            yield 0, self._packed(self[0], position)
            return
        epoch, start = self._near  # read once: another thread may move it
        if start > position[0]:
            epoch, start = 0, 0
        while len(position):
            size = int(self._tally(epoch).rows)
            inside = position[position < start + size] - start
            if len(inside):
                self._near = (epoch, start)
                yield epoch, self._packed(self[epoch], epoch * size + inside)
                position = position[len(inside) :]
            epoch, start = epoch + 1, start + size

    def _packed(self, one: Pass, position: np.ndarray) -> np.ndarray:
        """Packed rows [P, S] at positions [P] of a stream of such passes alone, each in an order of its own."""
        if one.plan is not None:
            return one.plan[shuffled(position, len(one.plan), self._seed)]
        size = len(one.index)
        number, place = np.divmod(position, _whole(size, self._batch_rows))
        real = place < size
        row = np.full(len(position), EMPTY, np.int64)
        row[real] = shuffled(number[real] * size + place[real], size, self._seed)
        return np.concatenate([self._batch(one, part[part != EMPTY]) for part in row.reshape(-1, self._batch_rows)])

    def _batch(self, one: Pass, rows: np.ndarray) -> np.ndarray:
        """[batch rows, S]: ``rows`` of a pass packed among themselves, best fit, empty rows last."""
        plan = plan_segments(one.lengths[rows], self._history, self._segments, self._seed)
        out = np.full((self._batch_rows, self._segments), EMPTY, np.int64)
        out[: len(plan)] = np.where(plan == EMPTY, EMPTY, one.index[rows[plan]])
        return out

    def _tally(self, epoch: int) -> Tally:
        if epoch not in self._tallies:
            self._tallies[epoch] = self[epoch].tally
        return self._tallies[epoch]

    def _make(self, epoch: int) -> Pass:
        index = self._draw(epoch)
        rows = self._table.take(index)
        lengths = rows.history_length if self.thinning is None else self.thinning.lengths(rows, epoch)
        plan = None
        if not self._batch_rows:
            seed = int(self._key(epoch, _PACK)[0]) if self._drawn else self._seed
            plan = plan_segments(lengths, self._history, self._segments, seed)
            plan = np.where(plan == EMPTY, EMPTY, index[plan])
        count = _whole(len(index), self._batch_rows) if plan is None else len(plan)
        tally = Tally(
            rows=count,
            occupied=count,
            segments=len(rows),
            events=int(lengths.sum()),
            squares=float((lengths.astype(np.float64) ** 2).sum()),
            targets=row_tables.supervised_targets(self._kind, rows, lengths),
        )
        one = Pass(index, lengths, plan, tally)
        return (
            one if plan is not None else replace(one, tally=replace(tally, occupied=count * self._occupied(one, epoch)))
        )

    def _occupied(self, one: Pass, epoch: int) -> float:
        """Share of packed rows that hold anything, in the first batches of a pass."""
        count = int(one.tally.rows)
        sample = epoch * count + np.arange(min(count, _SAMPLED_BATCHES * self._batch_rows))
        return float((self._packed(one, sample)[:, 0] != EMPTY).mean())

    def _draw(self, epoch: int) -> np.ndarray:
        """Which rows of the table are in a pass, ascending: all, or ``rows_per_user`` of each user's."""
        everything = np.arange(len(self._table))
        if not self._per_user:
            return everything
        user = self._table.user
        order = np.lexsort((hash64(self._table.target_start, self._key(epoch, _DRAW)), user))
        first = np.searchsorted(user[order], user[order], side="left")
        return np.sort(order[everything - first < self._per_user])

    def _key(self, epoch: int, use: np.uint64) -> np.ndarray:
        return hash64(np.array([epoch]), self._seed) + use


def _whole(rows: int, batch_rows: int) -> int:
    """Rows of as many whole batches as hold that many."""
    return -(-rows // batch_rows) * batch_rows


def _thinning(config: DataConfig, seed: int) -> StochasticLength | None:
    """The configuration's Stochastic Length; None at alpha 2, where it keeps everything."""
    if config.stochastic_length >= 2:
        return None
    return StochasticLength(config.stochastic_length, config.history, config.subsequence, seed)


def shuffled(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where endless shuffled passes over ``range(size)`` are at each position (int64, at least one dimension).

    Positions ``e * size .. (e + 1) * size - 1`` visit every index once, in an order of their own. A Feistel network
    with cycle-walking (Black & Rogaway, CT-RSA 2002): a bijection of the next power of four, applied again until it
    lands inside.
    """
    epoch, value = np.divmod(position, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    key = hash64(epoch, seed)
    value = value.copy()
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _feistel(value[outside], half, key[outside])
        outside = outside[value[outside] >= size]
    return value


def _feistel(value: np.ndarray, half: int, key: np.ndarray) -> np.ndarray:
    """A bijection of ``0 .. 4**half - 1`` chosen by ``key`` (uint64, one per value)."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for number in range(_ROUNDS):
        mixed = hash64(right, key + np.uint64(number)).astype(np.int64)
        left, right = right, left ^ (mixed & mask)
    return (left << half) | right
