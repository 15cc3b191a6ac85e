"""Training on histories of 4,096 events with Stochastic Length at alpha 1.6 against training on whole ones.

Both train the same model on the same users, by the lab's own stream and step; thinned histories are packed, several
users in a row of 4,096 slots. One pass over the thinned users is timed step by step, a step on a whole history before
each, so that a busy machine slows both alike. What is compared is the time a user takes.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.retrieval_step import ITEMS
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences, save
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import init_state, make_step

USERS, LENGTH, ALPHA = 64, 4096, 1.6
MODEL = {"model.width": 64, "model.depth": 2, "model.heads": 2, "data.candidates": 1, "train.batch_rows": 1}


def histories(folder: Path) -> Sequences:
    """USERS users with LENGTH events each, and the three that their last-two split holds out and predicts."""
    events = LENGTH + 3
    rng = np.random.default_rng(0)
    gaps = np.exp(3 * rng.normal(size=(USERS, events)) + 4).clip(max=1e5).astype(np.int64)
    return save(
        folder,
        name="long histories",
        schema=Schema(items=ITEMS + 1, tasks=()),
        origin=0,
        offsets=np.arange(USERS + 1) * events,
        item=rng.integers(1, ITEMS + 1, USERS * events),
        time=gaps.cumsum(axis=1).ravel(),
        labels=np.zeros((USERS * events, 0)),
    )


class _Steps:
    """A trial's step on the rows of its own stream."""

    def __init__(self, trial: Trial, sequences: Sequences):
        self.stream = TrainStream(sequences, trial.data, trial.model.rows, trial.train.batch_rows, trial.seed)
        optimizer = make_optimizer(trial.train, 1000)
        self._state = init_state(init_params(trial, sequences.schema), optimizer, trial.seed)
        self._step: Any = make_step(abstract_model(trial, sequences.schema), optimizer)

    def __call__(self) -> float:
        """Seconds of one step, its batch ready beforehand."""
        batch = jax.tree.map(np.asarray, next(self.stream))
        self.stream.close()  # its threads must not run beside the step
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def run(alpha: float = ALPHA) -> dict[str, float]:
    """Seconds per user whole and thinned, their ratio, and the share of events that thinning removes."""
    with tempfile.TemporaryDirectory() as scratch:
        sequences = histories(Path(scratch) / "log")
        whole = override(
            default_trial("hstu_retrieval"), {**MODEL, "data.path": str(sequences.path), "data.history": LENGTH}
        )
        data = dataclasses.replace(whole.data, stochastic_length=alpha, segments=8)
        contestants = _Steps(whole, sequences), _Steps(dataclasses.replace(whole, data=data), sequences)
        tally = contestants[1].stream.passes[0].tally
        for steps in contestants:
            steps()  # compiles
        contestants[1].stream.set_state({**contestants[1].stream.get_state(), "batch": 0})
        found = [[steps() for steps in contestants] for _ in range(int(tally.rows))]
    # Means of both: what disturbs the machine for a while then disturbs both alike.
    full, packed = np.mean([pair[0] for pair in found]), np.sum([pair[1] for pair in found])
    return {
        "whole_ms": 1e3 * full,
        "row_ms": 1e3 * packed / tally.rows,
        "thinned_ms": 1e3 * packed / tally.segments,
        "ratio": full * tally.segments / packed,
        "removed": 1 - tally.events / (tally.segments * LENGTH),
        "rows": tally.rows,
        "pairs": 1 - tally.squares / (tally.segments * LENGTH**2),
    }
