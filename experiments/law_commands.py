"""The commands ``genrec fit``, ``recommend`` and ``report``: laws of our results or anybody's table, without jax."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

PLACE = tyro.conf.arg(metavar="PATH|URL")
Somewhere = Annotated[str, PLACE]
Law = Literal["curve", "chinchilla", "gadre", "history", "data_constrained", "isoflop", "envelope"]
Estimator = Literal["huber", "lad", "lsq-log", "lsq", "huber-linear", "lad-linear"]


def fit(
    tables: Positional[tuple[Path, ...]],
    *,
    json: Path | None = None,
    y: str | None = None,
    x: str = "train_flops",
    group: str | None = None,
    law: Law | None = None,
    estimator: Estimator = "huber",
    n: str = "dense_params",
    d: str = "targets",
    h: str = "history",
    unique: str = "unique_targets",
    compute: str = "train_flops",
    run: str = "trial",
    budgets: str = "",
    cluster: str = "",
    method: Literal["pairs", "residual", "wild", "jackknife"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Fit scaling laws to tables and print them with 95 % intervals.

    Args:
        tables: CSV, JSONL or parquet tables, or folders of studies.
        json: Write parameters, intervals and warnings here.
        y: Metric column (default: ne, else logloss, else hr@10); a law by name needs it.
        x: Column that curves are against.
        group: Column that tells families apart (default: family, if there is one; '' for none).
        law: One law by name, of the columns below; without it, every study of results tables as `genrec report` has it.
        estimator: What the fit of a joint law minimises.
        n: Column of parameters.
        d: Column of targets (tokens) trained on.
        h: Column of history lengths (law history).
        unique: Column of the targets among them that differ (law data_constrained).
        compute: Column of FLOPs (laws isoflop, envelope).
        run: Column that names the run of a checkpoint (law envelope).
        budgets: Column of compute budgets (law isoflop; default: told from the compute).
        cluster: Column of the unit that a joint law's bootstrap draws (default: rows).
        method: How a joint law's intervals are made (default: pairs, or residual with few runs).
        draws: Of a bootstrap.
        seed: Of a bootstrap.
    """
    import scaling
    from experiments.fitting import fit_and_print, fit_law_and_print

    if law is None:
        fit_and_print(tables, y, x, group or "family", json)
        return
    if y is None:
        raise scaling.TableError(f"--law {law} needs --y, the column of the loss or metric")
    if draws < 1:
        raise scaling.TableError(f"--draws must be at least 1, not {draws}")
    table = scaling.read_table(list(tables))
    own = ("family" if "family" in table.columns else "") if group is None else group
    columns = scaling.Columns(y, x, n, d, h, unique, compute, run, budgets, cluster, own)
    resampling = scaling.Resampling(method, draws, seed)
    fit_law_and_print(table, law, columns, estimator=estimator, resampling=resampling, out=json)


def recommend(
    tables: Positional[tuple[Path, ...]],
    *,
    budget: float,
    y: str | None = None,
    x: str = "train_flops",
    group: str = "family",
    n: str = "dense_params",
    d: str = "targets",
    h: str = "history",
    json: Path | None = None,
) -> None:
    """Say what to train with a budget of FLOPs, by the laws of results tables, and what to expect of it.

    Args:
        tables: Results tables, or folders of studies.
        budget: Training FLOPs.
        y: Metric column (default: ne, else logloss, else hr@10).
        x: Column of training FLOPs.
        group: Column that tells families apart; a table without the column family is one family.
        n: Column of parameters.
        d: Column of targets (tokens) trained on.
        h: Column of history lengths.
        json: Write it here, too.
    """
    from experiments.fitting import advise_and_print

    names = {x: "train_flops", group: "family", n: "dense_params", d: "targets", h: "history"}
    advise_and_print(tables, budget, y, names, json)


def report(
    runs: Positional[tuple[Somewhere, ...]],
    *,
    out: Somewhere,
    y: str | None = None,
    x: str = "train_flops",
    group: str = "family",
) -> None:
    """Write one self-contained HTML report of studies or tables.

    Args:
        runs: Folders of studies, folders that hold several of them, or tables; also URLs of a store.
        out: HTML file to write.
        y: Metric column (default: the study's own, else ne, logloss or hr@10).
        x: Column of the compute axis.
        group: Column that tells families apart; a table without the column family is one family.
    """
    from experiments.run import write_report
    from genrec_jax.train.places import place

    write_report([place(run) for run in runs], place(out), y=y, x=x, group=group)


LAW_COMMANDS: dict[str, Callable[..., Any]] = {"fit": fit, "recommend": recommend, "report": report}
