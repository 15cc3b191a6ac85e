"""A copy of a dataset in which a user's events of equal time stand in a random order.

    python -m experiments.shuffled_ties DATA --out OUT --seed 0

The public HSTU code sorts a user's events by time with an unstable sort, so that events of the same second come in no
order in particular; many MovieLens-1M users have such a pair at the end, where the test event is. Training on
the copy and on the original tells what the order of the log is worth.
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from genrec_jax.data.catalog import load_any
from genrec_jax.data.sequences import Sequences, load, save
from genrec_jax.errors import UserError

SHUFFLED = ", ties shuffled"  # after the name of the dataset


def shuffle_ties(sequences: Sequences, out: Path, seed: int) -> Sequences:
    """Writes the copy; events keep their time and what belongs to them, requests are refused.

    Raises UserError for a dataset with requests: what was shown together has an order of its own.
    """
    if sequences.request is not None:
        raise UserError(f"dataset {sequences.name!r} has requests: its ties cannot be shuffled")
    user = np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
    order = np.lexsort((np.random.default_rng(seed).random(sequences.events), sequences.time, user))
    levels = {f.name: f.level for f in sequences.schema.features}
    return save(
        out,
        name=f"{sequences.name}{SHUFFLED}",
        schema=sequences.schema,
        origin=sequences.origin,
        offsets=sequences.offsets,
        item=np.asarray(sequences.item)[order],
        time=np.asarray(sequences.time)[order],
        labels=np.asarray(sequences.labels)[order],
        features={
            name: np.asarray(table)[order] if levels[name] == "event" else np.asarray(table)
            for name, table in sequences.features.items()
        },
        source={"from": sequences.digest, "seed": seed},
    )


def main(data: Annotated[Path, tyro.conf.Positional], *, out: Path, seed: int = 0) -> int:
    """Write the copy of DATA (a dataset folder, or that of a known raw dataset) to OUT."""
    try:
        made = shuffle_ties(load(load_any(data)), out, seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made.name}: {made.events:,} events in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
