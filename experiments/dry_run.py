"""What a study will cost, printed before anything runs."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from experiments.progress import duration
from experiments.study import PlannedTrial
from genrec_jax.config import Trial


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


def print_plan(planned: Sequence[PlannedTrial], estimate: Callable[[Trial], Cost], *, workers: int) -> None:
    """One line per trial with FLOPs, memory and expected time, and the totals; a trial with two places counts once."""
    costs = {one.trial.hash: estimate(one.trial) for one in planned}
    total = f"{len(costs)} trials, {workers} at a time"
    width = max(len(text) for text in (total, *(one.name for one in planned)))
    print(f"{'hash':12}  {'trial':{width}}  {'FLOPs':>9}  {'memory':>9}  {'time':>12}")
    for one in planned:
        cost = costs[one.trial.hash]
        print(f"{one.trial.hash:12}  {one.name:{width}}  {_line(cost.flops, cost.memory_bytes, cost.seconds)}")
    flops = sum(cost.flops for cost in costs.values())
    memory = sum(sorted((cost.memory_bytes for cost in costs.values()), reverse=True)[:workers])
    seconds = _wall([cost.seconds for cost in costs.values()], workers)
    print(f"{'total':12}  {total:{width}}  {_line(flops, memory, seconds)}")


def _line(flops: float, memory: float, seconds: float) -> str:
    return f"{flops:9.2e}  {memory / 2**20:6.0f} MB  {duration(seconds):>12}"


def _wall(seconds: Sequence[float], workers: int) -> float:
    """When the last worker is through if the longest trials start first."""
    busy = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)
