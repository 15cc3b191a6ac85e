"""The files of a trial's folder: written whole or not at all, so that a killed run leaves nothing false behind."""

import json
import math
import os
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "flax", "optax", "numpy", "grain")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes beside ``path`` and renames: readers see the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def versions() -> dict[str, str]:
    return {f"version/{name}": metadata.version(name) for name in _PACKAGES}


class MetricsLog:
    """``metrics.jsonl``, one object per logged step; lines after ``step`` are dropped when a run resumes there."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Complete lines only: a kill may have cut the last one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
