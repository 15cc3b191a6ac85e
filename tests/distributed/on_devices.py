"""Trains on 8 forced host devices and on one: prints, as JSON, how far the runs come apart. Run as a program."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from genrec_jax.data.pipeline import TrainStream  # noqa: E402
from genrec_jax.data.sequences import Sequences  # noqa: E402
from genrec_jax.distributed.mesh import everywhere, make_mesh, parse_mesh  # noqa: E402
from genrec_jax.retrieval_loss import Popularity  # noqa: E402
from genrec_jax.train.estimate import abstract_model, init_params  # noqa: E402
from genrec_jax.train.optimizer import make_optimizer, make_row_rule  # noqa: E402
from genrec_jax.train.step import init_state, make_step  # noqa: E402
from tests.data.helpers import random_dataset  # noqa: E402
from tests.train.helpers import trial_of  # noqa: E402

STEPS = 50


def trained(sequences: Sequences, name: str, settings: dict[str, Any], mesh: Any) -> tuple[list[float], list[Any]]:
    """The losses of 50 steps, and the parameters after them, in 8 pieces."""
    trial = trial_of(sequences, name, **{"train.batch_rows": 16, "train.steps": STEPS, **settings})
    stream = TrainStream(sequences, trial.data, trial.model.rows, 16, seed=0)
    model = abstract_model(trial, sequences.schema, Popularity(stream.target_counts()))
    optimizer, rule = make_optimizer(trial.train, STEPS), make_row_rule(trial.train, STEPS)
    state = init_state(init_params(trial, sequences.schema), optimizer, 0, rule)
    if mesh is not None:
        state = jax.device_put(state, everywhere(mesh))
    step, losses = make_step(model, optimizer, 8, rule, mesh), []
    for _ in range(STEPS):
        state, metrics = step(state, next(stream))
        losses.append(float(metrics["loss"]))
    stream.close()
    return losses, [np.asarray(x) for x in jax.tree.leaves(state.params)]


def main(folder: Path, mesh: str, name: str, settings: dict[str, Any]) -> dict[str, float]:
    sequences = random_dataset(folder / "log", users=60)
    one = trained(sequences, name, settings, None)
    many = trained(sequences, name, settings, make_mesh(parse_mesh(mesh)))
    loss = max(abs(a - b) / abs(a) for a, b in zip(one[0], many[0], strict=True))
    params = max(float(np.abs(a - b).max()) for a, b in zip(one[1], many[1], strict=True))
    return {"loss": loss, "params": params, "fell": one[0][-1] / one[0][0], "devices": jax.device_count()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))))
