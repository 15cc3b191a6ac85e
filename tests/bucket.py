"""An object store for tests, ``bucket://NAME/KEY``, which processes share; imported, fsspec knows it.

Objects lie, by their quoted keys, in the folder NAME of $BUCKETS. As in a store there are no folders; an object appears
whole; nothing is appended to, renamed, locked or created exclusively; and what was listed once is remembered until the
caller says that it may have changed.
"""

import io
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem


def changing(path: str) -> None:
    """Called before every change of an object; for tests to replace."""


class Bucket(AbstractFileSystem):
    protocol = "bucket"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = self._listed(path)
        found = self.dircache[path]
        return found if detail else [entry["name"] for entry in found]

    def _listed(self, path: str) -> list[dict[str, Any]]:
        name, _, prefix = path.partition("/")
        found: dict[str, dict[str, Any]] = {}
        for file in _bucket(name).iterdir():
            key = unquote(file.name)
            if key == prefix:
                return [{"name": path, "size": file.stat().st_size, "type": "file"}]
            below = f"{prefix}/" if prefix else ""
            if not file.name.startswith(".") and key.startswith(below):
                first, deeper, _ = key.removeprefix(below).partition("/")
                kind, size = ("directory", 0) if deeper else ("file", file.stat().st_size)
                found[first] = {"name": f"{path}/{first}", "size": size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values())

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode == "rb":
            return io.BytesIO(_object(path).read_bytes())
        if mode == "wb":
            return _Upload(_object(path))
        raise NotImplementedError(f"objects cannot be opened with mode {mode!r}")

    def rm_file(self, path: str) -> None:
        changing(path)
        _object(path).unlink(missing_ok=True)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        _bucket(path.partition("/")[0])

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.mkdir(path)

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("objects cannot be renamed")


class _Upload(io.BytesIO):
    def __init__(self, target: Path) -> None:
        super().__init__()
        self._target = target

    def close(self) -> None:
        if not self.closed:
            scratch = self._target.with_name(f".{uuid.uuid4().hex}")
            scratch.write_bytes(self.getvalue())
            changing(unquote(self._target.name))
            os.replace(scratch, self._target)
        super().close()


def use(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes the bucket ``one`` in a folder, where what this machine keeps of it is, too."""
    (folder / "buckets" / "one").mkdir(parents=True)
    (folder / "tmp").mkdir()
    patch.setenv("BUCKETS", str(folder / "buckets"))
    patch.setenv("TMPDIR", str(folder / "tmp"))
    patch.setattr(tempfile, "tempdir", None)  # read anew


def _bucket(name: str) -> Path:
    folder = Path(os.environ["BUCKETS"]) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no bucket {name}")
    return folder


def _object(path: str) -> Path:
    name, _, key = path.partition("/")
    return _bucket(name) / quote(key, safe="")


fsspec.register_implementation("bucket", Bucket, clobber=True)
