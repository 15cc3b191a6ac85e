"""Makes a dataset in a process of its own: ``python -m tests.data.prepare WHAT OUT [LOG...] [--die N] [--workers N]``.

``--die N``: the process kills itself in its N-th write, with half of it done.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from genrec_jax.data.importer import import_log
from genrec_jax.data.log import LogMapping, parse_mapping
from genrec_jax.data.pieces import Extent, Pieces
from genrec_jax.data.synthetic import World, generate
from genrec_jax.data.work import Advance, peak_memory
from genrec_jax.errors import UserError

MEMORY = 100_000  # of an import, so that a few thousand events make several pieces of every kind
WORLD = World(users=4000, requests=2, items=300, concentration=75.0)


def mapping() -> LogMapping:
    return parse_mapping(
        user="u",
        item="i",
        time="t",
        labels=["y=y", "good=stars>=4"],
        request="r",
        user_features=["age=age"],
        item_features=["maker=maker"],
        event_features=["os=os"],
    )


def prepare(what: str, out: Path, logs: list[Path], workers: int = 1, memory: int = MEMORY) -> None:
    if what == "world":
        generate(WORLD, out, workers=workers, floor_requests=16)
    else:
        import_log(logs, mapping(), out, name="log", workers=workers, memory=memory, quiet=True)


def die_in_write(number: int) -> None:
    real, count = Pieces.write, 0

    def write(self: Pieces, name: str, data: Any, start: int | None = None) -> Any:
        nonlocal count
        count += 1
        if count == number:
            view = memoryview(data).cast("B") if len(data) else memoryview(b"")
            real(self, name, view[: len(view) // 2], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, name, data, start)

    Pieces.write = write  # type: ignore[method-assign]


def piece(pieces: Pieces, number: int, *, advance: Advance) -> tuple[dict[str, Any], list[Extent]]:
    """A small piece; number 3 is bad, number 5 kills its process."""
    if number == 3:
        raise UserError("number 3 is bad")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(1, 1)
    return {"events": 1, "number": number}, [pieces.write(f"piece-{number}", b"x")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("out", type=Path)
    parser.add_argument("logs", type=Path, nargs="*")
    parser.add_argument("--die", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=int, default=MEMORY)
    given = parser.parse_args()
    if given.die:
        die_in_write(given.die)
    before = peak_memory()
    prepare(given.what, given.out, given.logs, given.workers, given.memory)
    print(before, peak_memory())


if __name__ == "__main__":
    main()
