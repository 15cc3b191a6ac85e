"""``genrec results``: what recipe runs came to, beside the published numbers: tables, curves, one page of Markdown."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.folder import read_record, read_result
from experiments.recipe import STUDY
from experiments.recipes import read
from experiments.retrieval_choices import REFERENCE
from experiments.retrieval_choices import STUDY as CHOICES
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.train.loop import SELECTED_BY
from genrec_jax.train.record import read_lines, write_json

METRICS = ("hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")
_SELECTED_BY = SELECTED_BY["retrieval"][0]


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


@dataclasses.dataclass(frozen=True)
class Run:
    """One trial of a folder.

    label: the protocol, or the choice of the study. digest, dataset: of its data; the name is known once it has
    finished. curve: the watched part's metrics by epoch, as far as it has come. tested: the test metrics of the
    finished trial, else empty; tested_epoch: whose they are.
    """

    study: str
    family: str
    label: str
    seed: int
    digest: str
    dataset: str
    epochs: float
    curve: tuple[tuple[float, dict[str, float]], ...]
    tested: dict[str, float]
    tested_epoch: float
    train_seconds: float

    @property
    def best_watched(self) -> tuple[float, dict[str, float]]:
        """The epoch with the best NDCG@10 on the watched part, and its metrics."""
        return max(self.curve, key=lambda point: point[1][_SELECTED_BY])


def write_datasets(out: Path, sequences: Sequences) -> None:
    """Adds a dataset to ``OUT/datasets.json``, which says what the trials' digests stand for."""
    known = read_record(out / "datasets.json") or {}
    entry = {"name": sequences.name, "users": sequences.users, "items": sequences.schema.items - 1}
    write_json(out / "datasets.json", known | {sequences.digest: entry})


def read_datasets(folders: Sequence[Path]) -> dict[str, Any]:
    """What :func:`write_datasets` wrote in the given folders, by digest."""
    known: dict[str, Any] = {}
    for folder in folders:
        known |= read_record(folder / "datasets.json") or {}
    return known


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every trial of a recipe or of the study of choices in the given folders, each once."""
    found: dict[tuple[str, str], Run] = {}
    for folder in folders:
        trials = sorted((folder / "trials").glob("*/config.json"))
        if not trials:
            raise UserError(f"{folder} holds no trials")
        for file in trials:
            for run in _runs(file.parent):
                found.setdefault((run.study, file.parent.name), run)
    return sorted(found.values(), key=lambda run: (run.study, run.family, run.label, run.seed))


def _runs(folder: Path) -> Iterable[Run]:
    config, plan, result = read_record(folder / "config.json"), read_record(folder / "plan.json"), read_result(folder)
    if config is None or plan is None:
        return
    lines = read_lines(folder / "metrics.jsonl")
    epochs = float(config["train"]["epochs"])
    part = "test/" if config["data"]["protocol"] == "original" else "validation/"
    curve = tuple(
        (epochs * line["step"] / line["steps"], metrics)
        for line in lines
        if _SELECTED_BY in (metrics := {k.removeprefix(part): v for k, v in line.items() if k.startswith(part)})
    )
    done = result is not None and result["status"] == "done" and bool(curve)
    tested = {name: float(result[name]) for name in METRICS} if done and result else {}
    for place in plan["placements"]:
        if place["study"] in (STUDY, CHOICES.name):
            yield Run(
                study=place["study"],
                family=place["family"],
                label=place["label"],
                seed=config["seed"],
                digest=config["data"]["digest"],
                dataset=result["dataset"] if result else "",
                epochs=epochs,
                curve=curve,
                tested=tested,
                tested_epoch=epochs * result["tested_step"] / result["steps"] if done and result else 0.0,
                train_seconds=float(result["train_seconds"]) if done and result else 0.0,
            )


def tables(folders: Sequence[Path]) -> list[Table]:
    """A table per dataset and number of epochs, and those of the choices."""
    runs = read_runs(folders)
    datasets = read_datasets(folders)
    found = []
    for digest, epochs in dict.fromkeys((run.digest, run.epochs) for run in runs):
        here = [run for run in runs if (run.digest, run.epochs) == (digest, epochs)]
        unknown = {"name": max(run.dataset for run in here) or digest, "users": 0, "items": 0}
        data = datasets.get(digest, unknown)
        if any(run.study == STUDY for run in here):
            found.append(_recipe_table([run for run in here if run.study == STUDY], data, epochs))
        if any(run.study == CHOICES.name for run in here):
            found.append(_choice_table([run for run in here if run.study == CHOICES.name], data, epochs))
    return found


def _recipe_table(runs: list[Run], data: dict[str, Any], epochs: float) -> Table:
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(run.family for run in runs):
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
        f"{_SELECTED_BY.upper()} on the last but one, tested once."
    )
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


def print_tables(folders: Sequence[Path]) -> None:
    """The tables on the terminal."""
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Grid

    console = Console(highlight=False, width=max(Console().width, 160))  # cells that wrap cannot be read
    for table in tables(folders):
        grid = Grid(*(Column(name, no_wrap=True) for name in table.columns), title=table.heading, box=None)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)


def write_page(folders: Sequence[Path], out: Path) -> None:
    """Writes the page ``out`` (Markdown) and its curves beside it, as SVG."""
    from experiments.retrieval_curves import curve_figures

    found = tables(folders)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no recipe was run there")
    figures = curve_figures(read_runs(folders), read_datasets(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = ["# Retrieval: the published recipes, run again", "", _ABOUT, ""]
    for table in found:
        text += [table.markdown()]
    for name, (alt, svg) in figures.items():
        (out.parent / f"{out.stem}-{name}.svg").write_text(svg, encoding="utf-8")
        text += [f"![{alt}]({out.stem}-{name}.svg)", ""]
    out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    print(f"page {out}")


_ABOUT = (
    "Made by `genrec results`. Every item of the catalogue is ranked, those of the visible history left out; ranks "
    "have no cut-off in MRR (the public code counts ranks beyond 2,500 as 2,501). Users' events of equal time keep the "
    "order of the log; the public code sorts them by an unstable sort. Which epoch the published numbers are of is not "
    "documented."
)
