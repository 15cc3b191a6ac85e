"""The ``genrec`` command. Heavy imports happen inside the commands: ``genrec fit`` needs no jax."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional
from tyro.conf import UseAppendAction as Many

from experiments.data_commands import DATA
from experiments.law_commands import LAW_COMMANDS, PLACE, Somewhere
from genrec_jax.errors import UserError
from scaling.table import TableError


def train(
    *,
    data: Path,
    model: str,
    out: Somewhere,
    set: Many[tuple[str, ...]] = (),
    mesh: str | None = None,
    remat: bool = False,
    offload: Literal["optimizer"] | None = None,
    distributed: str | None = None,
    quiet: bool = False,
) -> None:
    """Train one trial and write its folder; run again to resume.

    Args:
        data: Dataset folder, or the folder of a known raw dataset.
        model: Architecture by name.
        out: Folder of the trial, or a URL of one in a store (gs://, s3://; docs/scaling_out.md).
        set: dotted.key=value of the configuration; repeat for several.
        mesh: Devices that share the rows of a batch (data), the parameters, too (fsdp), the tokens of a row (context),
            the heads and experts (model), for example data=2,fsdp=4 (default: one device, or with --distributed data
            over all of them).
        remat: Keep less between the forward and the backward pass of a block and compute it again.
        offload: Keep what the optimizer keeps between steps in the host's memory.
        distributed: Be one of several processes that train the trial together: auto (under SLURM, Kubernetes, Open MPI,
            on a TPU pod), or HOST:PORT,PROCESS/PROCESSES with the address of process 0, for example 10.0.0.1:8476,3/4.
        quiet: Plain lines instead of a progress bar.
    """
    from experiments.trial import train_command
    from genrec_jax.train.places import place

    train_command(
        data, model, set, place(out), mesh=mesh, remat=remat, offload=offload, distributed=distributed, quiet=quiet
    )


def plan(
    what: Positional[str],
    *,
    topology: str,
    mesh: str | None = None,
    search: bool = False,
    quick: bool = False,
    remat: bool = False,
    offload: Literal["optimizer"] | None = None,
    items: int | None = None,
    task: Many[tuple[str, ...]] = (),
    set: Many[tuple[str, ...]] = (),
) -> None:
    """Compile a training step for TPUs that are not here, or estimate it for GPUs: memory, traffic, shortest time.

    Args:
        what: A recipe or a model by name.
        topology: Slice of TPU chips, for example v5e:2x2 or v5p:8x16x16; or GPUs, for example h100:8 (an estimate).
        mesh: How its devices share the work, for example data=2,fsdp=2 (default: they share the rows).
        search: Compile several meshes and rank them.
        quick: Let the TPU compiler optimise little: about half the time, for memory and traffic that are rougher.
        remat: As of genrec train.
        offload: As of genrec train.
        items: Number of items of the data (of a model).
        task: Name of a task (of a ranker; one task if none is given); repeat for several.
        set: dotted.key=value of the configuration; repeat for several.
    """
    from experiments.plan import plan_command

    sys.exit(
        plan_command(
            what,
            topology=topology,
            mesh=mesh,
            search=search,
            quick=quick,
            remat=remat,
            offload=offload is not None,
            items=items,
            tasks=task,
            settings=set,
        )
    )


def sweep(
    name: Positional[str],
    *,
    data: Path,
    budget: Literal["small", "medium", "large"] = "small",
    workers: int | None = None,
    executor: Literal["local", "ray", "slurm"] = "local",
    address: str | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    slurm: Many[tuple[str, ...]] = (),
    pack: int = 1,
    mesh: str | None = None,
    remat: bool = False,
    ladder: str | None = None,
    set: Many[tuple[str, ...]] = (),
    only: Many[tuple[str, ...]] = (),
    out: Annotated[str | None, PLACE] = None,
    dry_run: bool = False,
    forecast: bool = False,
    quiet: bool = False,
) -> None:
    """Run a study of experiments/ and write its table and report; run again to finish an interrupted one.

    Args:
        name: Study by name.
        data: Dataset folder, or the folder of a known raw dataset.
        budget: Size of the study.
        workers: Attempts at a time, each at a trial or a pack (default: 1; on a cluster as many as it takes).
        executor: What runs the trials: processes of this machine, a Ray cluster, or SLURM (docs/scaling_out.md).
        address: Address of the Ray cluster (default: the one of this machine).
        cpus: CPUs of an attempt on a cluster (default: 1).
        gpus: GPUs of an attempt on a cluster (default: 0); with Ray a fraction shares one.
        slurm: KEY=VALUE for sbatch, for example partition=gpu or time=120 (minutes); repeat for several.
        pack: Trials that a process trains together, where they differ in seed, learning rates and the like alone.
        mesh: Devices of an attempt's process that share each trial, as of genrec train.
        remat: As of genrec train.
        ladder: Rules by which sizes train, instead of those tuned on MovieLens-1M: a ladder of experiments/ladders by
            name, or a TOML file of one.
        set: dotted.key=value of every trial's configuration; repeat for several.
        only: WORD[,WORD...] of a trial's name as --dry-run prints it, for example hstu,dlrm: the study is those trials
            that have one of these words; repeat to ask for another as well.
        out: Folder of the study, or a URL of one in a store (default: runs/NAME-DATASET-BUDGET).
        dry_run: Print every trial with its FLOPs, memory and expected time, and run nothing.
        forecast: Record what the laws of the trials in --out expect of those that have not begun, and run nothing; what
            comes of it stands in the report.
        quiet: Plain lines instead of a live table.
    """
    from experiments.executors import ExecutorConfig, Training
    from experiments.run import Instead, Rules, run_named
    from experiments.trial import parse_settings
    from genrec_jax.train.places import place

    target = None if out is None else place(out)
    where = ExecutorConfig(executor, workers, address, cpus, gpus, slurm)
    how = Training(pack, mesh, remat)
    instead: Instead | None = "dry_run" if dry_run else "forecast" if forecast else None
    rules = Rules(ladder, parse_settings(set), only)
    sys.exit(run_named(name, data, budget, where=where, how=how, rules=rules, out=target, instead=instead, quiet=quiet))


def recipe(
    names: Positional[tuple[str, ...]],
    *,
    data: Path,
    out: Somewhere,
    seed: Many[tuple[int, ...]] = (),
    epochs: int | None = None,
    protocol: Many[tuple[Literal["original", "honest"], ...]] = (),
    workers: int = 1,
    quiet: bool = False,
) -> None:
    """Train published recipes (experiments/recipes) on a dataset, by both protocols; run again to go on.

    Args:
        names: Recipes by name, for example ml-1m-hstu.
        data: Dataset folder, or the folder of a known raw dataset.
        out: Folder of the trials, or a URL of one in a store; several runs may add to it.
        seed: A seed, 0 if none is given; repeat for several.
        epochs: Fewer epochs than published, for a look.
        protocol: One protocol alone: original (watches the test event) or honest (chooses the epoch on validation).
        workers: Trials at a time.
        quiet: Plain lines instead of a live table.
    """
    from experiments.recipe import recipe_command
    from genrec_jax.train.places import place

    sys.exit(
        recipe_command(
            names, data, place(out), seeds=seed, protocols=protocol, epochs=epochs, workers=workers, quiet=quiet
        )
    )  # fmt: skip


def results(runs: Positional[tuple[Somewhere, ...]], *, out: Path) -> None:
    """Write recipe runs beside the published numbers as a page of Markdown with curves.

    Args:
        runs: Folders of `genrec recipe` and of the study retrieval_choices; record files (.jsonl) of earlier pages.
        out: Markdown file to write, for example docs/results/retrieval.md; its records go beside it (.jsonl).
    """
    from experiments.retrieval_page import write_page
    from genrec_jax.train.places import place

    write_page([place(run) for run in runs], out)


def compare(trials: Positional[tuple[Path, ...]]) -> None:
    """Hold trained trials against the first on the same impressions: NE and paired 95 % intervals.

    Args:
        trials: Folders of finished ranking trials (as `genrec train` writes, or trials/HASH of a study); or one folder
            of a study, whose families are compared at the largest compute that all reached.
    """
    from experiments.compare import compare_command

    compare_command(trials)


def stream(trials: Positional[tuple[Path, ...]], *, out: Path, period: str = "1d", rate: float = 0.03) -> None:
    """Stream trained rankers: predict every period after their training part, then train on it; beside the fixed split.

    Args:
        trials: Folders of finished ranking trials, or of a study, whose families are streamed at the largest compute
            that all of them reached.
        out: Folder of the records; run again to go on after the last period.
        period: Length of a period: a whole number of s, m, h, d or w.
        rate: Share of the trial's learning rates at which it goes on, constant; a large one undoes the decay of its
            training.
    """
    from experiments.streaming import stream_command

    stream_command(trials, out, period, rate)


def score(
    model: Positional[Path],
    *,
    requests: Path,
    out: Path | None = None,
    skip_bad: bool = False,
    microbatch: int | None = None,
    cache_mib: int = 1024,
    cache_type: Literal["float32", "bfloat16", "int8"] | None = None,
    quiet: bool = False,
) -> None:
    """Score the candidates of requests with a trained HSTU or DirL ranker (docs/serving.md has the format).

    Args:
        model: Folder of a ranking trial, or a file that `genrec export` wrote.
        requests: JSONL or parquet file, one request per row.
        out: JSONL or parquet file of scores (default: JSON lines on stdout).
        skip_bad: Skip and count rows that cannot be scored, instead of stopping at the first.
        microbatch: Candidates scored at once (default: 256).
        cache_mib: MiB of users' histories kept between requests.
        cache_type: What keys and values are kept in (default: float32).
        quiet: No progress bar.
    """
    from experiments.score import score_command

    score_command(
        model,
        requests,
        out,
        skip_bad=skip_bad,
        quiet=quiet,
        microbatch=microbatch,
        cache_mib=cache_mib,
        cache_type=cache_type,
    )


def export(
    trial: Positional[Path],
    *,
    out: Path,
    microbatch: int = 256,
    cache_type: Literal["float32", "bfloat16", "int8"] = "float32",
) -> None:
    """Write a trained HSTU or DirL ranker as one file of compiled functions, which `genrec score` reads.

    Args:
        trial: Folder of a ranking trial.
        out: File to write.
        microbatch: Candidates scored at once.
        cache_type: What keys and values are kept in.
    """
    from experiments.score import export_command

    export_command(trial, out, microbatch, cache_type)


def weights(trial: Positional[Path], *, out: Path) -> None:
    """Write a trained retrieval model's parameters by the names of the public PyTorch code (docs/parity.md).

    Args:
        trial: Folder of a trial of HSTU retrieval or SASRec.
        out: File to write, .safetensors or .npz.
    """
    import jax

    from genrec_jax.interop import save
    from genrec_jax.train.loop import read_trial, restored
    from genrec_jax.train.step import bind

    _, model, params = restored(read_trial(trial), trial)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(bind(model, jax.tree.map(lambda x: x.astype("float32"), params)), out)


def parity(files: Positional[tuple[Path, ...]] = ()) -> None:
    """Hold attention, models and training against golden vectors; exit code 1 when one is past its tolerance.

    Args:
        files: Golden files: attention_*.npz, retrieval_*.npz, ranking_*.npz, trajectory_*.npz.
    """
    from experiments.parity.command import parity_command

    sys.exit(parity_command(files))


def sparsity(*, out: Path, data: Path | None = None) -> None:
    """Print how much of long histories Stochastic Length removes, beside the tables of its paper, and draw it.

    Args:
        out: Folder of the figure.
        data: Dataset folder, or the folder of a known raw dataset, whose own lengths are to be thinned too.
    """
    from experiments.sparsity import sparsity_command

    sparsity_command(out, data)


def bench(name: Positional[str] = "all", *, data: Path | None = None) -> None:
    """Measure speed and memory on this machine (docs/benchmarks says how to read it).

    Args:
        name: Benchmark by name, or all.
        data: Folder of Globo's clicks for the import benchmark (default: a random log of its size).
    """
    from experiments.bench import run

    run(name, data)


_COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "plan": plan,
    "sweep": sweep,
    **LAW_COMMANDS,
    "recipe": recipe,
    "results": results,
    "compare": compare,
    "stream": stream,
    "score": score,
    "export": export,
    "weights": weights,
    "parity": parity,
    "sparsity": sparsity,
    "bench": bench,
}


def _data() -> None:
    """Import, generate or show datasets: genrec data {import,synthetic,show}."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. A mistake of the user's is one sentence on stderr and exit code 2."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given[:1] == ["data"]:
            _parse(DATA, given[1:], "genrec data")
        else:
            _parse({"data": _data, **_COMMANDS}, given, "genrec")
    except (UserError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(commands: dict[str, Callable[..., Any]], args: list[str], prog: str) -> None:
    """Runs the subcommand; what the parser says in a box is said in one line instead."""
    parsed: list[Callable[[], Any]] = []

    def deferred(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def keep(*values: Any, **named: Any) -> None:
            parsed.append(lambda: function(*values, **named))

        return keep

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            tyro.extras.subcommand_cli_from_dict(
                {name: deferred(f) for name, f in commands.items()},
                prog=prog,
                args=args,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_sentence(said.getvalue(), prog)) from None
    parsed[0]()


def _sentence(box: str, prog: str) -> str:
    """The first statement of the parser's boxed message."""
    lines = [re.sub(r"[╭╮╰╯│─]", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"^(Parsing error|Required options|Unrecognized options)\s*", "", text)
    text = text.split(" For full helptext")[0].strip(" .:")
    return f"{text} (see {prog} --help)"


if __name__ == "__main__":
    main()
