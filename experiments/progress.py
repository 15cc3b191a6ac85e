"""What a person sees while a study runs: a live table on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LINES_EVERY = 30.0
_REDRAW_EVERY = 0.25


@dataclass
class Running:
    """A trial at work: its share of the launch's cost, and its first and latest progress since this start."""

    name: str
    weight: float
    first: tuple[float, int] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """How much of the trial is behind, in [0, 1]."""
        return self.record["step"] / max(self.record["steps"], 1) if self.record else 0.0

    def seconds_left(self, now: float) -> float | None:
        """At the pace of this start; a trial that was resumed had its earlier steps for free."""
        if self.first is None or self.record["step"] <= self.first[1]:
            return None
        pace = (now - self.first[0]) / (self.record["step"] - self.first[1])
        return pace * (self.record["steps"] - self.record["step"])


class Reporter:
    """Keeps the state of a launch; subclasses show it.

    total, earlier: trials of the study, and how many of them need no work. weight: cost of the trials to run, in any
    unit; the same unit is given to :meth:`started`. pending: how many wait for a machine.
    """

    def __init__(self, total: int, earlier: int, weight: float) -> None:
        self.total = total
        self.finished = earlier
        self.running: dict[str, Running] = {}
        self.pending = 0
        self._weight = weight
        self._behind = 0.0
        self._began = time.monotonic()

    def started(self, key: str, name: str, weight: float) -> None:
        self.running[key] = Running(name, weight)
        self.show(f"start {name}")

    def progress(self, key: str, record: Mapping[str, Any]) -> None:
        one = self.running[key]
        one.record = record
        if one.first is None:
            one.first = (time.monotonic(), record["step"])

    def stopped(self, key: str, note: str) -> None:
        """An attempt ended without an end of its trial."""
        self.show(f"retry {self.running.pop(key).name}: {note}")

    def ended(self, key: str, status: str, note: str) -> None:
        """A trial needs no more work in this launch."""
        one = self.running.pop(key)
        self.finished += 1
        self._behind += one.weight
        left = self.seconds_left()
        eta = f", {duration(left)} left" if left else ""
        self.show(f"{status} {one.name} ({note}) [{self.finished}/{self.total}{eta}]")

    def seconds_left(self) -> float | None:
        """Of the whole launch, by cost; None before anything is known."""
        behind = self._behind + sum(one.weight * one.share for one in self.running.values())
        if behind <= 0:
            return None
        return (time.monotonic() - self._began) * max(self._weight - behind, 0.0) / behind

    def show(self, text: str) -> None:
        """One line that stays."""
        raise NotImplementedError

    def tick(self) -> None:
        """Called several times a second."""

    def close(self) -> None:
        """The launch is over."""


class Lines(Reporter):
    """Plain lines without control characters; ``every``: seconds between lines of progress (None: events alone)."""

    def __init__(self, total: int, earlier: int, weight: float, every: float | None) -> None:
        super().__init__(total, earlier, weight)
        self._every = every
        self._last = time.monotonic()

    def show(self, text: str) -> None:
        print("".join(c if c.isprintable() else " " for c in text), flush=True)

    def tick(self) -> None:
        now = time.monotonic()
        if self._every is None or now - self._last < self._every:
            return
        self._last = now
        for one in self.running.values():
            self.show(f"      {one.name}: {', '.join(cell for cell in _cells(one, now) if cell)}")
        if self.pending:
            self.show(f"      {self.pending} wait for a machine")


class LiveTable(Reporter):
    """A table of the trials at work that redraws itself below the lines of what has happened."""

    def __init__(self, total: int, earlier: int, weight: float, console: Console | None = None) -> None:
        super().__init__(total, earlier, weight)
        self._drawn = 0.0
        self._live = Live(self._draw(), console=console or Console(highlight=False), auto_refresh=False, transient=True)
        self._live.start()

    def show(self, text: str) -> None:
        self._live.console.print(Text(text))

    def tick(self) -> None:
        if time.monotonic() - self._drawn >= _REDRAW_EVERY:
            self._drawn = time.monotonic()
            self._live.update(self._draw(), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _draw(self) -> Group:
        now = time.monotonic()
        table = Table(box=None, pad_edge=False)
        for title in ("trial", "step", "loss", "speed", "time left"):
            table.add_column(title, justify="left" if title == "trial" else "right")
        for one in self.running.values():
            table.add_row(Text(one.name), *_cells(one, now))
        left = self.seconds_left()
        eta = "" if left is None else f", {duration(left)} left"
        pending = f", {self.pending} wait for a machine" if self.pending else ""
        line = f"{self.finished}/{self.total} trials{pending}, {duration(now - self._began)} so far{eta}"
        return Group(table, Text(line))


def make_reporter(total: int, earlier: int, weight: float, *, quiet: bool) -> Reporter:
    """The one that suits where stdout goes."""
    if quiet:
        return Lines(total, earlier, weight, every=None)
    if not sys.stdout.isatty():
        return Lines(total, earlier, weight, every=_LINES_EVERY)
    return LiveTable(total, earlier, weight)


def duration(seconds: float) -> str:
    """A time a person reads at a glance: "9.5 s", "4 min 07 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds / 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _cells(one: Running, now: float) -> tuple[str, str, str, str]:
    """Step, loss, speed, time left."""
    record = one.record
    if not record:
        return ("starting", "", "", "")
    left = one.seconds_left(now)
    return (
        f"step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}",
        f"{record['examples_per_second']:.0f} examples/s",
        "" if left is None else f"{duration(left)} left",
    )
