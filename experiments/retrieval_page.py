"""``genrec results``: what recipe runs came to, beside the published numbers: tables, curves, one page of Markdown."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.recipe import STUDY
from experiments.recipes import in_order, read
from experiments.retrieval_choices import REFERENCE
from experiments.retrieval_choices import STUDY as CHOICES
from experiments.retrieval_runs import CHOSEN_BY, METRICS, Run, read_runs, write_runs
from experiments.shuffled_ties import SHUFFLED
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place, write_text


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text."""

    heading: str
    intro: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [f"## {self.heading}", "", self.intro, "", "| " + " | ".join(self.columns) + " |"]
        lines += ["|" + "---|" * len(self.columns), *("| " + " | ".join(row) + " |" for row in self.rows)]
        return "\n".join(lines) + "\n"


def tables(runs: Sequence[Run]) -> list[Table]:
    """A table per dataset and number of epochs, and those of the choices."""
    found = []
    for section in dict.fromkeys(run.section for run in runs):
        here = [run for run in runs if run.section == section]
        epochs = section[1]
        data = max((run.data for run in here), key=lambda data: data["users"])
        if any(run.study == STUDY for run in here):
            found.append(_recipe_table([run for run in here if run.study == STUDY], data, epochs))
        if any(run.study == CHOICES.name for run in here):
            found.append(_choice_table([run for run in here if run.study == CHOICES.name], data, epochs))
    return found


def _recipe_table(runs: list[Run], data: dict[str, Any], epochs: float) -> Table:
    rows: list[tuple[str, ...]] = []
    for name in in_order(run.family for run in runs):
        recipe = read(name)
        if recipe.is_of(data):
            published = [f"{recipe.published[m]:.4f}" if m in recipe.published else "" for m in METRICS]
            rows.append((recipe.title, "published", "unknown", "", *published))
        original, honest = (_finished(runs, name, protocol) for protocol in ("original", "honest"))
        rows += _summary(recipe.title, "original, last", original, [(r.tested_epoch, r.tested) for r in original])
        rows += _summary(recipe.title, "original, best on test", original, [r.best_watched for r in original])
        rows += _summary(recipe.title, "honest", honest, [(r.tested_epoch, r.tested) for r in honest])
    unfinished = [run for run in runs if not run.tested]
    intro = (
        f"{data['users']:,} users, {data['items']:,} items, {epochs:g} epochs. Mean and standard deviation over seeds. "
        "Original: trained on all but the last event, with the test event watched after every epoch; its best epoch is "
        "chosen on the test set and so flatters. Honest: trained on all but the last two events, the epoch chosen by "
        f"{CHOSEN_BY.upper()} on the last but one, tested once."
    )
    if data["name"].endswith(SHUFFLED):
        intro += " Events of one user and one time stand in a random order, drawn for each run (`shuffled_ties`)."
    if unfinished:
        intro += f" Still at work: {', '.join(f'{r.family} {r.label} seed {r.seed}' for r in unfinished)}."
    columns = ("model", "protocol", "epoch", "seeds", *(name.upper() for name in METRICS))
    return Table(f"{data['name']}, {epochs:g} epochs", intro, columns, tuple(rows))


def _finished(runs: list[Run], family: str, label: str) -> list[Run]:
    return [run for run in runs if run.tested and (run.family, run.label) == (family, label)]


def _summary(
    model: str, protocol: str, runs: list[Run], tested: Sequence[tuple[float, dict[str, float]]]
) -> list[tuple[str, ...]]:
    """The row of these runs, or none; ``tested``: of each, the epoch and its metrics."""
    if not runs:
        return []
    cells = [_mean([metrics[name] for _, metrics in tested]) for name in METRICS]
    return [(model, protocol, ", ".join(f"{epoch:.0f}" for epoch, _ in tested), str(len(runs)), *cells)]


def _mean(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _choice_table(runs: list[Run], data: dict[str, Any], epochs: float) -> Table:
    reference = {run.seed: run for run in runs if run.label == REFERENCE and run.tested}
    rows = []
    for label in dict.fromkeys([REFERENCE, *(run.label for run in runs)]):
        own = [run for run in runs if run.label == label and run.tested]
        if not own:
            continue
        pairs = [(run, reference[run.seed]) for run in own if run.seed in reference]
        differences = ["", ""]
        if pairs and label != REFERENCE:
            both = [[run.tested[name] - base.tested[name] for run, base in pairs] for name in ("hr@10", "ndcg@10")]
            differences = [_mean(values, "+") for values in both]
        time = statistics.mean(run.train_seconds / base.train_seconds for run, base in pairs) if pairs else None
        values = [_mean([run.tested[name] for run in own]) for name in ("hr@10", "hr@200", "ndcg@10", "mrr")]
        rows.append((label, str(len(own)), *values, *differences, "" if time is None else f"{time:.2f}"))
    columns = ("choice", "seeds", "HR@10", "HR@200", "NDCG@10", "MRR", "Δ HR@10", "Δ NDCG@10", "time")
    intro = (
        f"One choice at a time against the recipe's own, {epochs:g} epochs, honest protocol, test metrics. Δ: paired "
        "by seed, mean and standard deviation. Time: of training, over the reference's; a busy machine blurs it."
    )
    return Table(f"Choices of the recipe, {data['name']}, {epochs:g} epochs", intro, columns, tuple(rows))


def print_tables(folder: Place) -> None:
    """The tables of one folder on the terminal."""
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Grid

    console = Console(highlight=False, width=max(Console().width, 160))  # cells that wrap cannot be read
    for table in tables(read_runs([folder])):
        grid = Grid(*(Column(name, no_wrap=True) for name in table.columns), title=table.heading, box=None)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)


def write_page(sources: Sequence[Place], out: Path) -> None:
    """Writes the page ``out`` (Markdown), beside it the curves as SVG and the record file of the runs."""
    from experiments.retrieval_curves import curve_figures

    runs = read_runs(sources)
    found = tables(runs)
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no recipe was run there")
    figures = curve_figures(runs)
    record = out.with_suffix(".jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = ["# Retrieval: the published recipes, run again", "", _ABOUT.format(record=record.name), "", _made(runs), ""]
    for table in found:
        text += [table.markdown()]
    for name, (alt, svg) in figures.items():
        write_text(out.with_name(f"{out.stem}-{name}.svg"), svg)
        text += [f"![{alt}]({out.stem}-{name}.svg)", ""]
    write_runs(runs, record)
    write_text(out, "\n".join(text).rstrip() + "\n")
    print(f"page {out}, records {record}")


def _made(runs: Sequence[Run]) -> str:
    """On what, with what and when the finished runs were trained."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.tested:
            names = sorted(name for name in run.made if name.startswith("version/"))
            software = ", ".join(f"{name.removeprefix('version/')} {run.made[name]}" for name in names)
            groups.setdefault((run.made.get("device", "unknown"), software), []).append(run)
    lines = []
    for (device, software), own in groups.items():
        days = sorted({run.made["finished"] for run in own if "finished" in run.made})
        when = "" if not days else f", {days[0]}" if len(days) == 1 else f", {days[0]} to {days[-1]}"
        hours = sum(run.train_seconds for run in own) / 3600
        trials = "1 trial" if len(own) == 1 else f"{len(own)} trials"
        lines.append(f"- {trials} on {device}{when}: {hours:.1f} h of training steps; {software}")
    return "\n".join(lines)


_ABOUT = (
    "Made by `genrec results`, from folders of `genrec recipe` and from [the records]({record}) of earlier runs, to "
    "which it adds. Every item of the catalogue is ranked, those of the visible history left out; ranks have no "
    "cut-off in MRR (the public code counts ranks beyond 2,500 as 2,501). Users' events of equal time keep the order "
    "of the log; the public code sorts them by an unstable sort. Which epoch the published numbers are of is not "
    "documented."
)
