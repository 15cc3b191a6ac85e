"""``genrec sweep`` and ``genrec report``: a study by name, from its declaration to its page."""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import experiments
from experiments.folder import read_record
from experiments.study import Budget, Study
from genrec_jax.errors import UserError


def studies() -> dict[str, Study]:
    """Every declaration under experiments/: a module with a STUDY."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        study = getattr(importlib.import_module(f"experiments.{module.name}"), "STUDY", None)
        if isinstance(study, Study):
            found[study.name] = study
    return found


def run_named(
    name: str, data: Path, budget: Budget, *, workers: int, out: Path | None, dry_run: bool, quiet: bool
) -> int:
    """Runs a study and writes its table and report; returns the exit code (1 if a trial failed for good)."""
    from experiments.dry_run import print_plan, with_cost
    from experiments.launch import run_study
    from experiments.truth import write_references
    from genrec_jax.data.catalog import load_any
    from genrec_jax.data.sequences import digest_of
    from genrec_jax.train.estimate import estimate, plan_account
    from genrec_jax.train.record import write_json

    known = studies()
    if name not in known:
        raise UserError(f"unknown study {name!r}; there is: {', '.join(sorted(known))}")
    study = known[name]
    folder = load_any(data, quiet=quiet)
    planned = study.trials(str(folder), budget, digest_of(folder))
    if dry_run:
        print_plan(planned, estimate, workers=workers)
        return 0
    target = out or Path("runs") / f"{name}-{data.resolve().name}-{budget}"
    # The launcher touches no device: the workers need all of it.
    planned = with_cost(planned, lambda trial: plan_account(trial).train_flops)
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "study.json", {"title": study.title, "summary": study.doc, "metric": study.metric})
    write_references(planned, target)
    summary = run_study(planned, target, workers=workers, quiet=quiet)
    print(f"{summary.done} done, {summary.diverged} diverged, {len(summary.failed)} failed; table {summary.table}")
    if summary.done:
        write_report([target], target / "report.html")
    return 1 if summary.failed else 0


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes one page for study folders or tables; a single study lends the page its title and question."""
    import scaling
    from experiments.truth import read_references

    title, summary, metric = "Scaling report", "", None
    heading = read_record(runs[0] / "study.json") if len(runs) == 1 else None
    if heading is not None:
        title, summary, metric = heading["title"], heading["summary"], heading["metric"]
    references = read_references(runs)
    analysis = scaling.report_command(
        list(runs),
        out,
        title=title,
        summary=summary,
        references=references,
        y=metric,
        assets_dir=out.with_name(f"{out.stem}_figures"),
    )
    for line in scaling.held_against_truth(analysis, references):
        print(line)
    print(f"report {out}")
