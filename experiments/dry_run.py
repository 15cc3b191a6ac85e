"""What a study will cost, printed before anything runs."""

import heapq
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from experiments.folder import read_record, read_result
from experiments.progress import duration
from experiments.study import PlannedTrial
from genrec_jax.config import Trial
from genrec_jax.train.places import Place


class Cost(Protocol):
    """What an estimate says of a trial: training FLOPs, peak bytes, expected seconds."""

    @property
    def flops(self) -> float: ...
    @property
    def memory_bytes(self) -> float: ...
    @property
    def seconds(self) -> float: ...


def with_cost(planned: Sequence[PlannedTrial], flops: Callable[[Trial], float]) -> list[PlannedTrial]:
    """The plan with every trial's FLOPs as its cost, so that the longest start first."""
    return [replace(one, cost=flops(one.trial)) for one in planned]


def print_plan(
    planned: Sequence[PlannedTrial], estimate: Callable[[Trial], Cost], *, workers: int, out: Place | None = None
) -> None:
    """One line per trial with FLOPs, memory and expected time, and the totals; a trial with two places counts once.

    The times of a model with finished trials in ``out``, the study's folder, are its FLOPs at the median rate of those;
    the other times are the estimate's own. A last line says which is which.
    """
    costs = {one.trial.hash: estimate(one.trial) for one in planned}
    models = {one.trial.hash: one.trial.model.name for one in planned}
    rates = _measured_rates(out) if out is not None else {}
    times = {
        key: cost.flops / rates[models[key]] if models[key] in rates else cost.seconds for key, cost in costs.items()
    }
    total = f"{len(costs)} trials, {workers} at a time"
    width = max(len(text) for text in (total, *(one.name for one in planned)))
    print(f"{'hash':12}  {'trial':{width}}  {'FLOPs':>9}  {'memory':>9}  {'time':>12}")
    for one in planned:
        cost = costs[one.trial.hash]
        print(f"{one.trial.hash:12}  {one.name:{width}}  {_line(cost.flops, cost.memory_bytes, times[one.trial.hash])}")
    flops = sum(cost.flops for cost in costs.values())
    memory = sum(sorted((cost.memory_bytes for cost in costs.values()), reverse=True)[:workers])
    print(f"{'total':12}  {total:{width}}  {_line(flops, memory, _wall(list(times.values()), workers))}")
    known = sorted(set(models.values()) & rates.keys())
    guessed = sorted(set(models.values()) - rates.keys())
    says = [f"{', '.join(known)} at the median rate of the study's finished trials"] if known else []
    says += [f"{', '.join(guessed)} at an assumed share of this machine's matmul rate"] if guessed else []
    print(f"times: {'; '.join(says)}")


def _measured_rates(out: Place) -> Mapping[str, float]:
    """Training FLOP/s by model: the median over its finished trials, compilation and evaluation left out."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for folder in (out / "trials").glob("*/"):
        config, result = read_record(folder / "config.json"), read_result(folder)
        if config is not None and result is not None and result.get("train_seconds") and result.get("train_flops"):
            found[config["model"]["name"]].append(result["train_flops"] / result["train_seconds"])
    return {model: statistics.median(rates) for model, rates in found.items()}


def _line(flops: float, memory: float, seconds: float) -> str:
    return f"{flops:9.2e}  {memory / 2**20:6.0f} MB  {duration(seconds):>12}"


def _wall(seconds: Sequence[float], workers: int) -> float:
    """When the last worker is through if the longest trials start first."""
    busy = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)
