"""A launcher in a process of its own, for tests that kill it.

launch_fake.py OUT TRIALS STEP_SECONDS [EXECUTOR BEHAVIOUR]. Workers import this module, too, and put their folders into
stores without delay.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # of the tests, which nothing installs

from fake_trainer import TRAINER, plan

from experiments.executors import ExecutorConfig, make_executor
from experiments.launch import run_study
from genrec_jax.errors import UserError
from genrec_jax.train import mirror, places

mirror.EVERY = places.SETTLE = 0.05

if __name__ == "__main__":
    out, trials, seconds, *more = sys.argv[1:]
    name, behaviour = more or ("local", "")
    executor = make_executor(ExecutorConfig(name, workers=2))
    try:
        planned = plan(int(trials), step_seconds=float(seconds), behaviour=behaviour)
        run_study(planned, places.place(out), executor=executor, quiet=True, trainer=TRAINER)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
