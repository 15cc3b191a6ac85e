"""Evaluation of a trained model on the rows every architecture shares."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax import metrics
from genrec_jax.batch import Batch
from genrec_jax.models.base import Ranker, Retriever
from genrec_jax.models.registry import Model
from genrec_jax.train.step import bind


def make_scorer(model: Model) -> Callable[[Any, Batch], jax.Array]:
    """The jitted (params, batch) -> logits [B, C, A] of a ranker, or target ranks [B] (1 = best) of a retriever."""
    if isinstance(model, Ranker):
        return jax.jit(lambda params, batch: bind(model, params)(batch))
    return jax.jit(lambda params, batch: _ranks(bind(model, params), batch))


def _ranks(model: Model, batch: Batch) -> jax.Array:
    """Rank of each row's first candidate among all items, the items of the row's history left out."""
    assert isinstance(model, Retriever)
    scores = jnp.einsum("bd,vd->bv", model.users(batch)[:, 0], model.items())
    return metrics.target_ranks(scores, batch.candidates.item[:, 0], batch.history.item)


def evaluate(
    model: Model,
    scorer: Callable[[Any, Batch], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    tasks: tuple[str, ...],
) -> dict[str, float]:
    """Metrics by name (``ne/like``, ``auc``, ``hr@10``, ...); absent where a metric is undefined on these rows."""
    if isinstance(model, Retriever):
        retrieval = metrics.RetrievalMetrics()
        for batch in batches:
            real = np.asarray(batch.candidates.segment)[:, 0] > 0
            retrieval.add(np.asarray(scorer(params, batch))[real])
        return retrieval.result()
    ranking = metrics.RankingMetrics(tasks)
    for batch in batches:
        real = np.asarray(batch.candidates.segment) > 0
        users = metrics.candidate_users(batch)
        ranking.add(np.asarray(scorer(params, batch)), np.asarray(batch.candidates.labels), real, users)
    return ranking.result()
