"""Small datasets, written as dataset folders."""

from pathlib import Path

import numpy as np

from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.sequences import Sequences, save

FEATURES = (
    Feature("country", vocab=9, width=1, level="user"),
    Feature("genres", vocab=9, width=2, level="item"),
    Feature("device", vocab=9, width=1, level="event"),
)


def dataset(
    path: Path, times: list[list[int]], requests: list[list[int]] | None = None, name: str = "tiny"
) -> Sequences:
    """Users with events at the given times; event e (0-based, over the whole file) shows item e + 1."""
    events = sum(map(len, times))
    rng = np.random.default_rng(0)
    return save(
        path,
        name=name,
        schema=Schema(items=events + 1, tasks=("click", "like"), features=FEATURES),
        origin=0,
        offsets=np.cumsum([0, *map(len, times)]),
        item=np.arange(1, events + 1),
        time=np.concatenate([np.asarray(t, np.int32) for t in times]),
        labels=rng.integers(0, 2, (events, 2)),
        request=None if requests is None else np.concatenate([np.asarray(r, np.int32) for r in requests]),
        features={
            "country": rng.integers(1, 9, len(times)),
            "genres": np.concatenate([np.full((1, 2), 7), rng.integers(1, 9, (events, 2))]),
            "device": rng.integers(1, 9, events),
        },
    )


def random_dataset(path: Path, users: int = 40, longest: int = 30, requests: bool = False, seed: int = 0) -> Sequences:
    """Users with 0 to ``longest`` events at random times (with ties), in requests of 1 to 5 events if asked."""
    rng = np.random.default_rng(seed)
    times = [sorted(rng.integers(0, 200, rng.integers(0, longest + 1)).tolist()) for _ in range(users)]
    ids = [np.repeat(np.arange(len(t) + 1), rng.integers(1, 6, len(t) + 1))[: len(t)].tolist() for t in times]
    return dataset(path, times, ids if requests else None, name="random")


def owner(sequences: Sequences) -> np.ndarray:
    """[E] the user of every event."""
    return np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
