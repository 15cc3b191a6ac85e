"""Where records are kept: a folder of this machine, or of a store that fsspec knows by a URL (``gs://…``, ``s3://…``).

What an object store cannot do is decided here and in `genrec_jax.train.mirror`; nobody else asks which of the two a
place is. A store has no folders, no appending, no renaming, no locks and no times of its own: an object is put whole,
and readers see the old one or the new one. So files that grow, and checkpoints, are written on this machine and put
into the store from time to time; a lease there is an object that its holder rewrites (`experiments.lease`).
"""

import contextlib
import errno
import hashlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from genrec_jax.errors import UserError

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
SETTLE = 1.0  # seconds after which the last of several who wrote a file at once is known
_KINDS = (FileNotFoundError, FileExistsError, PermissionError)


@dataclass(frozen=True, order=True)
class Store:
    """A folder or an object of a store: what is used here of :class:`pathlib.Path`, and the copying of whole files.

    Whatever a store's package may raise comes as an OSError with the URL.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Store":
        return Store(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Store":
        return Store(self.url.rpartition("/")[0])

    def absolute(self) -> "Store":
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """There are no folders to make."""

    def exists(self) -> bool:
        return bool(self._call("exists"))

    def is_file(self) -> bool:
        return bool(self._call("isfile"))

    def read_bytes(self) -> bytes:
        content: bytes = self._call("cat_file")
        return content

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Whole or not at all."""
        self._in_a_folder("pipe_file", content)

    def unlink(self, *, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] if missing_ok else []):
            self._call("rm_file")

    def glob(self, pattern: str) -> Iterator["Store"]:
        for name in sorted(self._call("glob", below=f"/{pattern}")):
            yield Store(self.url + name.rstrip("/").removeprefix(self._path))

    def files(self) -> list[str]:
        """All objects below, by their names from here."""
        return [name.removeprefix(f"{self._path}/") for name in self._call("find")]

    def fetch(self, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        self._call("get_file", str(to))

    def put(self, file: Path) -> None:
        """A file that does not change meanwhile."""
        self._in_a_folder("put_file", before=(str(file),))

    def remove(self) -> None:
        """All objects below."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", recursive=True)

    def create(self, content: bytes) -> bool:
        """As :func:`create`. A conditional put lets one of several through at once, where the store has it; where it
        has not, the one who wrote last."""
        if self.exists():
            return False
        try:
            self._in_a_folder("pipe_file", content, mode="create")
        except FileExistsError:
            return False
        time.sleep(SETTLE)
        with contextlib.suppress(FileNotFoundError):
            return self.read_bytes() == content
        return False

    @property
    def _path(self) -> str:
        """By which the file system knows it."""
        path: str = fsspec.core.url_to_fs(self.url)[1]
        return path

    def _call(self, method: str, *after: Any, before: tuple[Any, ...] = (), below: str = "", **options: Any) -> Any:
        """A method of the file system, as it is now for everybody: its package may remember what it has seen."""
        try:
            system, path = fsspec.core.url_to_fs(self.url)
            system.invalidate_cache()
            return getattr(system, method)(*before, path + below, *after, **options)
        except Exception as error:  # what packages raise of networks and rights has nothing in common
            kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
            raise kind(getattr(error, "errno", None) or errno.EIO, _sentence(error), self.url) from error

    def _in_a_folder(self, method: str, *after: Any, **options: Any) -> None:
        """Writes, after making the folders above where the file system has some, but for the first, a bucket."""
        try:
            self._call(method, *after, **options)
        except FileNotFoundError:
            parts = self._path.split("/")
            first = 2 if parts[0] else 3
            for depth in range(first, len(parts)):
                up = Store(self.url.rsplit("/", len(parts) - depth)[0])
                with contextlib.suppress(FileExistsError):
                    up._call("mkdir", create_parents=False)
            self._call(method, *after, **options)


Place = Path | Store


def place(text: str) -> Place:
    """Where a path or a URL leads. Raises UserError for a URL that cannot be used here, before anything is written."""
    protocol, url, _ = text.partition("://")
    if not url or protocol in ("file", "local"):
        return Path(text.removeprefix(f"{protocol}://") if url else text)
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(f"{text}: no store is known by {protocol}://") from None
    except ImportError as error:
        if protocol in _EXTRAS:
            raise UserError(
                f"{text} needs more packages: install with pip install 'genrec-lab[{_EXTRAS[protocol]}]'"
            ) from None
        raise UserError(f"{text} needs more packages: {_sentence(error)}") from None
    found = Store(text.rstrip("/"))
    try:
        found.exists()
    except OSError as error:
        raise UserError(f"{text} cannot be reached: {error.strerror or error}") from None
    return found


def as_folder(at: Place, what: str) -> Path:
    """The place, for ``what`` needs a folder of a file system. Raises UserError for a store."""
    if isinstance(at, Store):
        raise UserError(f"{what} needs a folder of a file system, not {at}")
    return at


def write_text(to: Place, text: str) -> None:
    """Writes a file so that readers see the old one or the new one."""
    write_whole(to, text.encode())


def write_whole(to: Place, content: bytes) -> None:
    """As :func:`write_text`."""
    if isinstance(to, Store):
        to.write_bytes(content)
        return
    aside = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    aside.write_bytes(content)
    os.replace(aside, to)


def create(to: Place, text: str) -> bool:
    """Writes a file that is not there yet; False if there is one."""
    if isinstance(to, Store):
        return to.create(text.encode())
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def renew(file: Place, text: str) -> None:
    """Lets others see that whoever wrote the text is still there."""
    if isinstance(file, Store):
        file.write_bytes(f"{text}\n{time.time_ns()}".encode())
    else:
        os.utime(file)


def renewed(file: Place) -> tuple[str, str] | None:
    """The text, and what changes whenever it is renewed; None if there is no such file."""
    try:
        if isinstance(file, Store):
            text, _, since = file.read_text().partition("\n")
            return text, since
        with file.open(encoding="utf-8") as opened:  # anew each time: then a network file system asks its server
            return opened.read(), str(os.fstat(opened.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def machine(at: Place) -> str:
    """A name that this machine has until it is started again; containers of one machine may have several.

    Those who have the same name for a place have the same :func:`lock_file` for it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        boot = "0"
    name = f"{socket.gethostname()}-{boot}"
    return f"{name}-{_scratch_name()}" if isinstance(at, Store) else name


def lock_file(of: Place) -> Path:
    """The file that the processes of this machine lock for a place."""
    return beside(of.parent, f"{of.name}.{machine(of)}")


def beside(folder: Place, name: str) -> Path:
    """A file of this machine that belongs to a folder: in it, or in the scratch folder of this user."""
    if isinstance(folder, Path):
        return folder / name
    return scratch() / f"{digest(folder)}.{name}"


def jobs_of(folder: Place, cwd: Path) -> Path:
    """A folder that all machines of a cluster see: below the place, or for a store below the working directory."""
    return folder / "slurm" if isinstance(folder, Path) else cwd / "runs" / ".slurm" / digest(folder)


def digest(of: Store) -> str:
    return hashlib.sha256(of.url.encode()).hexdigest()[:16]


def scratch() -> Path:
    """The folder of this user on this machine, below ``TMPDIR``, for what stores cannot do."""
    folder = Path(tempfile.gettempdir()) / f"genrec-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder


def _scratch_name() -> str:
    """Of the scratch folder: who does not see the same one is another machine."""
    file = scratch() / "name"
    if not file.exists():
        mine = file.with_name(uuid.uuid4().hex)
        mine.write_text(mine.name, encoding="ascii")
        with contextlib.suppress(FileExistsError):
            os.link(mine, file)  # whole, and once
        mine.unlink()
    return file.read_text(encoding="ascii")


def _sentence(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return (said or type(error).__name__).rstrip(".")
