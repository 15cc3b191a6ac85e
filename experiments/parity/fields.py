"""Reading the fields of a golden file; what is missing or wrong is one sentence that names file and field."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.parity.case import Arrays
from genrec_jax.errors import UserError


def require(file: Path, arrays: Arrays, names: Sequence[str]) -> None:
    """Refuses a file without all of ``names``."""
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}")


def meta(file: Path, arrays: Arrays, names: Sequence[str]) -> dict[str, Any]:
    """The JSON object in ``meta``, which must hold ``names``."""
    require(file, arrays, ["meta"])
    try:
        found = json.loads(str(arrays["meta"]))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: meta is not JSON") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: meta is not a JSON object")
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{file}: meta lacks {', '.join(missing)}")
    return found


def number(file: Path, meta: dict[str, Any], name: str) -> float:
    """A finite number of ``meta``, 0 where it has none; lengths must not be negative."""
    value = meta.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{file}: meta's {name} must be a number, it is {value!r}")
    if name.endswith("_len") and (value < 0 or value != int(value)):
        raise UserError(f"{file}: meta's {name} must be a length, it is {value!r}")
    return value


def floats(file: Path, arrays: Arrays, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """An array of real numbers as float32."""
    array = arrays[name]
    if array.dtype.kind not in "fiu":
        raise UserError(f"{file}: {name} must hold numbers, it holds {array.dtype}")
    if shape is not None and array.shape != shape:
        raise UserError(f"{file}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    return array.astype(np.float32)


def size(file: Path, found: dict[str, Any], name: str) -> int:
    """A whole number of ``meta``, at least 1."""
    value = number(file, found, name)
    if value < 1 or value != int(value):
        raise UserError(f"{file}: meta's {name} must be a whole number from 1 on, it is {value!r}")
    return int(value)


def integers(file: Path, arrays: Arrays, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Whole numbers: a vector, or an array of the given shape."""
    array = arrays[name]
    if array.dtype.kind not in "iu" or (shape is None and array.ndim != 1):
        raise UserError(f"{file}: {name} must be {'a vector' if shape is None else 'an array'} of whole numbers")
    if shape is not None and array.shape != shape:
        raise UserError(f"{file}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    return array.astype(np.int64)


def offsets(file: Path, arrays: Arrays, total: int) -> np.ndarray:
    """``seq_offsets``, where the packed sequences of ``total`` tokens begin and end."""
    found = integers(file, arrays, "seq_offsets")
    if found.size == 0 or found[0] != 0 or (np.diff(found) < 0).any() or found[-1] > total:
        raise UserError(f"{file}: seq_offsets must rise from 0 to at most T = {total}")
    return found


def targets(file: Path, arrays: Arrays, sequences: int) -> np.ndarray | None:
    """``num_targets``, if there is such a field."""
    found = integers(file, arrays, "num_targets") if "num_targets" in arrays else None
    if found is not None and (found.shape != (sequences,) or (found < 0).any()):
        raise UserError(f"{file}: num_targets must hold a count for each of the {sequences} sequences")
    return found


def under(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    """The arrays named ``group/NAME``, by NAME."""
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
