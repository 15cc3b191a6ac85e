"""The best possible predictions in a synthetic world, by exact filtering, and the normalised entropies they reach.

The forward algorithm of a hidden Markov model (Rabiner, Proc. IEEE 1989, section III.A) over h = (z, s) of each
domain, for many histories at once. A belief is a row [H] of P(h | seen); an event multiplies that of its item's domain
by P(labels | h, item); a step from one request to the next mixes s with the uniform distribution in every domain.
Domains are independent a priori and no event depends on two, so they stay independent. Dimensions: R requests (distinct
histories), M impressions, G domains, H = Z S, A tasks.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genrec_jax.data.sequences import Sequences, load, scan
from genrec_jax.data.splits import in_ranges
from genrec_jax.data.synthetic.tables import Items, Labels, item_tables, label_tables
from genrec_jax.data.synthetic.world import SESSION_GAP, World
from genrec_jax.errors import UserError

# Requests filtered together: beliefs of 64 states then fill a few megabytes.
_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class Truth:
    """Floors of the normalised entropy on M impressions, one number per task (in the schema's order).

    history: events a predictor may see (None: all before the request). base_rate: mean label. bayes_ne: the best that
    can be expected of a predictor that sees them, the region, the items and the times. item_ne: the same for one that
    knows the item alone. oracle_ne: given the hidden state. These three are expectations over labels; ``*_realised`` is
    the log-loss of the same predictions on the labels as they fell, to be held against a model's on the same rows. All
    are divided by the entropy of base_rate.
    """

    history: int | None
    impressions: int
    tasks: tuple[str, ...]
    base_rate: tuple[float, ...]
    item_ne: tuple[float, ...]
    bayes_ne: tuple[float, ...]
    oracle_ne: tuple[float, ...]
    bayes_realised: tuple[float, ...]
    oracle_realised: tuple[float, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Means over tasks of the five entropies, by field name."""
        names = ("item_ne", "bayes_ne", "oracle_ne", "bayes_realised", "oracle_realised")
        return {name: float(np.mean(getattr(self, name))) for name in names}

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mean": self.mean}


def truth(
    dataset: Sequences | str | Path, impressions: np.ndarray, request_start: np.ndarray, history: int | None = None
) -> Truth:
    """The floors of a predictor that sees, for event ``impressions[m]``, the ``history`` events of the same user before
    event ``request_start[m]`` (None: all of them), and the request's region, items and time, but none of its labels.

    dataset: a folder made by :func:`generate`. impressions, request_start [M] int64: event indices. Raises UserError if
    the dataset is not synthetic, a history does not end where the impression's request begins (or inside it), or a
    task's label is constant on the impressions.
    """
    return truths(dataset, impressions, request_start, (history,))[0]


def truths(
    dataset: Sequences | str | Path, impressions: np.ndarray, request_start: np.ndarray, histories: Iterable[int | None]
) -> tuple[Truth, ...]:
    """:func:`truth` for several histories."""
    view, impressions, request_start = _view(dataset, impressions, request_start)
    labels = np.asarray(view.sequences.labels[impressions], np.float64)
    base = labels.mean(axis=0) if len(labels) else np.zeros(len(view.world.tasks))
    for name, rate in zip(view.world.tasks, base):
        if not 0 < rate < 1:
            raise UserError(f"task {name!r} has no entropy: its label is constant on the {len(labels)} impressions")
    oracle = _oracle_probabilities(view, impressions)
    item = view.labels.rate.mean(axis=1)[view.kinds(impressions)]

    def ratio(target: np.ndarray, probability: np.ndarray) -> tuple[float, ...]:
        return tuple((_log_loss(target, probability) / _log_loss(base, base)).tolist())

    def found(history: int | None) -> Truth:
        bayes = _bayes_probabilities(view, impressions, request_start, history)
        return Truth(
            history=history,
            impressions=len(impressions),
            tasks=view.world.tasks,
            base_rate=tuple(base.tolist()),
            item_ne=ratio(item, item),
            bayes_ne=ratio(bayes, bayes),
            oracle_ne=ratio(oracle, oracle),
            bayes_realised=ratio(labels, bayes),
            oracle_realised=ratio(labels, oracle),
        )

    return tuple(found(history) for history in histories)


def bayes_probabilities(
    dataset: Sequences | str | Path, impressions: np.ndarray, request_start: np.ndarray, history: int | None = None
) -> np.ndarray:
    """[M, A] float64 P(label = 1 | what may be seen), arguments and errors as in :func:`truth`."""
    return _bayes_probabilities(*_view(dataset, impressions, request_start), history)


def oracle_probabilities(dataset: Sequences | str | Path, impressions: np.ndarray) -> np.ndarray:
    """[M, A] float64 P(label = 1 | hidden state, item) of the events ``impressions`` [M]."""
    return _oracle_probabilities(*_view(dataset, impressions, impressions)[:2])


def read_world(path: str | Path) -> World:
    """The parameters a dataset folder was generated from. Raises UserError if it is not synthetic."""
    file = Path(path) / "truth.json"
    try:
        return World.from_json(json.loads(file.read_text(encoding="utf-8"))["world"])
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path} has no known answer: {file.name} is missing or damaged") from None


@dataclasses.dataclass(frozen=True)
class _View:
    """Some users of a dataset, in memory, with the tables of their world."""

    sequences: Sequences
    world: World
    labels: Labels
    items: Items
    state: np.ndarray

    @functools.cached_property
    def likelihood(self) -> np.ndarray:
        """[C Q P, H] P(label pattern | kind, h): one contiguous row per kind of event."""
        return np.ascontiguousarray(np.moveaxis(self.labels.pattern, -1, 1).reshape(-1, self.labels.pattern.shape[1]))

    def kinds(self, event: np.ndarray) -> np.ndarray:
        """[n] kinds of the events' items."""
        return self.items.kind[self.sequences.item[event]]

    def codes(self, event: np.ndarray) -> np.ndarray:
        """[n] rows of :attr:`likelihood` of the events' items and labels."""
        tasks = len(self.world.tasks)
        pattern = self.sequences.labels[event] @ (1 << np.arange(tasks))
        return self.kinds(event) * 2**tasks + pattern

    def persistence(self, event: np.ndarray) -> np.ndarray:
        """[n] probability that the interest is kept from the event before (of the same user) to this one."""
        request, time = self.sequences.request, self.sequences.time
        assert request is not None
        same = request[event] == request[event - 1]
        long = time[event] - time[event - 1] >= SESSION_GAP
        return np.where(same, 1.0, np.where(long, self.world.long_persistence, self.world.persistence))

    def prior(self, user: np.ndarray) -> np.ndarray:
        """[n, G, H] P(h | region), before any event; the region tells of domain 0."""
        world = self.world
        belief = np.full((len(user), world.domains, world.types * world.states), 1 / (world.types * world.states))
        likelihood = self.labels.region[self.sequences.features["region"][user] - 1]
        type_nz = likelihood / likelihood.sum(axis=1, keepdims=True)
        belief[:, 0] = np.repeat(type_nz, world.states, axis=1) / world.states
        return belief


def _view(
    dataset: Sequences | str | Path, impressions: np.ndarray, request_start: np.ndarray
) -> tuple[_View, np.ndarray, np.ndarray]:
    """The users of the impressions, and the two lists of events by their numbers among those users' events.

    The users' events are copied: of a column that is mapped, a look-up here and there leaves far more pages resident.
    """
    sequences = dataset if isinstance(dataset, Sequences) else load(dataset)
    world = read_world(sequences.path)
    file = sequences.path / "truth/state.npy"
    try:
        state = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    impressions, request_start = np.asarray(impressions, np.int64), np.asarray(request_start, np.int64)
    _check_request(sequences, impressions, request_start)
    owners = [_users(sequences, event) for event in (impressions, request_start)]
    users = np.unique(np.concatenate(owners))
    start, stop = sequences.offsets[users], sequences.offsets[users + 1]
    offsets = np.concatenate([[0], np.cumsum(stop - start)])
    moved = [
        event - sequences.offsets[owner] + offsets[np.searchsorted(users, owner)]
        for event, owner in zip((impressions, request_start), owners)
    ]
    assert sequences.request is not None
    columns = (sequences.item, sequences.time, sequences.labels, sequences.request, state)
    blocks = [
        [part[chosen] for part in parts]
        for first, parts in scan(*columns)
        if (chosen := in_ranges(start, stop, first, len(parts[0]))).any()
    ]
    blocks.append([column[:0] for column in columns])
    item, time, labels, request, state = (np.concatenate(column) for column in zip(*blocks))
    features = {**sequences.features, "region": sequences.features["region"][users]}
    some = dataclasses.replace(
        sequences, offsets=offsets, item=item, time=time, labels=labels, request=request, features=features
    )
    return _View(some, world, label_tables(world), item_tables(world), state), *moved


def _oracle_probabilities(view: _View, impressions: np.ndarray) -> np.ndarray:
    return view.labels.rate[view.kinds(impressions), view.state[impressions]]


def _bayes_probabilities(
    view: _View, impressions: np.ndarray, request_start: np.ndarray, history: int | None
) -> np.ndarray:
    if history is not None and history < 0:
        raise UserError(f"a history of {history} events is impossible")
    stops, row = np.unique(request_start, return_inverse=True)
    order = np.argsort(row, kind="stable")
    bounds = np.searchsorted(row[order], np.arange(len(stops) + 1))
    result = np.empty((len(impressions), len(view.world.tasks)))
    users = _users(view.sequences, stops)
    for begin, end in _chunks(users):
        belief = _beliefs(view, users[begin:end], stops[begin:end], history)
        chosen = order[bounds[begin] : bounds[end]]
        kind = view.kinds(impressions[chosen])
        seen = belief[row[chosen] - begin, view.labels.domain[kind]]
        result[chosen] = np.einsum("mh,mha->ma", seen, view.labels.rate[kind])
    return result


def _check_request(sequences: Sequences, impressions: np.ndarray, request_start: np.ndarray) -> None:
    """Refuses a history that ends requests before the impression: what was between them would be unseen."""
    if impressions.shape != request_start.shape or impressions.ndim != 1:
        raise UserError("impressions and request_start must be two lists of event indices of one length")
    for index in (impressions, request_start):
        if len(index) and not 0 <= index.min() <= index.max() < sequences.events:
            raise UserError(f"an event index is outside 0..{sequences.events - 1}")
    assert sequences.request is not None
    wrong = (
        (_users(sequences, impressions) != _users(sequences, request_start))
        | (sequences.request[impressions] != sequences.request[request_start])
        | (request_start > impressions)
    )
    if wrong.any():
        m = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"impression {impressions[m]}: its history ends at event {request_start[m]}, not at its request"
        )


def _users(sequences: Sequences, event: np.ndarray) -> np.ndarray:
    return np.searchsorted(sequences.offsets, event, side="right") - 1


def _chunks(users: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of about _CHUNK requests that never part a user's, so that a chunk can build each belief on the last."""
    begin = 0
    while begin < len(users):
        target = min(begin + _CHUNK, len(users))
        end = int(np.searchsorted(users, users[target - 1], side="right"))
        yield begin, end
        begin = end


def _beliefs(view: _View, users: np.ndarray, stops: np.ndarray, history: int | None) -> np.ndarray:
    """[R, G, H] P(h at the request that begins at event ``stops`` | history); users and stops ascending."""
    opened = view.sequences.offsets[users]
    belief = view.prior(users)
    if history is not None:
        opened = np.maximum(opened, stops - history)
        return _filter(view, belief, opened, stops)
    # All histories of a user begin alike: each continues from the belief at the user's request before it.
    rank = np.arange(len(users)) - np.searchsorted(users, users)
    for turn in range(int(rank.max()) + 1):
        rows = np.flatnonzero(rank == turn)
        start = belief[rows - 1] if turn else belief[rows]
        begin = stops[rows - 1] if turn else opened[rows]
        belief[rows] = _filter(view, start, begin, stops[rows])
    return belief


def _filter(view: _View, belief: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Beliefs [R, G, H] at the time of event ``begin`` brought to the time of event ``end``, whose labels are unseen.

    Rows are taken longest first and aligned at their ends, so that those with an event at a step are the first ones.
    """
    order = np.argsort(begin - end, kind="stable")
    belief, begin, end = belief[order], begin[order], end[order]
    length = end - begin
    # Steps mix a belief with the uniform one, so several in a row are one: their persistences are multiplied, and
    # applied to a domain only when it is next needed.
    keep = np.ones(belief.shape[:2])
    for remaining in range(int(length[0]), 0, -1):
        active = int(np.searchsorted(-length, -remaining, side="right"))
        event = end[:active] - remaining
        stepped = event > begin[:active]  # the step to event ``begin`` is in the belief already
        keep[:active] *= np.where(stepped, view.persistence(event), 1.0)[:, None]
        code = view.codes(event)
        cell = (np.arange(active), view.labels.domain[code >> len(view.world.tasks)])
        updated = _mix(view, belief[cell], keep[cell])
        updated *= view.likelihood[code]
        updated /= updated.sum(axis=1, keepdims=True)
        belief[cell] = updated
        keep[cell] = 1.0
    keep *= np.where(end > begin, view.persistence(end), 1.0)[:, None]
    states = belief.shape[-1]
    result = np.empty_like(belief)
    result[order] = _mix(view, belief.reshape(-1, states), keep.ravel()).reshape(belief.shape)
    return result


def _mix(view: _View, belief: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Beliefs [n, H] after interests were kept with probability keep [n] and drawn afresh, uniformly, otherwise."""
    if (keep == 1.0).all():
        return belief
    belief_nzs = belief.reshape(len(belief), view.world.types, view.world.states)
    fresh = belief_nzs.mean(axis=2, keepdims=True)
    keep = keep[:, None, None]
    return (keep * belief_nzs + (1.0 - keep) * fresh).reshape(belief.shape)


def _log_loss(target: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """[A] mean over rows of the binary cross-entropy in nats (a target may be a probability)."""
    loss = -(target * np.log(probability) + (1 - target) * np.log1p(-probability))
    return loss.reshape(-1, loss.shape[-1]).mean(axis=0)
