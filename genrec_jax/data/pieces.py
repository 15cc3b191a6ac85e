"""Files of a dataset in the making, written piece by piece: a killed run finds what is finished, and what is not.

A piece is a part of the work with a name: what it wrote is on the disk, and then, in one rename, its record is there. A
record lists what was written where, with a checksum, and the piece's result. What has no whole record does not count.
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from genrec_jax.errors import UserError

_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Extent:
    """``size`` bytes from byte ``start`` of a file, and their CRC-32."""

    file: str
    start: int
    size: int
    crc: int


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The files below ``folder``, which several processes may write. Names are relative to it."""

    folder: Path

    def write(self, name: str, data: Any, start: int | None = None) -> Extent:
        """Writes bytes as the file ``name``, or into it from byte ``start`` on."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        path = self.folder / name
        with path.open("wb" if start is None else "r+b") as file:
            file.seek(start or 0)
            file.write(view)
        return Extent(name, start or 0, len(view), zlib.crc32(view))

    def extent(self, name: str) -> Extent:
        """The whole of a file that was written bit by bit."""
        path = self.folder / name
        return Extent(name, 0, path.stat().st_size, _checksum(path, 0, path.stat().st_size, lambda size: None)[0])

    def save(self, name: str, values: np.ndarray) -> Extent:
        """Writes an array's bytes; :meth:`read` gives them back."""
        return self.write(name, np.ascontiguousarray(values).view(np.uint8).reshape(-1))

    def read(self, name: str, dtype: Any, first: int = 0, count: int = -1) -> np.ndarray:
        """``count`` values (-1: all) of a saved array from number ``first`` on, as a copy: a map's pages would stay."""
        return np.fromfile(self.folder / name, dtype, count, offset=first * np.dtype(dtype).itemsize)

    def save_keys(self, name: str, keys: Any) -> Extent:
        """Writes texts (a list, or an Arrow array) as an Arrow file."""
        batch = pa.record_batch({"key": pa.array(keys, pa.string())})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return self.write(name, sink.getvalue())

    def keys(self, name: str, first: int = 0, count: int | None = None) -> Any:
        """``count`` of the saved texts from number ``first`` on, as an Arrow array over the mapped file."""
        with pa.memory_map(str(self.folder / name)) as source:
            return pa.ipc.open_file(source).get_batch(0).column(0).slice(first, count)

    def create(self, columns: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        """Empty ``.npy`` files of the given types and shapes, for :meth:`put`; those that are there already stay."""
        for name, (dtype, shape) in columns.items():
            path = self.folder / f"{name}.npy"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_suffix(".new")
                np.lib.format.open_memmap(scratch, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()
                os.replace(scratch, path)

    def put(self, name: str, first: int, values: np.ndarray) -> Extent:
        """Writes rows of a created column, from row ``first`` on, in the column's own type."""
        column = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        row_bytes = column.dtype.itemsize * int(np.prod(column.shape[1:]))
        data = np.ascontiguousarray(values, column.dtype)
        if data.shape[1:] != column.shape[1:] or not 0 <= first <= first + len(data) <= len(column):
            raise ValueError(f"{data.shape} from row {first} on does not fit {name} {column.shape}")
        return self.write(f"{name}.npy", data.view(np.uint8).reshape(-1), column.offset + first * row_bytes)

    def record(self, piece: str, result: Mapping[str, Any], extents: Sequence[Extent]) -> None:
        """Says that a piece is finished, once the disk has what it wrote."""
        for name in {extent.file for extent in extents}:
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        text = json.dumps({"result": result, "extents": [dataclasses.astuple(extent) for extent in extents]})
        scratch = f"done/{piece}.{os.getpid()}"
        self.write(scratch, text.encode())
        os.replace(self.folder / scratch, self._record(piece))

    def recorded(self, piece: str) -> dict[str, Any] | None:
        """The result of a finished piece, or None."""
        try:
            return json.loads(self._record(piece).read_text(encoding="utf-8"))["result"]
        except (FileNotFoundError, ValueError):  # or the machine stopped before the disk had the record
            return None

    def check(self, advance: Callable[[int], None]) -> None:
        """Holds all that finished pieces wrote against its checksums; ``advance`` is told of the bytes read.

        Raises UserError naming the first file that is damaged or incomplete.
        """
        for extent in self.extents():
            path = self.folder / extent.file
            found = _checksum(path, extent.start, extent.size, advance) if path.is_file() else None
            if found != (extent.crc, 0):
                raise UserError(
                    f"{path} is damaged: {extent.size:,} bytes from byte {extent.start:,} on are not what was written; "
                    f"the unfinished work in {self.folder} was thrown away, run again to begin anew"
                )

    def extents(self) -> Iterator[Extent]:
        """What all finished pieces wrote."""
        for path in sorted(self.folder.glob("done/*.json")):
            with contextlib.suppress(ValueError):
                yield from (Extent(*fields) for fields in json.loads(path.read_text(encoding="utf-8"))["extents"])

    def _record(self, piece: str) -> Path:
        return self.folder / f"done/{piece}.json"


def _checksum(path: Path, start: int, size: int, advance: Callable[[int], None]) -> tuple[int, int]:
    """(CRC-32 of ``size`` bytes of a file from ``start`` on, how many of them the file lacks)."""
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
            crc, size = zlib.crc32(chunk, crc), size - len(chunk)
            advance(len(chunk))
    return crc, size
