"""``genrec recipe``: published recipes on a dataset, by both protocols, as trials of one folder."""

from collections.abc import Sequence
from pathlib import Path

from experiments.recipes import PROTOCOLS, Protocol, Recipe, read
from experiments.study import PlannedTrial
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place

STUDY = "recipes"  # what the trials' folders call it


def plan_recipe(
    recipe: Recipe, sequences: Sequences, seeds: Sequence[int], protocols: Sequence[Protocol], epochs: int | None
) -> list[PlannedTrial]:
    """One trial for each protocol and seed, in that order."""
    place = {"data.path": str(sequences.path), "data.digest": sequences.digest}
    # Three lines of progress an epoch, a checkpoint after each: whatever is killed has lost an epoch at most.
    steps = -(-sequences.users // recipe.values["train.batch_rows"])
    place |= {"train.log_every": max(1, steps // 3), "train.checkpoint_every": steps}
    return [
        PlannedTrial(recipe.trial(protocol, seed, epochs, **place), STUDY, recipe.name, protocol, "train_flops")
        for protocol in protocols
        for seed in seeds
    ]


def recipe_command(
    names: Sequence[str],
    data: Path,
    out: Place,
    *,
    seeds: Sequence[int],
    protocols: Sequence[Protocol],
    epochs: int | None,
    workers: int,
    quiet: bool,
) -> int:
    """Trains what is not trained yet, prints the tables, returns the exit code (1 if a trial failed for good)."""
    from experiments.dry_run import with_cost
    from experiments.executors import ExecutorConfig, make_executor
    from experiments.launch import run_study
    from experiments.retrieval_page import print_tables
    from experiments.retrieval_runs import write_datasets
    from genrec_jax.data.catalog import load_any
    from genrec_jax.data.sequences import load
    from genrec_jax.train.estimate import plan_account

    if not names:
        raise UserError("name at least one recipe")
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs must be at least 1, not {epochs}")
    recipes = [read(name) for name in dict.fromkeys(names)]
    sequences = load(load_any(data, quiet=quiet))
    for recipe in recipes:
        _say_if_other_data(recipe, sequences)
    chosen = list(dict.fromkeys(protocols)) or list(PROTOCOLS)
    numbers = list(dict.fromkeys(seeds)) or [0]
    planned = [one for recipe in recipes for one in plan_recipe(recipe, sequences, numbers, chosen, epochs)]
    planned = with_cost(planned, lambda trial: plan_account(trial).train_flops)
    out.mkdir(parents=True, exist_ok=True)
    write_datasets(out, sequences)
    summary = run_study(planned, out, executor=make_executor(ExecutorConfig(workers=workers)), quiet=quiet)
    print_tables(out)
    return 1 if summary.failed else 0


def _say_if_other_data(recipe: Recipe, sequences: Sequences) -> None:
    found = {"users": sequences.users, "items": sequences.schema.items - 1}
    if not recipe.is_of(found):
        users = f"{recipe.users:,} users and " if recipe.users else ""
        print(
            f"note: {recipe.name} was published on {recipe.dataset} with {users}{recipe.items:,} items; "
            f"{sequences.name} has {found['users']:,} and {found['items']:,}: its numbers do not compare"
        )
