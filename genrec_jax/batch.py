"""The one structure every architecture reads: context, history and candidates of B rows.

A row holds S segments (users or requests); S = 1 is the plain padded case, S > 1 packs several short histories into one
row. ``segment`` is 0 at padding and 1..S elsewhere; events of a segment are contiguous, oldest first, padding last.
Arrays are numpy on the host and jax arrays inside jit.
"""

import dataclasses
from typing import Any

import jax

Array = Any  # numpy on the host, jax.Array inside jit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Features of each segment's request. ``features[name]``: [B, S] or [B, S, width] int32, 0 = unknown."""

    features: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Past events. item, time (seconds since the dataset's origin), segment: [B, N] int32; labels: [B, N, A] uint8.

    ``supervised`` [B, N] bool marks events whose labels are training targets (generative rows); all False in
    impression rows and in every evaluation row. ``before`` [B, N] int32: how many events of the segment came before the
    event's request, so before anything it was shown with; its own place where events are not shown together, 0 at
    padding. ``features[name]``: item features, [B, N] or [B, N, width] int32.
    """

    item: Array
    time: Array
    labels: Array
    segment: Array
    supervised: Array
    before: Array
    features: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Items to score, C = S * K slots. item, time (request time), segment: [B, C] int32; labels: [B, C, A] uint8.

    All candidates of a segment share its request time and ``before`` [B, C] int32: how many events of the segment's
    history came before the first candidate's request: all, but for a window whose last request goes on here.
    """

    item: Array
    time: Array
    labels: Array
    segment: Array
    before: Array
    features: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows; ``user`` [B, S] int32 is the dataset's user index (-1 at padding), for grouped metrics only."""

    user: Array
    context: Context
    history: History
    candidates: Candidates


@dataclasses.dataclass(frozen=True)
class Filled:
    """What packed rows hold on average: segments, history events, and the sum of the segments' squared lengths."""

    segments: float
    events: float
    squares: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one row: N history slots, S segments, K candidates per segment.

    filled: for accounts, how packing fills such a row; None: S segments of N / S events.
    """

    history: int
    candidates: int
    segments: int = 1
    filled: Filled | None = None

    @property
    def slots(self) -> int:
        """Candidate slots of a row, C = S * K."""
        return self.segments * self.candidates
