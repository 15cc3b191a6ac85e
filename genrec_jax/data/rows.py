"""Rows as index arrays: which events are history and which are candidates, before anything is gathered.

Three ways to cut a log (``genrec_jax.models.base.Rows``). "requests": the candidates of one request with the history
before it. "windows": disjoint windows of a user's training events, each event supervised once. "users": one row per
user, the next item as target. All are computed over whole columns; no Python loop visits events.
"""

import dataclasses

import numpy as np

from genrec_jax.data.sequences import Sequences
from genrec_jax.data.splits import Part, Split, hash64


@dataclasses.dataclass(frozen=True)
class RowTable:
    """R rows. The history of row r is the events ``history_start[r]:history_stop[r]``, its candidates are
    ``target_start[r]:target_stop[r]``; all of ``user[r]``. user [R] int32, the rest [R] int64.

    Event ``history_stop[r]`` is the first of the request: it gives the request time and the request's features.
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

    @property
    def targets(self) -> int:
        """What one pass supervises: candidates, and the history events of generative rows.

        A "users" row supervises one target per history event (each predicts the next item; the last, the candidate).
        """
        if not self.supervised:
            return self.candidates
        in_history = int(self.history_length.sum())
        next_item = bool((self.target_stop - self.history_start == self.history_length + 1).all()) and self.shifted
        return in_history if next_item else in_history + self.candidates

    def take(self, index: np.ndarray) -> "RowTable":
        """The rows at ``index``, in that order."""
        columns = (f.name for f in dataclasses.fields(self) if f.name != "supervised")
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in columns})
