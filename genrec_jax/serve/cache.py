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

    Room is made by dropping the keys and values of the users least recently used (their events stay, a thousandth of
    the bytes, so that a later increment can be encoded anew), and once no keys are left, their events too.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
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
        entry = self._warm.pop(user, None) or self._cold.pop(user, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
        return entry

    def put(self, user: Hashable, entry: Entry) -> None:
        """Keeps what fits of the entry, as the most recently used one, in place of what there was of the user."""
        self.pop(user)
        if entry.layers is not None and entry.nbytes > self.budget:
            entry = entry.without_layers()
        if entry.nbytes > self.budget:
            return
        self._make_room(entry.nbytes)
        (self._cold if entry.layers is None else self._warm)[user] = entry
        self.nbytes += entry.nbytes

    def _make_room(self, needed: int) -> None:
        while self._warm and self.nbytes + needed > self.budget:
            user, entry = self._warm.popitem(last=False)
            bare = entry.without_layers()
            self._cold[user] = bare
            self.nbytes += bare.nbytes - entry.nbytes
        while self.nbytes + needed > self.budget:
            _, entry = self._cold.popitem(last=False)
            self.nbytes -= entry.nbytes
