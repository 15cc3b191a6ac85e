"""A raw dataset: its files and what their columns mean, before any import."""

import dataclasses
import hashlib
import json
from pathlib import Path

from genrec_jax.data.log import LogMapping


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """What an adapter makes of a folder: log files in reading order, and their mapping.

    notes: sentences that every report on the dataset must repeat.
    """

    name: str
    files: tuple[Path, ...]
    mapping: LogMapping
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Hexadecimal name of what an import would read: names, sizes and times of all files, mapping and notes."""
        files = [*self.files, *(table.file for table in self.mapping.tables)]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = json.dumps([stamps, self.mapping.to_json(), *self.notes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
