"""A launcher in a process of its own, for tests that kill it: launch_fake.py OUT TRIALS STEP_SECONDS."""

import sys
from pathlib import Path

from fake_trainer import TRAINER, plan

from experiments.launch import run_study
from genrec_jax.errors import UserError

if __name__ == "__main__":
    out, trials, seconds = sys.argv[1:]
    try:
        run_study(plan(int(trials), step_seconds=float(seconds)), Path(out), workers=2, quiet=True, trainer=TRAINER)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
