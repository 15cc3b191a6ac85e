"""A training step by the number of rows of its embedding table: DLRM, row-wise Adagrad, the same batches throughout.

Each size has a fresh process. The ids of a batch are spread over the whole table, so that a larger one is also further
apart in memory; nothing else of the batch depends on the size.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.retrieval_step import make_batch
from genrec_jax.batch import Batch
from genrec_jax.config import default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer, make_row_rule
from genrec_jax.train.step import init_state, make_step

SIZES, WIDTH = (10**5, 10**7, 10**8), 16
ROWS, LENGTH = 256, 64
TRIAL = override(
    default_trial("dlrm"),
    {
        "data.history": LENGTH,
        "data.candidates": 1,
        "model.embedding": WIDTH,
        "train.batch_rows": ROWS,
        "train.embedding_optimizer": "rowwise_adagrad",
    },
)


def _spread(batch: Batch, rows: int) -> Batch:
    """The batch with its items, which are below 4,000, spread over a table of so many rows."""

    def over(item: Any) -> Any:
        return (np.asarray(item, np.int64) * 2654435761 % (rows - 1) + 1).astype(np.int32)

    history, candidates = batch.history, batch.candidates
    return dataclasses.replace(
        batch,
        history=dataclasses.replace(history, item=over(history.item)),
        candidates=dataclasses.replace(candidates, item=over(candidates.item)),
    )


def measure(rows: int, steps: int = 40) -> dict[str, float]:
    """Median milliseconds of a step and, in bytes, the process's peak (Linux) and the table with its state."""
    schema = Schema(items=rows, tasks=("a",))
    optimizer, rule = make_optimizer(TRIAL.train, 1000), make_row_rule(TRIAL.train, 1000)
    state = init_state(init_params(TRIAL, schema), optimizer, 0, rule)
    step: Any = make_step(abstract_model(TRIAL, schema), optimizer, tables=rule)
    batches = [_spread(make_batch(jax.random.key(n), ROWS, LENGTH, tasks=1), rows) for n in range(8)]
    seconds = []
    for n in range(steps + 5):
        start = time.perf_counter()
        state, metrics = step(state, batches[n % len(batches)])
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"ms": 1e3 * statistics.median(seconds[5:]), "peak": 1024.0 * peak, "held": 4.0 * rows * (WIDTH + 1)}


def run(sizes: tuple[int, ...] = SIZES, rounds: int = 3) -> dict[int, dict[str, float]]:
    """Of every size the medians of as many processes, which take turns."""
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            output = subprocess.check_output([sys.executable, "-m", __name__, str(size)])
            found[size].append(json.loads(output.splitlines()[-1]))
    return {size: {key: statistics.median(f[key] for f in own) for key in own[0]} for size, own in found.items()}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
