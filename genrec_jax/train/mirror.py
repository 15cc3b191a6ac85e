"""Folders of a store, copied to this machine while they are worked in; a folder of this machine is its own copy.

A trial's folder is put into its store every ``EVERY`` seconds and at the end, so that a run can go on from what is
there at any moment: first the files of checkpoints, then the records of the steps up to them, then ``sizes.json``,
which says what checkpoints there are. Others are parts of one, left by a kill, and are removed. A result comes last.
"""

import contextlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from genrec_jax.errors import UserError
from genrec_jax.train.places import Place, Store, beside

EVERY = 10.0
_CHECKPOINTS = "checkpoints"
_MARK = f"{_CHECKPOINTS}/sizes.json"  # as `genrec_jax.train.checkpoint` has it
_RESULT = "result.json"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def at_hand(folder: Place) -> Iterator[Path]:
    """A trial's folder on this machine, for the process that has its lease; in the end the store has what it came to.

    Raises OSError where the store cannot be reached then; meanwhile it may be away.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with _Mirror(folder) as mirror:
        yield mirror.local


@contextlib.contextmanager
def brought(source: Place) -> Iterator[Path]:
    """A file, or a folder with the files in it but not below, to read. Raises UserError if there is none."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory() as scratch:
        names = [""] if source.is_file() else [f"/{path.name}" for path in source.glob("*") if path.is_file()]
        if not names:
            raise UserError(f"{source}: there is no such file or folder")
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a launcher has its lease there
                Store(source.url + name).fetch(Path(f"{scratch}/{source.name}{name}"))
        yield Path(scratch) / source.name


@contextlib.contextmanager
def taken(target: Place) -> Iterator[Path]:
    """Where to write a file, and others beside it, that are put into the store together."""
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / target.name
        for name in _files(Path(scratch)):
            (target.parent / name).put(Path(scratch) / name)


class _Mirror:
    """The copy of one trial's folder, and who puts it back."""

    def __init__(self, store: Store) -> None:
        self.local = beside(store, "at-hand")
        self._store = store
        self._known: dict[str, tuple[int, ...]] = {}  # files by their state when they were the same here and there
        self._checkpoints: dict[str, tuple[int, ...]] = {}  # likewise, those of the mark
        self._mark: dict[str, dict[str, int]] = {}  # sizes of their files
        self._said = "{}"  # the mark as it is in the store
        self._left: set[str] = set()  # checkpoints and parts of some that are there beside it
        self._closed = threading.Event()
        self._putting = threading.Thread(target=self._put_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        shutil.rmtree(self.local, ignore_errors=True)  # of a process that was killed
        self.local.mkdir()
        self._fetch()
        self._putting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._putting.join()
        self._put()
        shutil.rmtree(self.local)

    def _fetch(self) -> None:
        """All but TensorBoard's files, to which a run only adds, and parts of checkpoints."""
        names = self._store.files()
        if _MARK in names:
            self._said = (self._store / _MARK).read_text()
            self._mark = json.loads(self._said)
        for name in names:
            step = _step(name)
            if step and step not in self._mark:
                self._left.add(step)
            elif not name.startswith("tensorboard/"):
                with contextlib.suppress(FileNotFoundError):  # what others have there comes and goes
                    (self._store / name).fetch(self.local / name)
        self._say()
        self._known = {name: _state(self.local / name) for name in _records(self.local)}
        here = _checkpoints(self.local)
        self._checkpoints = {step: here.get(step, ()) for step in self._mark}

    def _put_now_and_then(self) -> None:
        while not self._closed.wait(EVERY):
            try:
                self._put()
            except OSError as error:
                _log.warning("%s: not put there, to be tried again: %s", self._store, error.strerror or error)

    def _put(self) -> None:
        here = _checkpoints(self.local)
        for step in [step for step, state in self._checkpoints.items() if here.get(step) != state]:
            del self._mark[step], self._checkpoints[step]
            self._left.add(step)
        if self._left & here.keys():  # dropped as damaged, and written anew
            self._say()
        whole = {step: self._put_checkpoint(step) for step in here.keys() - self._mark.keys()}
        names = _records(self.local)
        self._put_files(name for name in names if name != _RESULT)
        now = _checkpoints(self.local)
        for step, sizes in whole.items():
            if sizes and now.get(step) == here[step]:
                self._mark[step], self._checkpoints[step] = sizes, here[step]
            else:
                self._left.add(step)
        self._say()
        self._put_files(name for name in names if name == _RESULT)

    def _say(self) -> None:
        """Writes the mark, and then removes what it does not hold."""
        mark = json.dumps(self._mark)
        if mark != self._said:
            (self._store / _MARK).write_bytes(mark.encode())
            self._said = mark
        for step in sorted(self._left):
            self._in_store(step).remove()
            self._left.discard(step)

    def _put_checkpoint(self, step: str) -> dict[str, int]:
        """Returns the sizes of its files; none if it was dropped meanwhile."""
        folder, sizes, name = self.local / _CHECKPOINTS / step, {}, ""
        try:
            for name in _files(folder):
                sizes[name] = (folder / name).stat().st_size
                (self._in_store(step) / name).put(folder / name)
        except FileNotFoundError:
            if name and (folder / name).exists():  # it is something in the store that is missing
                raise
            return {}
        return sizes

    def _put_files(self, names: Iterator[str]) -> None:
        """Those that have changed; they may grow meanwhile."""
        for name in names:
            state = _state(self.local / name)
            if state != self._known.get(name):
                (self._store / name).write_bytes((self.local / name).read_bytes())
                self._known[name] = state

    def _in_store(self, step: str) -> Store:
        return self._store / _CHECKPOINTS / step


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _records(folder: Path) -> list[str]:
    """All other files, but for those that are being written."""
    top = [path for path in sorted(folder.iterdir()) if path.name != _CHECKPOINTS and not path.name.startswith(".")]
    return [f"{path.name}/{name}" for path in top for name in _files(path)] + [x.name for x in top if x.is_file()]


def _checkpoints(folder: Path) -> dict[str, tuple[int, ...]]:
    """The states of those that are complete: until then they have other names."""
    found = {}
    for path in (folder / _CHECKPOINTS).glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
            if path.name.isdigit():
                found[path.name] = _state(path)
    return found


def _step(name: str) -> str:
    """Of the checkpoint that a file belongs to, or nothing."""
    first, _, rest = name.partition("/")
    return rest.partition("/")[0] if first == _CHECKPOINTS and "/" in rest else ""


def _state(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size
