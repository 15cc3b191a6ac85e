"""Writes what ``torch.save`` writes, opcode by opcode, since PyTorch is not here to do it."""

import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Raw(bytes):
    """Opcodes as they are."""


def name(module: str, attribute: str) -> Raw:
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function: Raw, *arguments: object) -> Raw:
    return Raw(function + code(tuple(arguments)) + b"R")


def code(value: object) -> Raw:
    """Opcodes that push a value."""
    match value:
        case Raw():
            return value
        case bool():
            return Raw(b"\x88" if value else b"\x89")
        case None:
            return Raw(b"N")
        case int():
            return Raw(b"J" + struct.pack("<i", value))
        case float():
            return Raw(b"G" + struct.pack(">d", value))
        case str():
            return Raw(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
        case tuple():
            return Raw(b"(" + b"".join(map(code, value)) + b"t")
        case list():
            return Raw(b"](" + b"".join(map(code, value)) + b"e")
        case dict():
            return Raw(b"}(" + b"".join(code(key) + code(entry) for key, entry in value.items()) + b"u")
        case np.ndarray():
            raise TypeError("an array belongs to a Saved")
    raise TypeError(type(value))


class Saved:
    """A file in the making: tensors first, then `write` with what they are part of."""

    def __init__(self, order: str = "<"):
        self.order = order
        self.storages: list[np.ndarray] = []

    def storage(self, values: np.ndarray) -> int:
        self.storages.append(values)
        return len(self.storages) - 1

    def view(
        self,
        key: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int = 0,
        count: int | None = None,
    ) -> Raw:
        """A tensor: a view of a storage, whose count of numbers can be misstated."""
        values = self.storages[key]
        kind = name("torch", STORAGES[values.dtype])
        reference = ("storage", kind, str(key), "cpu", len(values) if count is None else count)
        hooks = call(name("collections", "OrderedDict"))
        return call(
            name("torch._utils", "_rebuild_tensor_v2"),
            Raw(code(reference) + b"Q"),
            offset,
            shape,
            stride,
            False,
            hooks,
        )

    def tensor(self, array: np.ndarray) -> Raw:
        """A contiguous tensor with a storage of its own."""
        stride = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
        return self.view(self.storage(array.reshape(-1)), array.shape, stride[: array.ndim])

    def ordered(self, entries: dict[str, Raw]) -> Raw:
        """A state dict: an OrderedDict that carries ``_metadata`` as an attribute."""
        filled = call(name("collections", "OrderedDict")) + code(entries)[1:]
        return Raw(filled + code({"_metadata": call(name("collections", "OrderedDict"))}) + b"b")

    def write(self, path: Path, value: object, folder: str = "archive", **options: bytes) -> Path:
        """``options``: more entries of the archive."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{folder}/data.pkl", b"\x80\x02" + code(value) + b".")
            archive.writestr(f"{folder}/byteorder", b"big" if self.order == ">" else b"little")
            for key, values in enumerate(self.storages):
                archive.writestr(f"{folder}/data/{key}", values.astype(values.dtype.newbyteorder(self.order)).tobytes())
            archive.writestr(f"{folder}/version", b"3\n")
            for entry, content in options.items():
                archive.writestr(f"{folder}/{entry}", content)
        return path
