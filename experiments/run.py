"""``genrec sweep`` and ``genrec report``: a study by name, from its declaration to its page."""

import contextlib
import dataclasses
import importlib
import pkgutil
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import experiments
from experiments.executors import ExecutorConfig, Training, make_executor
from experiments.folder import read_record
from experiments.ladders import read
from experiments.study import Budget, Study, chosen
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place

Instead = Literal["dry_run", "forecast"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a study trains by instead of its own: another ladder (a name or a file), settings (dotted keys) for all its
    trials; and which of them ``only`` (see :func:`experiments.study.chosen`)."""

    ladder: str | None = None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: tuple[str, ...] = ()

    def of(self, study: Study) -> Study:
        """The study by these rules. Raises UserError for a ladder that is none, and as :class:`Study` does."""
        return (study if self.ladder is None else study.on(read(self.ladder))).with_settings(self.settings)

    def command(self, name: str, data: Path, budget: Budget) -> str:
        """What runs the study by these rules: all that its numbers depend on. The data and a ladder's file go by their
        names alone, for they lie elsewhere on another machine."""
        ladder = [] if self.ladder is None else ["--ladder", Path(self.ladder).name]
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={value}")]
        only = [word for text in self.only for word in ("--only", text)]
        return shlex.join(
            ["genrec", "sweep", name, "--data", data.resolve().name, "--budget", budget, *ladder, *settings, *only]
        )


def studies() -> dict[str, Study]:
    """Every declaration under experiments/: a module with a STUDY."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        study = getattr(importlib.import_module(f"experiments.{module.name}"), "STUDY", None)
        if isinstance(study, Study):
            found[study.name] = study
    return found


def run_named(
    name: str,
    data: Path,
    budget: Budget,
    *,
    where: ExecutorConfig,
    how: Training,
    rules: Rules,
    out: Place | None,
    instead: Instead | None,
    quiet: bool,
) -> int:
    """Runs a study and writes its table and report; returns the exit code (1 if a trial failed for good).

    ``instead`` of running it: print what it will cost, or record what its laws expect of the trials to come.
    """
    from experiments.dry_run import print_plan, with_cost
    from experiments.forecast import write_forecasts
    from experiments.launch import run_study
    from experiments.remarks import write_remarks
    from experiments.truth import write_notes, write_references
    from genrec_jax.data.catalog import load_any
    from genrec_jax.data.sequences import digest_of
    from genrec_jax.train.estimate import estimate, plan_account
    from genrec_jax.train.record import write_json

    known = studies()
    if name not in known:
        raise UserError(f"unknown study {name!r}; there is: {', '.join(sorted(known))}")
    study = rules.of(known[name])
    executor = None if instead else make_executor(where)
    folder = load_any(data, quiet=quiet)
    planned = chosen(study.trials(str(folder), budget, digest_of(folder)), rules.only)
    target = out or Path("runs") / f"{name}-{data.resolve().name}-{budget}"
    if instead == "forecast":
        planned = with_cost(planned, lambda trial: plan_account(trial).train_flops)
        print("\n".join(write_forecasts(study, planned, target)))
        return 0
    if executor is None:
        print_plan(planned, estimate, workers=where.trials_at_once(len(planned)), out=target)
        return 0
    # The launcher touches no device: the workers need all of it.
    planned = with_cost(planned, lambda trial: plan_account(trial).train_flops)
    target.mkdir(parents=True, exist_ok=True)
    before = (read_record(target / "study.json") or {}).get("commands", [])
    commands = list(dict.fromkeys([*before, rules.command(name, data, budget)]))
    about = {"title": study.title, "summary": study.question, "metric": study.metric, "recipe": study.recipe}
    write_json(target / "study.json", {**about, "commands": commands})
    write_references(planned, target)
    write_notes(folder, target)
    summary = run_study(planned, target, executor=executor, quiet=quiet, how=how)
    print(f"{summary.done} done, {summary.diverged} diverged, {len(summary.failed)} failed; table {summary.table}")
    if summary.done:
        for remark in write_remarks(study, target):
            print(remark)
        write_report([target], target / "report.html")
    return 1 if summary.failed else 0


def write_report(
    runs: Sequence[Place], out: Place, *, y: str | None = None, x: str = "train_flops", group: str = "family"
) -> None:
    """Writes one page for study folders, folders of study folders, or tables.

    A single study lends the page its title and question; of several, each opens its own section with them. ``y``,
    ``x`` and ``group`` are columns; None for the metric of the studies.
    """
    from genrec_jax.train.mirror import brought, taken

    with contextlib.ExitStack() as copies:
        here = [copies.enter_context(brought(folder)) for path in runs for folder in _study_folders(path)]
        with taken(out) as page:
            _write_page(here, page, y, x, group)
    print(f"report {out}")


def _write_page(runs: list[Path], out: Path, y: str | None, x: str, group: str) -> None:
    import scaling
    from experiments.truth import read_notes, read_references

    headings = {path: heading for path in runs if (heading := _heading(path)) is not None}
    title, summary, metric = "Scaling report", "", None
    intros: dict[str, str] = {}
    if len(runs) == 1 and headings:
        (heading,) = headings.values()
        title, summary, metric = heading["title"], heading["summary"], heading["metric"]
    else:
        intros = _intros(headings)
        metrics = {heading["metric"] for heading in headings.values()}
        metric = metrics.pop() if len(metrics) == 1 else None
    references = read_references(runs)
    analysis = scaling.report_command(
        runs,
        out,
        title=title,
        y=y or metric,
        x=x,
        group=group,
        summary=summary,
        intros=intros,
        notes=read_notes(runs),
        references=references,
        assets_dir=out.with_name(f"{out.stem}_figures"),
    )
    for line in scaling.held_against_truth(analysis, references):
        print(line)


def _heading(folder: Path) -> dict[str, Any] | None:
    """A study's title, question and metric; what ran it and what it came to go with the question."""
    from experiments.remarks import read_remarks

    heading = read_record(folder / "study.json")
    if heading is not None:
        commands = [f"    {command}" for command in heading.get("commands", [])]
        heading["summary"] = "\n\n".join([heading["summary"], *commands, *read_remarks(folder)])
    return heading


def _intros(headings: Mapping[Path, Mapping[str, str]]) -> dict[str, str]:
    """What opens each study's section: its question, and which folders were pooled in it."""
    import scaling

    folders: dict[tuple[str, str], list[str]] = {}
    intros: dict[str, str] = {}
    for path, heading in headings.items():
        table = scaling.read_table(path)
        intros |= dict.fromkeys(table.distinct("study"), heading["summary"])
        for place in dict.fromkeys(zip(table.text("study"), table.text("dataset"), strict=True)):
            folders.setdefault(place, []).append(path.name)
    for (study, dataset), names in folders.items():
        if len(names) > 1:
            pooled = f"The trials of these folders on {dataset} are pooled: {', '.join(names)}."
            intros[study] = f"{intros.get(study, '')}\n\n{pooled}"
    return intros


def _study_folders(path: Place) -> list[Place]:
    """The path itself, or the studies in it where it is no study but a folder of studies."""
    if (path / "results.csv").is_file():
        return [path]
    return sorted(table.parent for table in path.glob("*/results.csv")) or [path]
