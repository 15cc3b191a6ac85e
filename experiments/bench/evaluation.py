"""Times one full-corpus evaluation of HSTU-large by its ML-1M recipe: 6,040 users, each against all 3,883 items.

The log is random, with as many users and items as MovieLens-1M and lengths like its own (20 events or more, a median of
96, a mean of 165), so that no data are needed.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.recipes import read
from genrec_jax.config import override
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences, save
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.evaluate import Evaluator

USERS, ITEMS = 6040, 3883


def make_log(folder: Path) -> Sequences:
    """A random log without labels, as large as MovieLens-1M."""
    rng = np.random.default_rng(0)
    lengths = (20 + np.exp(np.log(76) + 1.05 * rng.normal(size=USERS))).clip(max=2000).astype(np.int64)
    events = int(lengths.sum())
    gaps = np.exp(3 * rng.normal(size=events) + 2).clip(max=1e6)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seconds = np.concatenate([np.cumsum(own) for own in np.split(gaps, offsets[1:-1])]).clip(max=2**30)
    return save(
        folder,
        name="random",
        schema=Schema(items=ITEMS + 1, tasks=()),
        origin=0,
        offsets=offsets,
        item=rng.integers(1, ITEMS + 1, events),
        time=seconds,
        labels=np.zeros((events, 0)),
    )


def run(repeats: int = 3) -> dict[str, float]:
    """Median seconds of an evaluation once compiled, and those of the first."""
    with tempfile.TemporaryDirectory() as scratch:
        sequences = make_log(Path(scratch) / "log")
        recipe = read("ml-1m-hstu-large")
        trial = override(recipe.trial("honest", 0), {"data.path": str(sequences.path)})
        evaluator = Evaluator(trial, sequences, abstract_model(trial, sequences.schema))
        params = init_params(trial, sequences.schema)
        seconds = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            found = evaluator(params, "test")
            seconds.append(time.perf_counter() - start)
        assert found["impressions"] == USERS
    return {"first_seconds": seconds[0], "seconds": statistics.median(seconds[1:])}
