"""The commands ``genrec data …``. Heavy imports happen inside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional
from tyro.conf import UseAppendAction as Many


def data_import(
    files: Positional[tuple[Path, ...]] = (),
    *,
    out: Path,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    label: Many[tuple[str, ...]] = (),
    request: str | None = None,
    order: str | None = None,
    user_feature: Many[tuple[str, ...]] = (),
    item_feature: Many[tuple[str, ...]] = (),
    event_feature: Many[tuple[str, ...]] = (),
    time_unit: Literal["s", "ms", "us", "ns"] | None = None,
    promise_sorted: bool = False,
    mapping: Path | None = None,
    workers: int = 1,
    memory_mib: int = 512,
    quiet: bool = False,
) -> None:
    """Read a log (parquet, CSV, TSV, or a folder of a known dataset) into a dataset folder; run again to go on.

    Args:
        files: Log files with the same columns, or one folder of MovieLens, Amazon or Globo.
        out: Dataset folder to write.
        user: Column of user ids.
        item: Column of item ids.
        time: Column of event times.
        label: A task, NAME=COL, NAME=COL>=X or NAME=COL==X; repeat for several.
        request: Column of request ids: events shown together.
        order: Column of whole numbers that orders a user's events of equal time (default: as they stand).
        user_feature: Column with a categorical feature of the user; repeat for several.
        item_feature: Column with a categorical feature of the item; repeat for several.
        event_feature: Column with a categorical feature of the event; repeat for several.
        time_unit: Unit of the time column (default: s).
        promise_sorted: Refuse the log if a user's times ever go back.
        mapping: TOML file with the same settings, instead of flags.
        workers: Worker processes; the dataset does not depend on it.
        memory_mib: MiB of events that a worker holds at a time, whatever the size of the log.
        quiet: No progress bar.
    """
    from experiments.datasets import import_command

    columns = {"user": user, "item": item, "time": time, "request": request, "order": order}
    features = {"user_features": user_feature, "item_features": item_feature, "event_features": event_feature}
    options = {"labels": label, "time_unit": time_unit, "promise_sorted": promise_sorted, **features}
    given = {name: value for name, value in (columns | options).items() if value}
    import_command(
        files, out, given, mapping_file=mapping, workers=workers, memory_mib=memory_mib, quiet=quiet
    )  # fmt: skip
    _print_summary(out)


def data_synthetic(
    *,
    out: Path,
    name: Annotated[str, tyro.conf.arg(name="preset")] = "small",
    events: int | None = None,
    seed: int = 0,
    set: Many[tuple[str, ...]] = (),
    workers: int = 1,
    quiet: bool = False,
) -> None:
    """Generate a synthetic world whose Bayes-optimal NE is known; run again to go on.

    Args:
        out: Dataset folder to write.
        name: Named size of the world.
        events: About how many events there shall be: sets the number of users.
        seed: Seed of the world.
        set: key=value of the world (users=1000, tasks=click,like); repeat for several.
        workers: Worker processes; the bits do not depend on it.
        quiet: No progress bar.
    """
    from experiments.datasets import sized_world
    from genrec_jax.data.synthetic import generate

    generate(sized_world(name, seed, set, events), out, workers=workers, quiet=quiet)
    _print_summary(out)


def data_show(data: Positional[Path]) -> None:
    """Check a dataset folder against its digest, and print what it holds.

    Args:
        data: Dataset folder, or the folder of a known raw dataset.
    """
    from genrec_jax.data.catalog import load_any
    from genrec_jax.data.sequences import verify

    folder = load_any(data)
    verify(folder)
    _print_summary(folder)


def _print_summary(folder: Path) -> None:
    from genrec_jax.data.summary import describe, summary_table

    Console(highlight=False).print(summary_table(describe(folder)))


DATA: dict[str, Callable[..., Any]] = {"import": data_import, "synthetic": data_synthetic, "show": data_show}
