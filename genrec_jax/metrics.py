"""Evaluation on the host in float64: normalised entropy, AUC, grouped AUC; hit rate, NDCG and MRR from ranks.

A metric that the rows do not define (the AUC of constant labels, the entropy of a base rate of 0, anything on a logit
that is not a number) is NaN here and absent from the results: never a made-up value, never an exception.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax.batch import Batch
from genrec_jax.noise import UserSums, clustered_error, entropy, row_losses

CUTOFFS = (10, 50, 200)


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy in nats of logits [R] against labels [R]; NaN without rows."""
    if not len(logits):
        return math.nan
    return float(np.mean(row_losses(logits, labels)))


def normalised_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Log-loss over the entropy of the same rows' base rate (He et al. 2014); NaN if all labels are equal."""
    return log_loss(logits, labels) / float(entropy(np.mean(labels))) if len(labels) else math.nan


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive outscores a negative, ties counting one half; NaN without both classes."""
    areas, _ = _grouped_auc(scores, labels, np.zeros(len(scores), np.int64))
    return float(areas[0]) if len(areas) else math.nan


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """Mean AUC within each user weighted by the user's rows, over users with both classes (Zhou et al. 2018, DIN,
    equation 8); NaN if there is no such user."""
    areas, rows = _grouped_auc(scores, labels, users)
    both = ~np.isnan(areas)
    if np.isnan(scores).any() or not both.any():
        return math.nan
    return float(np.sum(areas[both] * rows[both]) / np.sum(rows[both]))


def _grouped_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of every group (NaN without both classes or with a NaN score) and its number of rows.

    Mann-Whitney: with r the ranks in the group, tied scores sharing their mean rank, and P positives,
    AUC = (sum of the positives' r - P (P + 1) / 2) / (P * negatives).
    """
    if not len(scores):
        return np.empty(0), np.empty(0, np.int64)
    order = np.lexsort((scores, groups))
    scores, positive = np.asarray(scores)[order], np.asarray(labels)[order].astype(np.float64)
    new_group = np.r_[True, np.diff(np.asarray(groups)[order]) != 0]
    group = np.cumsum(new_group) - 1
    start = np.flatnonzero(new_group)
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    first, tie = np.flatnonzero(new_tie), np.cumsum(new_tie) - 1
    last = np.r_[first[1:], len(scores)] - 1
    rank = (first + last)[tie] / 2 + 1 - start[group]
    rows = np.bincount(group)
    positives = np.bincount(group, weights=positive)
    above = np.bincount(group, weights=rank * positive) - positives * (positives + 1) / 2
    pairs = positives * (rows - positives)
    defined = (pairs > 0) & (np.bincount(group, weights=np.isnan(scores)) == 0)
    return np.where(defined, above / np.maximum(pairs, 1), np.nan), rows


def candidate_users(batch: Batch) -> np.ndarray:
    """[B, C]: the user index of every candidate slot (any value at padding)."""
    segment = np.asarray(batch.candidates.segment)
    return np.take_along_axis(np.asarray(batch.user), np.maximum(segment - 1, 0), axis=1)


class RankingMetrics:
    """Gathers scored impressions and reports, per task, ``ne``, ``ne_error``, ``auc``, ``gauc``, ``logloss`` and
    ``base_rate`` (keys ``"auc/like"``), the means of ``ne``, ``auc`` and ``gauc`` over the tasks that define them, and
    the number of ``impressions``. Undefined metrics are absent.

    ``ne_error/like`` is the standard error of ``ne/like`` over the draw of the evaluation users, and ``ne_error`` that
    of the mean ``ne``, tasks being correlated within a user. Neither knows of seeds: all else about the trained model
    is held fixed. Keeps every row: 32 768 impressions of two tasks are 0.7 MB."""

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._users: list[np.ndarray] = []

    def add(self, logits: np.ndarray, labels: np.ndarray, mask: np.ndarray, user: np.ndarray) -> None:
        """logits and labels [..., A]; mask [...] bool, which rows are impressions; user [...]."""
        keep = np.asarray(mask, bool)
        self._logits.append(np.asarray(logits, np.float64)[keep])
        self._labels.append(np.asarray(labels)[keep])
        self._users.append(np.asarray(user)[keep])

    def result(self) -> dict[str, float]:
        """The metrics of all rows added so far."""
        logits, labels, users = self._rows()
        sums = UserSums.of(self.tasks, logits, labels, users)
        influence = sums.influence()
        result: dict[str, float] = {}
        for i, task in enumerate(self.tasks):
            x, y = logits[:, i], labels[:, i]
            result[f"ne/{task}"] = normalised_entropy(x, y)
            result[f"ne_error/{task}"] = clustered_error(influence[:, i])
            result[f"auc/{task}"] = auc(x, y)
            result[f"gauc/{task}"] = gauc(x, y, users)
            result[f"logloss/{task}"] = log_loss(x, y)
            result[f"base_rate/{task}"] = float(np.mean(y)) if len(y) else math.nan
        for name in ("ne", "auc", "gauc"):
            values = [v for task in self.tasks if math.isfinite(v := result[f"{name}/{task}"])]
            result[name] = float(np.mean(values)) if values else math.nan
        result["ne_error"] = clustered_error(sums.mean_influence())
        return _defined(result | {"impressions": len(logits)})

    def sums(self) -> UserSums:
        """What each user adds to NE."""
        return UserSums.of(self.tasks, *self._rows())

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """logits [R, A], labels [R, A], users [R] of all rows added so far."""
        empty = np.empty((0, len(self.tasks)))
        users = np.concatenate([np.empty(0, np.int64), *self._users])
        return np.concatenate([empty, *self._logits]), np.concatenate([empty, *self._labels]), users


def _defined(result: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in result.items() if math.isfinite(value)}


@jax.jit
def target_ranks(scores: jax.Array, targets: jax.Array, seen: jax.Array) -> jax.Array:
    """Rank of each row's target among the whole corpus, 1 for the best; 0 where the target is 0 (padding).

    scores [R, items]; targets [R] int32; seen [R, M] int32 item ids left out of the ranking (0 = none), as is row 0;
    the target itself always takes part. Ties are counted against the target, and so are scores that are not numbers:
    a model that scores every item alike ranks every target last.
    """
    target = jnp.take_along_axis(scores, targets[:, None], axis=1)
    rows = jnp.arange(scores.shape[0])[:, None]
    out = jnp.zeros(scores.shape, bool).at[rows, seen].set(True).at[:, 0].set(True)
    out = out.at[rows, targets[:, None]].set(True)  # the target does not compete with itself
    ahead = jnp.sum(~out & ~(scores < target), axis=1, dtype=jnp.int32)
    return jnp.where(targets > 0, ahead + 1, 0)


class RetrievalMetrics:
    """Gathers target ranks and reports ``hr@k`` (share of ranks up to k), ``ndcg@k`` (mean of 1 / log2(1 + rank), one
    relevant item per row) for k of 10, 50, 200, ``mrr`` (mean of 1 / rank, without a cut-off) and ``impressions``. A
    rank beyond k counts as zero at k, never as missing; without targets the metrics are absent."""

    def __init__(self) -> None:
        self._ranks: list[np.ndarray] = []

    def add(self, ranks: np.ndarray) -> None:
        """ranks [...] int, 1 for the best; 0 marks padding and is skipped."""
        flat = np.asarray(ranks).reshape(-1)
        self._ranks.append(flat[flat > 0])

    def result(self) -> dict[str, float]:
        """The metrics of all ranks added so far."""
        ranks = np.concatenate([np.empty(0), *self._ranks])
        result: dict[str, float] = {"impressions": len(ranks)}
        if not len(ranks):
            return result
        for name, gain in (("hr", np.ones(len(ranks))), ("ndcg", 1 / np.log2(1 + ranks))):
            for k in CUTOFFS:
                result[f"{name}@{k}"] = float(np.mean(gain * (ranks <= k)))
        return result | {"mrr": float(np.mean(1 / ranks))}


type Metrics = RankingMetrics | RetrievalMetrics
