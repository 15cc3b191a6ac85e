import os
import sys
from pathlib import Path

import pytest

# The fake trainer is imported by name in worker processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes to the user's cache. Set once: the fork server keeps the environment it was started in."""
    os.environ["GENREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
