"""The scorer: keeps what it heard of users, encodes what is new, scores candidates in microbatches."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np
from scipy.special import expit

from genrec_jax.batch import Batch
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.errors import UserError
from genrec_jax.models.registry import Model
from genrec_jax.models.sequence import SequenceRanker
from genrec_jax.serve.cache import Entry, UserCache
from genrec_jax.serve.catalogue import Catalogue
from genrec_jax.serve.events import Events, Request, feature_shape, rows
from genrec_jax.serve.programs import CacheType, Layers, Programs, hstu_blocks
from genrec_jax.train.loop import read_trial, restored

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The static sizes of the compiled functions; a request is padded to them, so that none compiles anew.

    history: N, the events that count. microbatch: b_m, candidates scored at once. lanes: requests scored at once.
    tokens_per_event, context: of the model's layout. smallest: capacity, in events. chunks: events encoded at once.
    """

    history: int
    microbatch: int
    lanes: int
    tokens_per_event: int
    context: int
    smallest: int = 32
    chunks: tuple[int, ...] = (8, 64, 512)

    @property
    def capacities(self) -> tuple[int, ...]:
        """The smallest one doubled again and again, and N."""
        sizes, size = [], self.smallest
        while size < self.history:
            sizes.append(size)
            size *= 2
        return (*sizes, self.history)

    def capacity(self, events: int) -> int:
        return next(size for size in self.capacities if size >= events)

    def chunks_within(self, capacity: int) -> list[int]:
        return [size for size in self.chunks if size <= capacity] or [capacity]

    def chunk(self, events: int, capacity: int) -> int:
        """How many events to encode next, of so many that are left: the smallest chunk that holds them, or the
        largest there is."""
        sizes = self.chunks_within(capacity)
        return next((size for size in sizes if size >= events), sizes[-1])

    def tokens(self, events: int) -> int:
        return self.context + self.tokens_per_event * events


class Compiled(Protocol):
    """What a scorer calls: `Programs`, or the same functions read from a file."""

    def empty(self, capacity: int) -> Layers: ...

    def extend(self, params: Any, layers: Layers, batch: Batch, tokens: np.int32, *, chunk: int) -> Layers: ...

    def score(self, params: Any, layers: Sequence[Layers], batch: Batch) -> jax.Array: ...


class Scorer:
    """Scores requests of one model, one caller at a time.

    The score of a candidate is what the model gives it on one row that holds the context, the last N events
    (``data.history`` of the trial) and the candidate, whatever is cached: in float32 to about 1e-6 of a logit, with
    narrower caches to their rounding.

    What is kept of a user is used as long as it is the beginning of what counts now: the same context features and the
    same oldest event. Further events are encoded behind it. When the window slides, or the context changes, every state
    may change (a state has seen what fell out), and the user is encoded anew from the events kept.
    """

    def __init__(
        self,
        compiled: Compiled,
        params: Any,
        schema: Schema,
        shapes: Shapes,
        *,
        cache_bytes: int = GIB,
        catalogue: Catalogue | None = None,
    ):
        """``cache_bytes``: most that is kept between requests; a request at work needs its own layers beside it.

        catalogue: of the dataset, where it is known, to read requests in its original ids.
        """
        self.schema, self.shapes = schema, shapes
        self.cache = UserCache(cache_bytes)
        self.catalogue = catalogue
        self.compiled, self.params = compiled, params

    @classmethod
    def of(
        cls,
        model: Model,
        params: Any,
        schema: Schema,
        history: int,
        *,
        microbatch: int = 256,
        lanes: int | None = None,
        cache_type: CacheType = "float32",
        cache_bytes: int = GIB,
        catalogue: Catalogue | None = None,
    ) -> Self:
        """Of a model, abstract or not, and its parameters as a pure tree; ``history`` is the N it was built for.

        lanes: requests scored in one call. None: 8, but 1 on a CPU, where laying long histories side by side costs more
        than the calls it saves. cache_type: what keys and values are kept in; int8 has one scale per token and head.
        Raises UserError for a model whose blocks are not HSTU's.
        """
        if not isinstance(model, SequenceRanker) or len(hstu_blocks(model)) < len(model.stack.blocks):
            raise UserError(
                f"{type(model).__name__} cannot be served: only HSTU and DirL rankers have cached attention"
            )
        if lanes is None:
            lanes = 1 if jax.default_backend() == "cpu" else 8
        if min(microbatch, lanes) < 1:
            raise UserError("a scorer needs a microbatch and lanes of at least 1")
        layout = model.layout
        shapes = Shapes(history, microbatch, lanes, layout.per_event, layout.context)
        params = jax.tree.map(jax.numpy.asarray, params)
        return cls(Programs(model, cache_type), params, schema, shapes, cache_bytes=cache_bytes, catalogue=catalogue)

    @classmethod
    def from_trial(cls, folder: Path, **options: Any) -> Self:
        """Of a trial's newest checkpoint; ``options`` as in :meth:`of`. Raises UserError if it holds no such trial."""
        trial = read_trial(folder)
        sequences, model, params = restored(trial, folder)
        catalogue = Catalogue.of(sequences)
        return cls.of(model, params, sequences.schema, trial.data.history, catalogue=catalogue, **options)

    def export(self, path: Path) -> None:
        """Writes parameters, compiled functions of every size, and the catalogue as one file that :meth:`load` reads.

        From a CPU the functions are lowered for CPU, CUDA and TPU alike, without Pallas kernels; from another machine
        for its own platform.
        """
        from genrec_jax.serve.export import export

        export(self, path)

    @classmethod
    def load(cls, path: Path, *, cache_bytes: int = GIB) -> Self:
        """Of an exported file; needs nothing of the model's code. Raises UserError if it cannot be read."""
        from genrec_jax.serve.export import load

        return cls(**load(path), cache_bytes=cache_bytes)

    def score(self, request: Request) -> np.ndarray:
        """Probabilities [C, A] float32 of the tasks, for each candidate."""
        return self.score_all([request])[0]

    def score_all(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """As :meth:`score` of each in turn; requests of different users share calls, ``lanes`` at a time."""
        return [expit(logits) for logits in self.logits(requests)]

    def logits(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Logits [C, A] float32 of each request, in order. Raises UserError for one that cannot be scored; it, and the
        requests that would have shared its call, then had no effect."""
        out: list[np.ndarray] = []
        for group in _apart(requests, self.shapes.lanes):
            counted = [self.check(request) for request in group]
            out += self._scored([(r, self._prepared(r, events)) for r, events in zip(group, counted)])
        return out

    def check(self, request: Request) -> Events:
        """The events that count for a request, given what is kept of its user. Raises UserError if it cannot be scored.

        That is: ids outside the schema, arrays that do not fit, times that run backwards, and an increment without a
        user, to one of whom nothing is kept, or that begins before the last event kept.
        """
        _check(request, self.schema)
        events = request.events
        if request.append:
            known = self.cache.get(request.user)
            if known is None:
                raise UserError(f"user {request.user!r} has no history here to append to: send it whole")
            if len(known.events) and len(events) and events.time[0] < known.events.time[-1]:
                raise UserError(f"the appended events begin before the last one known of user {request.user!r}")
            events = known.events + events
        if len(events) and request.time < events.time[-1]:
            raise UserError("the request's time lies before its last event's")
        # A copy: what is kept shall not keep alive the longer history it was cut from.
        return events[max(len(events) - self.shapes.history, 0) :].copy()

    def _prepared(self, request: Request, events: Events) -> Entry:
        """The request's user with all events encoded; it is in the cache too, if it fits."""
        known = self.cache.pop(request.user) if request.user is not None else None
        entry = Entry(events, request.context, 0, self.shapes.capacity(len(events)))
        if known is not None and known.layers is not None and self._goes_on(entry, known):
            more = self._slots(entry) - self._slots(known)
            layers = _pad(known.layers, more) if more else known.layers
            entry = dataclasses.replace(entry, tokens=known.tokens, layers=layers)
        del known
        entry = self._encoded(entry, request)
        if request.user is not None:
            self.cache.put(request.user, entry)
        return entry

    def _goes_on(self, entry: Entry, known: Entry) -> bool:
        same = all(np.array_equal(entry.context[name], value) for name, value in known.context.items())
        return same and known.capacity <= entry.capacity and entry.events.starts_with(known.events)

    def _slots(self, entry: Entry) -> int:
        return self.shapes.tokens(entry.capacity)

    def _encoded(self, entry: Entry, request: Request) -> Entry:
        """The entry with its events' keys and values, ``chunk`` by chunk."""
        layers, tokens, n = entry.layers, entry.tokens, len(entry.events)
        if layers is None:
            layers = self.compiled.empty(entry.capacity)
        batch = None
        while tokens < self.shapes.tokens(n):
            if batch is None:
                # One candidate slot: the context is there for someone, also without events.
                asked = dataclasses.replace(request, **_one_candidate(request))
                batch = rows(self.schema, [(asked, entry.events)], entry.capacity, slice(0, 1), 1, 1)
            encoded = max(tokens - self.shapes.context, 0) // self.shapes.tokens_per_event
            chunk = self.shapes.chunk(n - encoded, entry.capacity)
            layers = self.compiled.extend(self.params, layers, batch, np.int32(tokens), chunk=chunk)
            tokens = self.shapes.tokens(min(n, encoded + chunk))
        return dataclasses.replace(entry, layers=layers, tokens=tokens)

    def _scored(self, group: list[tuple[Request, Entry]]) -> list[np.ndarray]:
        """Logits of requests whose entries are complete; those of one capacity share calls."""
        size, tasks = self.shapes.microbatch, len(self.schema.tasks)
        out = [np.zeros((len(request.item), tasks), np.float32) for request, _ in group]
        for capacity in {entry.capacity for _, entry in group}:
            alike = [i for i, (_, entry) in enumerate(group) if entry.capacity == capacity]
            for start in range(0, max(len(group[i][0].item) for i in alike), size):
                part = slice(start, start + size)
                asked = [i for i in alike if len(group[i][0].item) > start]
                lanes = 1 if len(asked) == 1 else self.shapes.lanes
                layers = [group[i][1].layers for i in asked]
                layers += [layers[-1]] * (lanes - len(asked))
                known = [(group[i][0], group[i][1].events) for i in asked]
                batch = rows(self.schema, known, capacity, part, size, lanes)
                logits = np.asarray(self.compiled.score(self.params, tuple(layers), batch))
                for row, i in enumerate(asked):
                    found = out[i][part]
                    found[:] = logits[row, : len(found)]
        return out


def _one_candidate(request: Request) -> dict[str, Any]:
    item = np.ones(1, np.int32)
    features = {name: np.zeros((1, *values.shape[1:]), np.int32) for name, values in request.features.items()}
    return {"item": item, "features": features}


def _apart(requests: Sequence[Request], lanes: int) -> Iterator[list[Request]]:
    """Runs of at most ``lanes`` requests, no two of one user: the second may append to what the first reads."""
    group: list[Request] = []
    for request in requests:
        if len(group) == lanes or (request.user is not None and request.user in {r.user for r in group}):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


_pad = jax.jit(
    lambda layers, more: jax.tree.map(lambda x: jax.numpy.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))), layers),
    static_argnums=1,
)


def _check(request: Request, schema: Schema) -> None:
    events, n, c = request.events, len(request.events), len(request.item)
    if request.append and request.user is None:
        raise UserError("an increment needs a user to append to")
    if events.time.shape != (n,) or events.request.shape != (n,):
        raise UserError(f"the history's {n} items need as many times and requests")
    if events.labels.shape != (n, len(schema.tasks)):
        raise UserError(f"the history's labels must be [{n}, {len(schema.tasks)}], one per event and task")
    if (np.diff(events.time) < 0).any():
        raise UserError("the history's times run backwards")
    for where, items in (("candidate", request.item), ("history", events.item)):
        if len(items) and not (items.min() >= 1 and items.max() < schema.items):
            raise UserError(f"{where} items must be ids from 1 to {schema.items - 1}")
    for feature in schema.item_features:
        _check_feature(feature, request.features, feature_shape(feature, c), "candidates'")
        _check_feature(feature, events.features, feature_shape(feature, n), "history's")
    for feature in schema.context_features:
        _check_feature(feature, request.context, feature_shape(feature, 1)[1:], "request's")


def _check_feature(feature: Feature, given: Mapping[str, np.ndarray], shape: tuple[int, ...], whose: str) -> None:
    ids = given.get(feature.name)
    if ids is None or np.shape(ids) != shape:
        raise UserError(f"the {whose} feature {feature.name!r} must be ids of shape {list(shape)}")
    if ids.size and not (ids.min() >= 0 and ids.max() < feature.vocab):
        raise UserError(f"the {whose} feature {feature.name!r} must be ids from 0 to {feature.vocab - 1}")
