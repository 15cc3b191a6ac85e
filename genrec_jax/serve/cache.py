"""What is kept of users between requests: a byte budget, and the least recently used goes first."""

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np

from genrec_jax.serve.events import Events

_OVERHEAD = 2048  # bytes of the Python objects of an entry, more than they are


@dataclasses.dataclass(frozen=True)
class Entry:
    """One user: the events that count, the context they were encoded behind, and the first ``tokens`` tokens' keys and
    values in ``layers``, None where only the events are kept."""

    events: Events
    context: Mapping[str, np.ndarray]
    tokens: int = 0
    capacity: int = 0
    layers: Any = None

    @property
    def nbytes(self) -> int:
        arrays = [*jax.tree.leaves(self.layers), *self.context.values()]
        return _OVERHEAD + self.events.nbytes + sum(x.nbytes for x in arrays)

    def without_layers(self) -> "Entry":
        return Entry(self.events, self.context)


class UserCache:
    """Entries by user, never more than ``budget`` bytes of them together.

    Room is made by dropping the keys and values of the users least recently used. Their events, a thousandth of the
    bytes, stay for a while, so that a later increment can be encoded anew: in at most an eighth of the budget.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self._cold_bytes = 0
        self._warm: OrderedDict[Hashable, Entry] = OrderedDict()  # with layers, least recently used first
        self._cold: OrderedDict[Hashable, Entry] = OrderedDict()  # events alone

    def __len__(self) -> int:
        return len(self._warm) + len(self._cold)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._warm or user in self._cold

    def get(self, user: Hashable) -> Entry | None:
        """The entry as it lies there: no use of it."""
        return self._warm.get(user) or self._cold.get(user)

    def pop(self, user: Hashable) -> Entry | None:
        for entries in (self._warm, self._cold):
            if user in entries:
                return self._take(entries, user)
        return None

    def put(self, user: Hashable, entry: Entry) -> None:
        """Keeps what fits of the entry, as the most recently used one, in place of what there was of the user."""
        self.pop(user)
        if entry.layers is not None and entry.nbytes > self.budget:
            entry = entry.without_layers()
        if entry.nbytes > self.budget:
            return
        self._make_room(entry.nbytes)
        self._add(user, entry)

    def _make_room(self, needed: int) -> None:
        while self._warm and self.nbytes + needed > self.budget:
            user = next(iter(self._warm))
            self._add(user, self._take(self._warm, user).without_layers())
            while self._cold_bytes > self.budget // 8:
                self._take(self._cold, next(iter(self._cold)))
        while self.nbytes + needed > self.budget:
            self._take(self._cold, next(iter(self._cold)))

    def _add(self, user: Hashable, entry: Entry) -> None:
        cold = entry.layers is None
        (self._cold if cold else self._warm)[user] = entry
        self.nbytes += entry.nbytes
        self._cold_bytes += cold * entry.nbytes

    def _take(self, entries: OrderedDict[Hashable, Entry], user: Hashable) -> Entry:
        entry = entries.pop(user)
        self.nbytes -= entry.nbytes
        self._cold_bytes -= (entry.layers is None) * entry.nbytes
        return entry
