"""Evaluation of a trained model on the rows every architecture shares."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genrec_jax import metrics
from genrec_jax.batch import Batch
from genrec_jax.config import TrainConfig, Trial
from genrec_jax.data.pipeline import EvaluationBatches, evaluation_batches
from genrec_jax.data.sequences import Sequences
from genrec_jax.data.splits import Part
from genrec_jax.distributed.mesh import gathered, rows_of, shares
from genrec_jax.distributed.processes import on_devices, share_of_rows
from genrec_jax.distributed.tables import asked_on, borrow, lent_on, specs_with
from genrec_jax.metrics import Metrics
from genrec_jax.models.base import Ranker, Retriever
from genrec_jax.models.registry import Model
from genrec_jax.nn.stack import divisions
from genrec_jax.train.rows import Place, asked_by, told
from genrec_jax.train.step import bind, pieces_here

_SCORES = 1 << 24  # that are held at a time


class Evaluator:
    """Evaluates a trial's parameters, as often as asked: compiled once, each part's rows cut once."""

    def __init__(self, trial: Trial, sequences: Sequences, model: Model, mesh: Mesh | None = None):
        self._trial = trial
        self._sequences = sequences
        self._model = model
        self._scorer = make_scorer(model, mesh)
        self._rows = batch_rows(trial.train, mesh)
        self._batches = functools.cache(self._cut)

    def _cut(self, part: Part) -> EvaluationBatches:
        return evaluation_batches(self._sequences, self._trial.data, self._trial.model.goal, part, self._rows)

    def fingerprint(self, part: Part) -> str:
        """Which impressions the part holds; see :func:`evaluation_fingerprint`."""
        return self._batches(part).fingerprint

    def unseen(self, part: Part, seen: np.ndarray) -> int:
        """How many of the part's impressions are of items that training has not ``seen`` [items]."""
        return self._batches(part).unseen(seen)

    def __call__(self, params: Any, part: Part) -> dict[str, float]:
        """As :func:`evaluate`. Raises UserError naming the dataset and the part if it is empty."""
        return self.each([params], part)[0].result()

    def each(self, params: Sequence[Any], part: Part) -> list[Metrics]:
        """As :func:`evaluate_each`, and as above."""
        return evaluate_each(self._model, self._scorer, params, self._batches(part), self._sequences.schema.tasks)


def batch_rows(train: TrainConfig, mesh: Mesh | None = None) -> int:
    """Rows of a batch that is evaluated: as in training, the parts of a batch are worked on one after another."""
    return train.batch_rows // pieces_here(train, mesh) * shares(mesh)


def make_scorer(model: Model, mesh: Mesh | None = None) -> Callable[[Any, Batch], jax.Array]:
    """The jitted :func:`scoring`; every process is given the whole batch on the host and gets all of its scores."""
    scorer = jax.jit(scoring(model, mesh))
    if mesh is None:
        return scorer

    def scored_on(params: Any, batch: Batch) -> jax.Array:
        rows = len(batch.user)
        share = share_of_rows(mesh, rows)
        return scorer(params, on_devices(mesh, jax.tree.map(lambda x: x[share], batch), rows))

    return scored_on


def scoring(model: Model, mesh: Mesh | None = None) -> Callable[[Any, Batch], jax.Array]:
    """(params, batch) -> logits [B, C, A] of a ranker, or target ranks [B, S] (1 = best) of a retriever.

    The devices of a ``mesh`` share the rows, and each gets all scores.
    """

    def score(params: Any, batch: Batch, at_hand: dict[Place, jax.Array] | None = None) -> jax.Array:
        bound = told(bind(model, params), at_hand or {})
        return bound(batch) if isinstance(bound, Ranker) else _ranks(bound, batch)

    if mesh is None:
        return score
    rows, on_mesh = rows_of(mesh), functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def score_on(params: Any, batch: Batch) -> jax.Array:
        params, ids = _lent(mesh, model, params, batch) if isinstance(model, Ranker) else (params, {})
        specs, gathers = specs_with(mesh, params, ids)
        whole = functools.partial(gathered, mesh, specs=gathers, divided=divisions(model))

        def local(params: Any, batch: Batch, ids: dict[Place, jax.Array]) -> jax.Array:
            return score(whole(params), batch, ids)

        scores = on_mesh(local, in_specs=(specs, rows, rows), out_specs=rows)(params, batch, ids)
        return jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))

    return score_on


def _lent(mesh: Mesh, model: Ranker, params: Any, batch: Batch) -> tuple[Any, dict[Place, jax.Array]]:
    """The parameters with what each device's rows of a batch read of large tables in place of these, and which rows
    they are. A retriever reads its table whole."""

    def asked(params: Any, batch: Batch) -> dict[Place, jax.Array]:
        bound = bind(model, params)
        return asked_by(bound, lambda: bound(batch))

    found = asked_on(mesh, model, asked, params, (rows_of(mesh),), batch)
    params, lent = borrow(mesh, params, {path: found[path] for path in lent_on(mesh, params, found)})
    return params, {path: own.ids for path, own in lent.items()}


def users_at_once(items: int) -> int:
    """How many users a device scores all ``items`` for at a time."""
    return max(1, _SCORES // items)


def _ranks(model: Model, batch: Batch) -> jax.Array:
    """Rank [B, S] of each segment's first candidate among all items, those of its history left out; 0 without one."""
    assert isinstance(model, Retriever)
    segments = batch.user.shape[1]
    users, items = model.users(batch), model.items()
    first = slice(None, None, batch.candidates.item.shape[1] // segments)
    target = jnp.where(batch.candidates.segment > 0, batch.candidates.item, 0)[:, first]
    own = batch.history.segment[:, None, :] == jnp.arange(1, segments + 1)[:, None]
    seen = jnp.where(own, batch.history.item[:, None, :], 0)

    def ranks(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        user, wanted, left_out = one
        return metrics.target_ranks(user @ items.T, wanted, left_out)

    flat = [x.reshape(-1, *x.shape[2:]) for x in (users, target, seen)]
    at_once = users_at_once(len(items))
    if at_once >= len(flat[0]):
        return ranks((flat[0], flat[1], flat[2])).reshape(target.shape)
    short = -len(flat[0]) % at_once
    parts = [jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, at_once, *x.shape[1:]) for x in flat]
    return jax.lax.map(ranks, tuple(parts)).reshape(-1)[: target.size].reshape(target.shape)


def evaluate(
    model: Model,
    scorer: Callable[[Any, Batch], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    tasks: tuple[str, ...],
) -> dict[str, float]:
    """Metrics by name (``ne/like``, ``auc``, ``hr@10``, ...); absent where a metric is undefined on these rows."""
    return evaluate_each(model, scorer, [params], batches, tasks)[0].result()


def evaluate_each(
    model: Model,
    scorer: Callable[[Any, Batch], jax.Array],
    params: Sequence[Any],
    batches: Iterable[Batch],
    tasks: tuple[str, ...],
) -> list[Metrics]:
    """The metrics of several parameters of one model, which share the batches."""
    if isinstance(model, Retriever):
        retrieval = [metrics.RetrievalMetrics() for _ in params]
        for batch in batches:
            for ranks, own in zip([scorer(p, batch) for p in params], retrieval):
                own.add(np.asarray(ranks))
        return list(retrieval)
    return list(scored(scorer, params, batches, tasks))


def scored(
    scorer: Callable[[Any, Batch], jax.Array], params: Sequence[Any], batches: Iterable[Batch], tasks: tuple[str, ...]
) -> list[metrics.RankingMetrics]:
    """Every impression of ``batches`` with a ranker's logits, by each of ``params``."""
    ranking = [metrics.RankingMetrics(tasks) for _ in params]
    for batch in batches:
        real = np.asarray(batch.candidates.segment) > 0
        users = metrics.candidate_users(batch)
        for logits, own in zip([scorer(p, batch) for p in params], ranking):
            own.add(np.asarray(logits), np.asarray(batch.candidates.labels), real, users)
    return ranking
