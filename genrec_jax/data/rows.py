"""Rows as index arrays: which events are history and which are candidates, before anything is gathered.

Four ways to cut a log (``genrec_jax.models.base.Rows``). "requests": the candidates of one request with the history
before it. "prefixes": the same, the history's actions supervised too. "windows": disjoint windows of a user's training
events, each event supervised once. "users": one row per user, the next item as target. All are computed over whole
columns; no Python loop visits events.
"""

import dataclasses

import numpy as np

from genrec_jax.data.sequences import Sequences
from genrec_jax.data.splits import Part, Split, hash64
from genrec_jax.models.base import Rows


@dataclasses.dataclass(frozen=True)
class RowTable:
    """R rows. The history of row r is the events ``history_start[r]:history_stop[r]``, its candidates are
    ``target_start[r]:target_stop[r]``; all of ``user[r]``. user [R] int32, the rest [R] int64.

    Event ``history_stop[r]`` is the first of the request: it gives the request time and, where the history is not
    supervised, the request's event-level features.
    ``supervised``: history events are training targets too.
    """

    user: np.ndarray
    history_start: np.ndarray
    history_stop: np.ndarray
    target_start: np.ndarray
    target_stop: np.ndarray
    supervised: bool

    def __len__(self) -> int:
        return len(self.user)

    @property
    def history_length(self) -> np.ndarray:
        """[R] int64."""
        return self.history_stop - self.history_start

    @property
    def candidates(self) -> int:
        """Candidate impressions in all rows."""
        return int((self.target_stop - self.target_start).sum())

    def take(self, index: np.ndarray) -> "RowTable":
        """The rows at ``index``, in that order."""
        columns = (f.name for f in dataclasses.fields(self) if f.name != "supervised")
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in columns})


def training_rows(
    kind: Rows, sequences: Sequences, split: Split, kept: np.ndarray, history: int, candidates: int
) -> RowTable:
    """The training rows of the users in ``kept`` [U] bool, in file order; N = history, K = candidates per row."""
    if kind in ("requests", "prefixes"):
        rows = request_rows(sequences, split, "train", history, candidates, kept)
        return dataclasses.replace(rows, supervised=kind == "prefixes")
    if kind == "windows":
        return window_rows(split, kept, history, candidates)
    return next_item_rows(sequences, split, "train", history, kept)


def supervised_targets(kind: Rows, rows: RowTable, lengths: np.ndarray) -> int:
    """Training targets in one pass over ``rows`` whose histories keep ``lengths`` [R] events.

    "requests": candidates. "windows" and "prefixes": history events and candidates. "users": one per history event,
    each of which predicts the item after it that is kept (the last, the candidate).
    """
    in_history = int(lengths.sum())
    return {
        "requests": rows.candidates,
        "prefixes": in_history + rows.candidates,
        "windows": in_history + rows.candidates,
        "users": in_history,
    }[kind]


def target_events(kind: Rows, rows: RowTable) -> np.ndarray:
    """Event indices of the targets that :func:`supervised_targets` counts, row after row."""
    first = {
        "requests": rows.target_start,
        "prefixes": rows.history_start,
        "windows": rows.history_start,
        "users": rows.history_start + 1,
    }[kind]
    owner, within = _expand(rows.target_stop - first)
    return first[owner] + within


def request_rows(
    sequences: Sequences, split: Split, part: Part, history: int, candidates: int, kept: np.ndarray | None = None
) -> RowTable:
    """One row per chunk of up to K events of one request, its history the N events before the request's first event.

    With request ids, a request is a run of consecutive events of one user with the same id. All its chunks share one
    history, so events shown together never see each other, not even across a part's boundary. Without ids, up to K
    consecutive events of a user within the part stand in for a request.
    """
    user, start, stop, first = _runs(sequences, split, part, kept)
    piece, within = _expand(-(-(stop - start) // candidates))
    target_start = start[piece] + within * candidates
    history_stop = target_start if sequences.request is None else first[piece]
    return RowTable(
        user=user[piece].astype(np.int32),
        history_start=np.maximum(sequences.offsets[user[piece]], history_stop - history),
        history_stop=history_stop,
        target_start=target_start,
        target_stop=np.minimum(target_start + candidates, stop[piece]),
        supervised=False,
    )


def _runs(
    sequences: Sequences, split: Split, part: Part, kept: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(user, start, stop, first) of every stretch of the part's events that may be chunked.

    ``first`` is the first event of the stretch's request, which may lie in an earlier part. Without request ids a
    stretch is all the events of a user in the part.
    """
    start, stop = split.ranges(part)
    chosen = stop > start if kept is None else kept & (stop > start)
    user = np.flatnonzero(chosen)
    start, stop = start[user], stop[user]
    if sequences.request is None:
        return user, start, stop, start
    request = np.asarray(sequences.request)
    opens = np.ones(sequences.events, bool)
    opens[1:] = request[1:] != request[:-1]
    opens[sequences.offsets[:-1][np.diff(sequences.offsets) > 0]] = True
    opening = np.flatnonzero(opens)
    first_run = np.searchsorted(opening, start, side="right") - 1  # the run that holds the user's first event here
    beyond = np.searchsorted(opening, stop, side="left")
    owner, within = _expand(beyond - first_run)
    run = first_run[owner] + within
    first = opening[run]
    ends = np.append(opening[1:], sequences.events)
    return user[owner], np.maximum(first, start[owner]), np.minimum(ends[run], stop[owner]), first


def window_rows(split: Split, kept: np.ndarray, history: int, candidates: int) -> RowTable:
    """Disjoint windows of up to W = N + K consecutive training events, each event in exactly one window.

    Windows are cut from the newest event backwards, so a user's newest window is full and the remainder is the
    oldest. The last events of a window are its candidates (they see its history only), the others its history: K of
    them, but at most half of a short window, so that candidates have a history to look at, and at least one.
    """
    window = history + candidates
    first, last = split.ranges("train")
    user = np.flatnonzero(kept & (last > first))
    first, last = first[user], last[user]
    total = -(-(last - first) // window)
    owner, within = _expand(total)
    # Window 0 of a user is the oldest; ends are counted back from the newest.
    stop = last[owner] - (total[owner] - 1 - within) * window
    start = np.maximum(first[owner], stop - window)
    size = stop - start
    few = np.minimum(candidates, np.maximum(size // 2, 1))
    count = np.maximum(few, size - history)  # never more history than fits
    return RowTable(
        user=user[owner].astype(np.int32),
        history_start=start,
        history_stop=stop - count,
        target_start=stop - count,
        target_stop=stop,
        supervised=True,
    )


def next_item_rows(
    sequences: Sequences, split: Split, part: Part, history: int, kept: np.ndarray | None = None
) -> RowTable:
    """One row per user: the part's last event is the target, the N events before it are the history.

    Users with no event before the target have nothing to predict from and are left out. Training rows supervise
    every history event; evaluation rows supervise none.
    """
    start, stop = split.ranges(part)
    offsets = sequences.offsets[:-1]
    chosen = (stop > start) & (stop - 1 > offsets)
    user = np.flatnonzero(chosen if kept is None else chosen & kept)
    target = stop[user] - 1
    return RowTable(
        user=user.astype(np.int32),
        history_start=np.maximum(offsets[user], target - history),
        history_stop=target,
        target_start=target,
        target_stop=target + 1,
        supervised=part == "train",
    )


def evaluation_rows(rows: RowTable, impressions: int) -> RowTable:
    """The last rows, requests in a fixed pseudo-random order, with at most ``impressions`` candidates; in file order.

    The order is a hash of each request's first event: it knows nothing of seeds, models or history lengths, so every
    architecture is evaluated on the same impressions. One row is always kept.
    """
    order = np.lexsort((rows.target_start, rows.history_stop, hash64(rows.history_stop, 0xE7A1)))[::-1]
    size = (rows.target_stop - rows.target_start)[order]
    count = max(1, int(np.searchsorted(np.cumsum(size), impressions, side="right")))
    return rows.take(np.sort(order[:count]))


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a ragged table: (owner, position within the owner), each of length ``counts.sum()``, int64."""
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - starts[owner]
