"""From row indices to a Batch: which rows share a packed row, and the vectorised gather of their events."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genrec_jax.batch import Batch, Candidates, Context, History, Shape
from genrec_jax.data.rows import RowTable
from genrec_jax.data.schema import Feature
from genrec_jax.data.sequences import Sequences, load
from genrec_jax.data.stochastic_length import StochasticLength

EMPTY = -1  # a segment that holds no row


def plan_segments(lengths: np.ndarray, capacity: int, segments: int, seed: int) -> np.ndarray:
    """Packs R histories into bins of at most ``capacity`` events and ``segments`` histories.

    ``lengths`` [R] int64, each at most ``capacity``. Returns [bins, segments] int64 row indices, filled from the left,
    EMPTY elsewhere; every row appears exactly once. Best fit, longest first, on whole groups of bins with equal room
    (after the histogram packing of Krell et al., 2021, arXiv:2107.02027): the work grows with the number of distinct
    lengths, not of rows. The seed shuffles rows of equal length.
    """
    if segments == 1:
        return np.arange(len(lengths))[:, None]
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    plan = np.full((len(lengths), segments), EMPTY, np.int64)
    used = np.zeros(len(lengths), np.int64)
    rooms: list[np.ndarray] = [np.zeros(0, np.int64)] * (capacity + 1)  # bins with a free segment, by free events
    bins = 0
    values, starts = np.unique(-lengths[order], return_index=True)
    for length, rows in zip(-values, np.split(order, starts[1:])):
        room = int(length)
        while len(rows):
            while room <= capacity and not len(rooms[room]):
                room += 1
            if room > capacity:  # no open bin has room: open as many as the remaining rows of this length fill
                per_bin = min(segments, capacity // max(int(length), 1))
                target = np.arange(bins, bins - (-len(rows) // per_bin))
                bins += len(target)
                left = capacity - int(length)
            else:
                target, rooms[room] = rooms[room][: len(rows)], rooms[room][len(rows) :]
                left = room - int(length)
            placed, rows = rows[: len(target)], rows[len(target) :]
            plan[target, used[target]] = placed
            used[target] += 1
            rooms[left] = np.concatenate([rooms[left], target[used[target] < segments]])
            room = left if left >= length else room  # the smallest room that may still fit this length
    return plan[:bins].copy()


class _Slots(NamedTuple):
    """The N history slots of B rows: which ``event`` [B, N] lies in each, in which ``segment`` (from 0), at which
    ``place`` of it; ``real`` [B, N] bool; ``length`` [B, S]: of every history, 0 for an absent one."""

    event: np.ndarray
    segment: np.ndarray
    place: np.ndarray
    real: np.ndarray
    length: np.ndarray


class Assembler:
    """Gathers rows of a dataset into batches of one shape. Picklable: a copy reopens the dataset folder.

    ``thinning``: long histories are replaced by subsequences of theirs, other ones in every pass.
    """

    def __init__(self, sequences: Sequences, rows: RowTable, shape: Shape, thinning: StochasticLength | None = None):
        self._sequences, self._rows, self._shape, self._thinning = sequences, rows, shape, thinning
        # Views of plain arrays: indexing a numpy memmap costs several times as much.
        self._columns = {name: np.asarray(getattr(sequences, name)) for name in ("item", "time", "labels")}
        self._request = None if sequences.request is None else np.asarray(sequences.request)
        self._features = {f.name: _table(f, sequences.features[f.name]) for f in sequences.schema.features}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._sequences.path, self._rows, self._shape, self._thinning)

    def __call__(self, plan: np.ndarray, epoch: int = 0) -> Batch:
        """The batch whose segment s of row b is row ``plan[b, s]`` ([B, S] int64, EMPTY for none), in a pass.

        Histories lie side by side from the left in segment order, padding last; the candidates of segment s (0-based)
        are at slots ``s*K`` onwards. Absent ids, times and labels are 0; an absent user is -1.
        """
        present = plan != EMPTY
        rows = self._rows.take(np.where(present, plan, 0))
        user = np.where(present, rows.user, -1).astype(np.int32)
        slots = self._slots(rows, present, epoch)
        history = self._history(slots)
        return Batch(
            user=user,
            context=self._context(rows, present),
            history=history,
            candidates=self._candidates(rows, present, slots, history),
        )

    def _context(self, rows: RowTable, present: np.ndarray) -> Context:
        # Where history events are targets too, they all see the context: it may say no more than their first one knew.
        event = rows.history_start if self._rows.supervised else rows.history_stop
        features = {}
        for feature in self._sequences.schema.context_features:
            index = rows.user if feature.level == "user" else event
            features[feature.name] = _gather(self._features[feature.name], index, present)
        return Context(features)

    def _slots(self, rows: RowTable, present: np.ndarray, epoch: int) -> _Slots:
        thin = self._thinning
        length = np.where(present, rows.history_length if thin is None else thin.lengths(rows, epoch), 0)
        end = np.cumsum(length, axis=1)  # [B, S]: where each segment's slots end
        slot = np.arange(self._shape.history)
        real = slot < end[:, -1:]
        # Slot n belongs to the first segment that ends beyond it, so its number is how many end at or before it.
        segment = np.zeros(real.shape, np.int64)
        for s in range(self._shape.segments - 1):
            segment += slot >= end[:, s : s + 1]
        place = slot - np.take_along_axis(end - length, segment, axis=1)
        within = place if thin is None else self._thinned(rows, place, segment, length < rows.history_length, epoch)
        return _Slots(within + np.take_along_axis(rows.history_start, segment, axis=1), segment, place, real, length)

    def _thinned(
        self, rows: RowTable, place: np.ndarray, segment: np.ndarray, thinned: np.ndarray, epoch: int
    ) -> np.ndarray:
        """[B, N] the place in its full history of what lies in each slot; ``thinned`` [B, S]: the shortened ones."""
        if self._thinning is None or not thinned.any():
            return place
        kept = self._thinning.places(rows.take(thinned), epoch, self._columns["time"])
        number = np.cumsum(thinned.ravel()).reshape(thinned.shape) - 1  # [B, S]: row of ``kept``
        number = np.take_along_axis(np.where(thinned, number, -1), segment, axis=1)
        inside = (number >= 0) & (place < kept.shape[1])
        return np.where(inside, kept[number, np.minimum(place, kept.shape[1] - 1)], place)

    def _history(self, slots: _Slots) -> History:
        event, real = slots.event, slots.real
        item = _gather(self._columns["item"], event, real)
        return History(
            item=item,
            time=_gather(self._columns["time"], event, real),
            labels=_gather(self._columns["labels"], event, real),
            segment=np.where(real, slots.segment + 1, 0).astype(np.int32),
            supervised=real & self._rows.supervised,
            before=np.where(real, self._shown_before(event, slots.place), 0).astype(np.int32),
            features=self._item_features(item),
        )

    def _shown_before(self, event: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[B, N] place in its segment of the first event of each event's request; ``place`` is the event's own."""
        if self._request is None:
            return place
        request = self._request.take(event, mode="clip")
        opens = place == 0
        opens[:, 1:] |= request[:, 1:] != request[:, :-1]
        slot = np.arange(place.shape[1])
        first = np.maximum.accumulate(np.where(opens, slot, 0), axis=1)
        return place - (slot - first)

    def _candidates(self, rows: RowTable, present: np.ndarray, slots: _Slots, history: History) -> Candidates:
        shape = self._shape
        count = np.where(present, rows.target_stop - rows.target_start, 0)
        slot = np.arange(shape.candidates)
        real = (slot < count[:, :, None]).reshape(-1, shape.slots)  # [B, S * K]
        event = (rows.target_start[:, :, None] + slot).reshape(-1, shape.slots)
        request = np.repeat(rows.history_stop, shape.candidates, axis=1)
        segment = np.repeat(np.arange(1, shape.segments + 1), shape.candidates)
        before = np.repeat(self._history_before(rows, slots, history), shape.candidates, axis=1)
        item = _gather(self._columns["item"], event, real)
        return Candidates(
            item=item,
            time=_gather(self._columns["time"], request, real),
            labels=_gather(self._columns["labels"], event, real),
            segment=np.where(real, segment, 0).astype(np.int32),
            before=np.where(real, before, 0).astype(np.int32),
            features=self._item_features(item),
        )

    def _history_before(self, rows: RowTable, slots: _Slots, history: History) -> np.ndarray:
        """[B, S] events of each history before the request of the segment's first candidate."""
        length = slots.length
        if self._request is None:
            return length
        # The request of the history's last event may go on among the candidates.
        last = np.maximum(np.cumsum(length, axis=1) - 1, 0)
        shown = np.take_along_axis(slots.event, last, axis=1)
        goes_on = self._request.take(rows.target_start, mode="clip") == self._request.take(shown, mode="clip")
        return np.where(goes_on & (length > 0), np.take_along_axis(history.before, last, axis=1), length)

    def _item_features(self, item: np.ndarray) -> dict[str, np.ndarray]:
        return {f.name: self._features[f.name].take(item, axis=0) for f in self._sequences.schema.item_features}


def _reopen(path: Path, rows: RowTable, shape: Shape, thinning: StochasticLength | None) -> Assembler:
    """An assembler in another process: it opens the memory-mapped columns again rather than copying them."""
    return Assembler(load(path), rows, shape, thinning)


def _table(feature: Feature, table: np.ndarray) -> np.ndarray:
    """The feature's table as a plain array; the row of item 0 (padding) is made 0 if the dataset says otherwise."""
    plain = np.asarray(table)
    if feature.level == "item" and plain[0].any():
        plain = plain.copy()
        plain[0] = 0
    return plain


def _gather(table: np.ndarray, index: np.ndarray, real: np.ndarray) -> np.ndarray:
    """``table[index]`` where ``real``, else 0; an index that is not real may lie outside the table."""
    values = table.take(index, axis=0, mode="clip")
    values *= real.reshape(real.shape + (1,) * (values.ndim - real.ndim)).astype(values.dtype)
    return values
