"""Importing a click log: seconds and peak resident memory, in a process of its own."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_CLICKS, _USERS, _ITEMS = 2_988_181, 322_897, 46_033  # the size of Globo's log


def stand_in(folder: Path) -> Path:
    """A random log with the size and columns of Globo's, for machines without it."""
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, _USERS, _CLICKS)).astype(np.int32)
    columns = {
        "user_id": user,
        "session_id": np.repeat(np.arange(_CLICKS // 2 + 1), 2)[:_CLICKS],
        "click_article_id": (rng.zipf(1.3, _CLICKS) % _ITEMS).astype(np.int32),
        "click_timestamp": 1_506_825_423_271 + np.cumsum(rng.integers(0, 800, _CLICKS)),
    }
    names = ("environment", "deviceGroup", "os", "country", "region", "referrer_type")
    columns |= {f"click_{name}": rng.integers(1, 20, _CLICKS).astype(np.int32) for name in names}
    pq.write_table(pa.table(columns), folder / "clicks.parquet")
    return folder


def measure(log: Path, out: Path) -> dict[str, float]:
    """Imports in this process."""
    from genrec_jax.data.catalog import recognise
    from genrec_jax.data.importer import import_log
    from genrec_jax.data.work import peak_memory

    raw = recognise(log)
    assert raw is not None
    start = time.perf_counter()
    import_log(raw.files, raw.mapping, out, name=raw.name, quiet=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": peak_memory() / 2**30}


def run(data: Path | None = None) -> dict[str, float]:
    """Imports ``data`` (a Globo folder), or a stand-in of its size, three times, each in a fresh process; medians."""
    with tempfile.TemporaryDirectory() as scratch:
        log = data or stand_in(Path(scratch))
        command = [sys.executable, "-m", __name__, str(log), str(Path(scratch) / "out")]
        found = [json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(3)]
    return {key: statistics.median(f[key] for f in found) for key in found[0]}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
