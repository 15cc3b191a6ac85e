"""Requests as plain dictionaries, and their packing into batches, shared by the tests of the pointwise models."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax.batch import Batch, Candidates, Context, History

DAY = 86_400


def random_requests(count, *, candidates=3, seed=0, lengths=(0, 5, 1, 12)):
    """Requests as plain dictionaries; the first has no history."""
    rng = np.random.default_rng(seed)

    def items(n):
        ids = rng.integers(0, 12, (n, 3)) * (rng.random((n, 3)) < 0.7)
        return {"genres": ids.astype(np.int32), "brand": rng.integers(0, 6, n).astype(np.int32)}

    requests = []
    for i in range(count):
        n = lengths[i % len(lengths)]
        times = np.sort(rng.integers(0, 40 * DAY, n + 1)).astype(np.int32)
        requests.append(
            {
                "user": i,
                "country": int(rng.integers(0, 5)),
                "item": rng.integers(1, 30, n).astype(np.int32),
                "time": times[:-1],
                "labels": rng.integers(0, 2, (n, 2)).astype(np.uint8),
                "features": items(n),
                "request_time": times[-1],
                "candidates": rng.integers(1, 30, candidates).astype(np.int32),
                "candidate_features": items(candidates),
                "candidate_labels": rng.integers(0, 2, (candidates, 2)).astype(np.uint8),
            }
        )
    return requests


def pack(requests, *, segments, history, padding=0):
    """A Batch of ``segments`` requests per row; ``padding`` fills every slot that belongs to none."""
    k, b = len(requests[0]["candidates"]), math.ceil(len(requests) / segments)

    def empty(*shape, dtype=np.int32):
        return np.full((b, *shape), padding, dtype)

    n, c = (history,), (segments * k,)
    past = History(
        empty(*n),
        empty(*n),
        empty(*n, 2, dtype=np.uint8),
        np.zeros((b, *n), np.int32),
        np.zeros((b, *n), bool),
        np.zeros((b, *n), np.int32),
        {"genres": empty(*n, 3), "brand": empty(*n)},
    )
    slots = Candidates(
        empty(*c),
        empty(*c),
        empty(*c, 2, dtype=np.uint8),
        np.zeros((b, *c), np.int32),
        np.zeros((b, *c), np.int32),
        {"genres": empty(*c, 3), "brand": empty(*c)},
    )
    user, country, used = np.full((b, segments), -1, np.int32), empty(segments), [0] * b
    for i, r in enumerate(requests):
        row, s = divmod(i, segments)
        h, v = slice(used[row], used[row] + len(r["item"])), slice(s * k, (s + 1) * k)
        used[row] = h.stop
        past.item[row, h], past.time[row, h], past.labels[row, h] = r["item"], r["time"], r["labels"]
        past.segment[row, h], slots.segment[row, v] = s + 1, s + 1
        past.before[row, h], slots.before[row, v] = np.arange(len(r["item"])), len(r["item"])
        slots.item[row, v], slots.time[row, v] = r["candidates"], r["request_time"]
        slots.labels[row, v] = r["candidate_labels"]
        for name in ("genres", "brand"):
            past.features[name][row, h] = r["features"][name]
            slots.features[name][row, v] = r["candidate_features"][name]
        user[row, s], country[row, s] = r["user"], r["country"]
    return jax.tree.map(jnp.asarray, Batch(user, Context({"country": country}), past, slots))
