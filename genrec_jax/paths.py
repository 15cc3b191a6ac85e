"""Where the lab keeps what it can make again: imported datasets and compiled programs."""

import os
from pathlib import Path


def cache_root() -> Path:
    """``$GENREC_CACHE``, else ``~/.cache/genrec``."""
    return Path(os.environ.get("GENREC_CACHE") or Path.home() / ".cache" / "genrec")
