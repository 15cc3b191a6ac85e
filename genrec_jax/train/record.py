"""The files of a trial's folder: written whole or not at all, so that a killed run leaves nothing false behind."""

import dataclasses
import io
import json
import math
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from genrec_jax.noise import UserSums
from genrec_jax.train.places import Place, write_text, write_whole

_PACKAGES = ("jax", "flax", "optax", "numpy", "grain")
_COLUMNS = ("users", "rows", "losses", "positives")


def write_json(path: Place, record: dict[str, Any]) -> None:
    """Readers see the old file or the new one."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_users(path: Place, sums: UserSums) -> None:
    """Writes what each evaluated user adds to NE: in a trial's ``users.npz``, of the part that ``eval_set`` names."""
    content = io.BytesIO()
    np.savez_compressed(content, **dataclasses.asdict(sums))
    write_whole(path, content.getvalue())


def read_users(path: Place) -> UserSums | None:
    """The inverse; None where there is no such record, as with older trials and those of retrieval."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as found:
            return UserSums(tasks=tuple(found["tasks"].tolist()), **{name: found[name] for name in _COLUMNS})
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def versions() -> dict[str, str]:
    return {f"version/{name}": metadata.version(name) for name in _PACKAGES}


class MetricsLog:
    """``metrics.jsonl``, one object per logged step and one per validation.

    Lines after ``step`` are dropped when a run resumes there; ``kept``: the others and those added, oldest first.
    """

    def __init__(self, path: Path, step: int):
        self.kept: list[dict[str, Any]] = [record for record in read_lines(path) if record["step"] <= step]
        write_text(path, "".join(f"{json.dumps(record)}\n" for record in self.kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self.kept.append(finite)

    def close(self) -> None:
        self._file.close()


def read_lines(path: Place) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; complete lines only: a kill may have cut the last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if not isinstance(value, list | tuple) else json.dumps(value)
    return out
