"""Metrics against hand-computed values and brute-force loops."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax import metrics
from genrec_jax.batch import Batch, Candidates, Context, History


def pair_auc(scores, labels):
    """AUC by comparing every positive with every negative."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return np.mean(pairs) if pairs else math.nan


def loop_gauc(scores, labels, users):
    total = weight = 0.0
    for user in np.unique(users):
        rows = users == user
        value = pair_auc(scores[rows], labels[rows])
        if not math.isnan(value):
            total, weight = total + value * rows.sum(), weight + rows.sum()
    return total / weight


def test_auc_by_hand():
    assert metrics.auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert metrics.auc(np.array([1.0, 1.0]), np.array([0, 1])) == 0.5
    assert metrics.auc(np.array([2.0, 1.0]), np.array([1, 0])) == 1.0


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_auc_and_gauc_match_loops_with_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 300).astype(np.float64)
    labels, users = rng.integers(0, 2, 300), rng.integers(0, 80, 300) * 7 - 3
    assert metrics.auc(scores, labels) == pytest.approx(pair_auc(scores, labels), rel=1e-12)
    assert metrics.gauc(scores, labels, users) == pytest.approx(loop_gauc(scores, labels, users), rel=1e-12)


def test_auc_tells_neighbouring_floats_apart():
    scores = np.array([1.0, np.nextafter(1.0, 2.0)])
    assert metrics.auc(scores, np.array([0, 1])) == 1.0


def test_gauc_leaves_out_users_of_one_class():
    scores, labels = np.array([3.0, 1.0, 2.0, 9.0, 0.0, 1.0]), np.array([1, 0, 1, 1, 0, 1])
    users = np.array([0, 0, 0, 5, 9, 9])  # user 0: AUC 1 on 3 rows; user 5: positives only; user 9: AUC 1 on 2 rows
    assert metrics.gauc(scores, labels, users) == 1.0
    assert metrics.gauc(-scores, labels, users) == 0.0
    worse = np.array([3.0, 2.5, 2.0, 9.0, 0.0, 1.0])  # user 0 falls to 0.5
    assert metrics.gauc(worse, labels, users) == pytest.approx((0.5 * 3 + 1.0 * 2) / 5)


def test_normalised_entropy_of_the_base_rate_is_one():
    labels = np.array([1, 0, 0, 0, 0])
    assert metrics.normalised_entropy(np.full(5, np.log(0.2 / 0.8)), labels) == pytest.approx(1.0, rel=1e-12)
    assert metrics.normalised_entropy(np.zeros(5), labels) == pytest.approx(
        np.log(2) / -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    )


def test_log_loss_by_hand_and_without_overflow():
    assert metrics.log_loss(np.log([3.0, 1.0]), np.array([1, 0])) == pytest.approx(-np.log([0.75, 0.5]).mean())
    assert metrics.log_loss(np.array([1e4, -1e4]), np.array([0, 0])) == 5e3


def test_streaming_equals_one_pass_and_masks():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 8, 2)).astype(np.float32)
    labels, mask = rng.integers(0, 2, (40, 8, 2)).astype(np.uint8), rng.random((40, 8)) < 0.7
    users = np.broadcast_to(rng.integers(0, 12, (40, 1)), (40, 8))
    logits[~mask] = np.nan
    stream = metrics.RankingMetrics(("like", "long"))
    for rows in np.split(np.arange(40), 5):
        stream.add(jnp.asarray(logits[rows]), labels[rows], mask[rows], users[rows])
    result = stream.result()
    x, y, u = logits[mask].astype(np.float64), labels[mask], users[mask]
    assert result["impressions"] == mask.sum()
    for i, task in enumerate(("like", "long")):
        assert result[f"auc/{task}"] == pytest.approx(pair_auc(x[:, i], y[:, i]))
        assert result[f"gauc/{task}"] == pytest.approx(loop_gauc(x[:, i], y[:, i], u))
        assert result[f"logloss/{task}"] == pytest.approx(metrics.log_loss(x[:, i], y[:, i]))
        assert result[f"ne/{task}"] == pytest.approx(metrics.normalised_entropy(x[:, i], y[:, i]))
        assert result[f"base_rate/{task}"] == pytest.approx(y[:, i].mean())
    for name in ("ne", "auc", "gauc"):
        assert result[name] == pytest.approx((result[f"{name}/like"] + result[f"{name}/long"]) / 2)
    json.dumps(result)


def test_undefined_metrics_are_absent():
    stream = metrics.RankingMetrics(("like", "long"))
    assert stream.result() == {"impressions": 0}
    labels = np.array([[0, 1], [0, 0], [0, 1]])
    stream.add(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]), labels, np.ones(3, bool), np.array([1, 1, 2]))
    result = stream.result()
    assert {"ne/like", "auc/like", "gauc/like"}.isdisjoint(result)
    assert result["base_rate/like"] == 0.0
    assert result["logloss/like"] > 0
    assert result["auc"] == result["auc/long"] == 1.0  # means run over the tasks that define them


def test_a_diverged_model_has_no_metrics():
    stream = metrics.RankingMetrics(("like",))
    logits, labels = np.array([[np.nan], [1.0], [0.0], [2.0]]), np.array([[1], [0], [1], [0]])
    stream.add(logits, labels, np.ones(4, bool), np.zeros(4))
    assert stream.result() == {"base_rate/like": 0.5, "impressions": 4}


def test_candidate_users():
    zeros = np.zeros((1, 4), np.int32)
    labels = np.zeros((1, 4, 1), np.uint8)
    history = History(zeros, zeros, labels, zeros, zeros > 0, zeros, {})
    candidates = Candidates(zeros, zeros, labels, np.array([[1, 1, 2, 0]]), zeros, {})
    batch = Batch(np.array([[7, 9]]), Context({}), history, candidates)
    assert metrics.candidate_users(batch)[0, :3].tolist() == [7, 7, 9]


def test_target_ranks_by_loop():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 12, (6, 30)).astype(np.float32)  # many ties
    targets = np.array([3, 1, 29, 7, 7, 0], np.int32)
    seen = rng.integers(0, 30, (6, 5)).astype(np.int32)
    seen[1, 0] = 1  # a repeated item is still ranked
    ranks = np.asarray(metrics.target_ranks(jnp.asarray(scores), jnp.asarray(targets), jnp.asarray(seen)))
    for r in range(5):
        rivals = [i for i in range(1, 30) if i != targets[r] and i not in seen[r]]
        assert ranks[r] == 1 + sum(scores[r, i] >= scores[r, targets[r]] for i in rivals)
    assert ranks[5] == 0


def test_collapsed_and_diverged_retrievers_rank_last():
    targets, seen = jnp.array([4], jnp.int32), jnp.array([[2, 0]], jnp.int32)
    for value in (0.0, np.nan):
        assert metrics.target_ranks(jnp.full((1, 10), value), targets, seen).tolist() == [8]  # 9 items less one seen


def test_retrieval_metrics_by_hand():
    stream = metrics.RetrievalMetrics()
    assert stream.result() == {"impressions": 0}
    stream.add(np.array([1, 10, 0]))
    stream.add(jnp.array([[11], [1000]]))
    result = stream.result()
    assert result["impressions"] == 4
    assert (result["hr@10"], result["hr@50"], result["hr@200"]) == (0.5, 0.75, 0.75)
    assert result["ndcg@10"] == pytest.approx((1 + 1 / np.log2(11)) / 4)
    assert result["ndcg@50"] == result["ndcg@200"] == pytest.approx((1 + 1 / np.log2(11) + 1 / np.log2(12)) / 4)
    assert result["mrr"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 1000) / 4)
