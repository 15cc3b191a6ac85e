"""Tensors of a file that ``torch.save`` wrote (PyTorch 1.6 or later), without PyTorch and without running the file.

The file is a zip archive: ``data.pkl`` is a pickle that names what it is made of, ``data/0``, ``data/1``, … are the
bytes of the storages that its tensors are views of. A pickle may name any function of any module to be called; here it
may name the few in `_ALLOWED`, none of which does more than gather arrays, and is refused for any other.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from genrec_jax.errors import UserError

_TYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Where the public code's checkpoints, and most others, keep the parameters beside the optimiser's state.
_PARTS = ("model_state_dict", "state_dict")
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError),
    *(RuntimeError, zlib.error),  # of the zip archive: encrypted, compressed in an unknown way, not what it should be
)
_PARALLEL = "module."  # what DistributedDataParallel puts before every name


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a saved state dict, or of the state dict in a checkpoint, by name.

    Raises UserError if the file is no such archive, names anything but tensors and containers, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            saved = _Archive(path, archive).load()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a zip archive of torch.save (PyTorch 1.6 or later)") from error
    except _DAMAGE as error:
        raise UserError(f"{path} holds a damaged pickle: {error}") from error
    part = next((saved[part] for part in _PARTS if isinstance(saved, dict) and part in saved), saved)
    if not isinstance(part, dict):
        raise UserError(f"{path} holds no state dict, but a {type(part).__name__}")
    for name, value in part.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {name!r} is no tensor, but a {type(value).__name__}")
    if part and all(name.startswith(_PARALLEL) for name in part):
        part = {name.removeprefix(_PARALLEL): value for name, value in part.items()}
    return dict(part)


class _Storage(NamedTuple):
    """What a tensor is a view of: a flat array."""

    values: np.ndarray


class _Archive:
    """The opened zip archive; storages are read once, whoever shares them."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(f"{path} is not a zip archive of torch.save (PyTorch 1.6 or later)")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.order = "<"
        if f"{self.folder}byteorder" in archive.namelist():
            self.order = ">" if archive.read(f"{self.folder}byteorder").strip() == b"big" else "<"
        self._storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        with self.archive.open(f"{self.folder}data.pkl") as file:
            return _Unpickler(file, self).load()

    def storage(self, kind: str, key: str, count: int) -> _Storage:
        """The storage ``data/key`` of ``count`` numbers; its size is checked before it is read."""
        name = f"{self.folder}data/{key}"
        if name not in self._storages:
            dtype = np.dtype(_TYPES[kind])
            size = self.archive.getinfo(name).file_size if name in self.archive.namelist() else -1
            if size != count * dtype.itemsize:
                raise UserError(f"{self.path}: storage {key} should hold {count} numbers of a {kind}, and does not")
            values = np.frombuffer(self.archive.read(name), dtype)
            self._storages[name] = _Storage(values.byteswap() if self.order == ">" else values)
        return self._storages[name]


class _Kind(NamedTuple):
    """The name of a class of storages, in place of the class."""

    name: str


class _Call(NamedTuple):
    """A function that a pickle can call but, unlike a function, not change: a pickle may also set attributes."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2: a copy of the strided view."""
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    values, entries = storage.values, int(np.prod(shape, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if entries > len(values) or (entries and last >= len(values)):
        raise ValueError(f"a tensor of shape {shape} reaches past its storage of {len(values)}")
    if not entries:
        return np.zeros(shape, values.dtype)
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False).copy()


def _parameter(data: np.ndarray, requires_grad: bool = True, hooks: Any = None) -> np.ndarray:
    """torch._utils._rebuild_parameter."""
    return data


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
}


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and tensors; whatever else the pickle names is refused before it is used."""

    def __init__(self, file: IO[bytes], archive: _Archive):
        super().__init__(file)
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return _Kind(name)
        if (module, name) not in _ALLOWED:
            raise UserError(f"{self._archive.path} names {module}.{name}; only tensors and containers are read")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Kind):
            raise pickle.UnpicklingError(f"an unknown reference {pid!r}")
        _, kind, key, _, count = pid
        return self._archive.storage(kind.name, str(key), int(count))
