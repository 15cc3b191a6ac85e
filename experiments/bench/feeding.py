"""The input pipeline alone against the training step that eats from it, in rows per second."""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from experiments.ladders import LADDER
from genrec_jax.config import default_trial, override
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences
from genrec_jax.data.synthetic import generate, preset
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import init_state, make_step

_RUNG = {"hstu": 4, "dirl": 4, "dlrm": 2}


def run() -> dict[str, dict[str, float]]:
    """Per family: rows/s delivered, rows/s consumed, and their ratio; medians of five turns taken alternately."""
    with tempfile.TemporaryDirectory() as scratch:
        sequences = generate(preset("quick"), Path(scratch) / "world", floor_requests=0)
        return {family: _measure(family, rung, sequences) for family, rung in _RUNG.items()}


def _measure(family: str, rung: int, sequences: Sequences) -> dict[str, float]:
    (point,) = LADDER.rungs(family, rung, rung)
    trial = override(default_trial(family), {**LADDER.base, **point.values, "data.path": str(sequences.path)})
    rows = trial.train.batch_rows
    stream = TrainStream(sequences, trial.data, trial.model.rows, rows, seed=0)
    optimizer = make_optimizer(trial.train, 1000)
    state = init_state(init_params(trial, sequences.schema), optimizer, 0)
    step = make_step(abstract_model(trial, sequences.schema), optimizer)
    batch = jax.tree.map(np.asarray, next(stream))
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    fed, eaten = [], []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            next(stream)
        fed.append(200 * rows / (time.perf_counter() - start))
        stream.close()  # its threads must not run beside the step
        start = time.perf_counter()
        for _ in range(20):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        eaten.append(20 * rows / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(fed, eaten, strict=True))
    return {"delivered": statistics.median(fed), "consumed": statistics.median(eaten), "ratio": ratio}
