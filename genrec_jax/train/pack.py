"""Which trials can be trained together: those that differ in their seeds and in numbers that a step is given."""

import json
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from genrec_jax.config import Trial
from genrec_jax.errors import UserError
from genrec_jax.train.optimizer import SCALARS
from genrec_jax.train.record import flat


def pack_key(trial: Trial) -> str:
    """Trials of one key share a compiled step, the number of their steps and when they are logged and evaluated.

    It is the whole configuration but for the seed and :data:`genrec_jax.train.optimizer.SCALARS`. Where every pass
    draws its rows anew, by the seed, their number may differ, and the steps of an epoch with it: then only trials of
    one seed have a key in common.
    """
    return json.dumps(_shared(trial), sort_keys=True)


def check_pack(trials: Sequence[Trial], mesh: Mesh | None = None, *, offload: bool = False) -> None:
    """Raises UserError, naming what differs, for trials that cannot be trained together."""
    if not trials:
        raise UserError("a pack has no trials")
    if len(trials) > 1 and mesh is not None:
        raise UserError("several trials are trained together on one device, not on a mesh")
    if len(trials) > 1 and offload:
        raise UserError("several trials that are trained together keep all of their states on the device")
    first = flat(_shared(trials[0]))
    for trial in trials[1:]:
        other = flat(_shared(trial))
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differ:
            raise UserError(f"trials {trials[0].hash} and {trial.hash} differ in {', '.join(differ)}: train them apart")


def _shared(trial: Trial) -> dict[str, Any]:
    record = trial.to_json()
    record["train"] = {key: value for key, value in record["train"].items() if key not in SCALARS}
    drawn = trial.data.stochastic_length < 2 or trial.data.rows_per_user > 0
    if trial.train.steps or not drawn:
        del record["seed"]
    return record
