"""What a request says, as arrays of the dataset's dense ids, and the rows that the programs read."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from genrec_jax.batch import Batch, Candidates, Context, History
from genrec_jax.data.schema import Feature, Schema

ALONE = 0  # ``Events.request`` of an event that was shown with no other


@dataclasses.dataclass(frozen=True)
class Events:
    """n events of one user, oldest first. item, time (seconds since the dataset's origin): [n] int32.

    labels: [n, A] uint8. request: [n] int64; neighbours with one number other than ALONE were shown together.
    ``features[name]``: item features, [n] or [n, width] int32.
    """

    item: np.ndarray
    time: np.ndarray
    labels: np.ndarray
    request: np.ndarray
    features: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, part: slice) -> "Events":
        return Events(
            self.item[part],
            self.time[part],
            self.labels[part],
            self.request[part],
            {name: x[part] for name, x in self.features.items()},
        )

    def __add__(self, later: "Events") -> "Events":
        pairs = zip(self._columns(), later._columns(), strict=True)
        item, time, labels, request, *features = (np.concatenate(pair) for pair in pairs)
        return Events(item, time, labels, request, dict(zip(self.features, features)))

    def copy(self) -> "Events":
        """The same events in memory of their own."""
        return self + self[:0]

    def starts_with(self, earlier: "Events") -> bool:
        if len(earlier) > len(self):
            return False
        pairs = zip(self[: len(earlier)]._columns(), earlier._columns(), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    @property
    def before(self) -> np.ndarray:
        """[n] int32: how many events came before each event's request, as in `History.before`."""
        opens = np.ones(len(self), bool)
        opens[1:] = (self.request[1:] != self.request[:-1]) | (self.request[1:] == ALONE)
        return np.maximum.accumulate(np.where(opens, np.arange(len(self), dtype=np.int32), 0))

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self._columns())

    def _columns(self) -> list[np.ndarray]:
        return [self.item, self.time, self.labels, self.request, *self.features.values()]


def no_events(schema: Schema) -> Events:
    none = np.zeros(0, np.int32)
    features = {f.name: np.zeros(feature_shape(f, 0), np.int32) for f in schema.item_features}
    return Events(none, none, np.zeros((0, len(schema.tasks)), np.uint8), np.zeros(0, np.int64), features)


def feature_shape(feature: Feature, n: int) -> tuple[int, ...]:
    """Shape of the feature's ids for n items."""
    return (n, feature.width) if feature.width > 1 else (n,)


@dataclasses.dataclass(frozen=True)
class Request:
    """Candidates to score for one user at one time.

    item: [C] int32 candidates, ``features[name]`` theirs, [C] or [C, width] int32. time: int, seconds since the
    dataset's origin. ``context[name]``: int32, () or [width]. events: the user's history, or with ``append`` the events
    since what the scorer last heard of the user. user: key of the cache; None: nothing is kept.
    """

    item: np.ndarray
    features: Mapping[str, np.ndarray]
    time: int
    context: Mapping[str, np.ndarray]
    events: Events
    append: bool = False
    user: Hashable = None


def rows(
    schema: Schema, requests: Sequence[tuple[Request, Events]], capacity: int, part: slice, slots: int, lanes: int
) -> Batch:
    """A Batch of ``lanes`` rows of one segment, the last ones empty: each request's events in ``capacity`` slots, its
    candidates ``part`` in ``slots`` slots."""

    def empty(*shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.zeros((lanes, *shape), dtype)

    def features(n: int) -> dict[str, np.ndarray]:
        return {f.name: empty(*feature_shape(f, n)) for f in schema.item_features}

    n, c, tasks = capacity, slots, len(schema.tasks)
    context = {f.name: empty(1, *(f.width,) * (f.width > 1)) for f in schema.context_features}
    past = History(
        empty(n), empty(n), empty(n, tasks, dtype=np.uint8), empty(n), empty(n, dtype=bool), empty(n), features(n)
    )
    shown = Candidates(empty(c), empty(c), empty(c, tasks, dtype=np.uint8), empty(c), empty(c), features(c))
    for row, (request, events) in enumerate(requests):
        here, item = slice(0, len(events)), request.item[part]
        there = slice(0, len(item))
        past.item[row, here], past.time[row, here] = events.item, events.time
        past.labels[row, here], past.segment[row, here], past.before[row, here] = events.labels, 1, events.before
        shown.item[row, there], shown.time[row, there] = item, request.time
        shown.segment[row, there], shown.before[row, there] = 1, len(events)
        for name, values in events.features.items():
            past.features[name][row, here] = values
            shown.features[name][row, there] = request.features[name][part]
        for name, values in request.context.items():
            context[name][row, 0] = values
    return Batch(np.full((lanes, 1), -1, np.int32), Context(context), past, shown)
