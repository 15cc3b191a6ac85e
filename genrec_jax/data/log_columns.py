"""Columns of a chunk as checked numpy arrays. Every refusal names the file and the row."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec_jax.data.log import Label
from genrec_jax.data.log_files import Chunk, LogFile
from genrec_jax.errors import UserError

_ROLES = {
    "user": ("integer", "text"),
    "item": ("integer", "text"),
    "request": ("integer", "text"),
    "key": ("integer", "text"),
    "time": ("integer", "float", "date-time"),
    "order": ("integer", "float"),
    "label": ("boolean", "integer", "float"),
    "feature": ("integer", "text", "boolean"),
}


def check_kinds(file: LogFile, roles: dict[str, str]) -> None:
    """Refuses a typed column that cannot play its role (``roles``: column -> ``user``, ``label like``, ...)."""
    for column, role in roles.items():
        kind, accepted = file.kinds[column], _ROLES[role.split()[0]]
        known = "date-time" if kind.startswith("timestamp") else kind
        if known not in ("untyped", *accepted):
            raise UserError(f"{file.path}: column {column!r} (for {role}) has type {kind}, not {' or '.join(accepted)}")


class Vocabulary:
    """Dense ids for keys, in order of first appearance, from ``first`` on. Keys are compared as text, 7 equals "7".

    ``sealed`` once a catalogue has listed every key: then an unknown key has no id.
    """

    def __init__(self, first: int):
        self.first = first
        self.ids: dict[str, int] = {}
        self.sealed = False

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, keys: Any) -> np.ndarray:
        """Ids [rows] int32 of an Arrow array; 0 where it is null, -1 for a key that a sealed vocabulary lacks."""
        encoded = keys.dictionary_encode()
        # Only the distinct keys of the chunk pass through Python.
        distinct = encoded.dictionary.cast(pa.string()).to_pylist()
        ids, first = self.ids, self.first
        if self.sealed:
            codes = [ids.get(key, -1) for key in distinct]
        else:
            codes = [ids.setdefault(key, len(ids) + first) for key in distinct]
        table = np.array([*codes, 0], np.int32)
        return table[encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]


def key_table(keys: Any, first: int, integers: bool) -> Any:
    """Arrow table (id int32 from ``first`` on, key) of texts, which are written as ``integers`` if told so."""
    ids = pa.array(np.arange(first, first + len(keys), dtype=np.int32))
    return pa.table({"id": ids, "key": keys.cast(pa.int64()) if integers else keys})


def are_integers(keys: Any) -> bool:
    """Whether all texts of an Arrow array are integers, and nothing is lost as such ("007" is not an integer)."""
    try:
        return bool(keys.cast(pa.int64()).cast(pa.string()).equals(keys))
    except pa.ArrowInvalid:
        return False


def keys(chunk: Chunk, column: str, role: str, vocabulary: Vocabulary) -> np.ndarray:
    """Ids [rows] int32 of a column of keys; refuses a missing one."""
    _refuse_null(chunk, column, role)
    return vocabulary.encode(chunk.columns[column])


def hashes(chunk: Chunk, column: str, role: str) -> np.ndarray:
    """64-bit hashes [rows] uint64 of a column of keys' texts; refuses a missing key."""
    _refuse_null(chunk, column, role)
    encoded = chunk.columns[column].dictionary_encode()
    distinct = encoded.dictionary.cast(pa.string()).to_pylist()
    table = np.array([int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) for key in distinct], np.uint64)
    return table[encoded.indices.to_numpy(zero_copy_only=False)]


def whole_numbers(chunk: Chunk, column: str, role: str) -> np.ndarray:
    """Values [rows] int64 of a time or order column; refuses missing, non-numeric and fractional values."""
    _refuse_null(chunk, column, role)
    array = chunk.columns[column]
    try:
        return array.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        pass  # fractions, numbers written as 1.0, or no numbers: look closer
    numbers = _floats(chunk, column, role)
    _refuse(chunk, column, role, ~(np.floor(numbers) == numbers), "which is not a whole number")
    _refuse(chunk, column, role, np.abs(numbers) >= 2.0**63, "which does not fit 64 bits")
    return numbers.astype(np.int64)


def times(chunk: Chunk, column: str) -> np.ndarray:
    """Times [rows] int64 in the column's unit; refuses what is not a whole number from 0 on."""
    values = whole_numbers(chunk, column, "time")
    _refuse(chunk, column, "time", values < 0, "which is negative")
    return values


def labels(chunk: Chunk, label: Label) -> np.ndarray:
    """One task's labels [rows] uint8. A plain label must be 0 or 1; a compared one is 0 where the value is missing."""
    role = f"label {label.name}"
    if label.test is None:
        _refuse_null(chunk, label.column, role)
    numbers = _floats(chunk, label.column, role)
    if label.test is None:
        _refuse(chunk, label.column, role, ~((numbers == 0) | (numbers == 1)), "which is neither 0 nor 1")
        return numbers.astype(np.uint8)
    return (numbers >= label.value if label.test == ">=" else numbers == label.value).astype(np.uint8)


def _floats(chunk: Chunk, column: str, role: str) -> np.ndarray:
    """Values [rows] float64, NaN where missing; texts may be numbers, true or false."""
    array = chunk.columns[column]
    if pa.types.is_string(array.type):
        array = _booleans_as_digits(array)
    try:
        return np.asarray(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid:
        row = _first(array, _is_number)
        value = chunk.columns[column][row].as_py()
        raise UserError(f"{chunk.where(row)}: {_named(column, role)} is {value!r}, which is not a number") from None


def _booleans_as_digits(texts: Any) -> Any:
    lower = pc.utf8_lower(texts)
    return pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", texts))


def _is_number(text: str | None) -> bool:
    try:
        pa.scalar(text, pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _first(array: Any, good: Callable[[Any], bool]) -> int:
    return next((row for row, value in enumerate(array.to_pylist()) if not good(value)), 0)


def _named(column: str, role: str) -> str:
    return f"column {column!r}" if role == column else f"column {column!r} (for {role})"


def _refuse_null(chunk: Chunk, column: str, role: str) -> None:
    array = chunk.columns[column]
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise UserError(f"{chunk.where(row)}: {_named(column, role)} has no value")


def _refuse(chunk: Chunk, column: str, role: str, bad: np.ndarray, why: str) -> None:
    """Refuses the first row where ``bad`` [rows] holds."""
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{chunk.where(row)}: {_named(column, role)} is {chunk.columns[column][row].as_py()}, {why}")
