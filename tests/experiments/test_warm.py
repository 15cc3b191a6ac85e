import subprocess
import sys

import pytest

FORK = """
import os, sys, warnings
import experiments.cli, experiments.worker, experiments.warm, genrec_jax.train.loop
{more}
warnings.simplefilter("error")  # jax warns of a fork beside its own threads
if os.fork() == 0:
    import jax
    assert jax.numpy.ones(3).sum() == 3.0
    os._exit(0)
# Libraries that know of forks (OpenBLAS) have ended their threads for it; any left is one that a worker would lack.
threads = len(os.listdir("/proc/self/task"))
assert os.wait()[1] == 0
sys.exit(threads - 1)
"""


def fork(more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", FORK.format(more=more)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_what_workers_are_forked_from_has_no_threads_and_no_backend() -> None:
    run = fork("")
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_thread_would_be_noticed() -> None:
    assert (
        fork("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()").returncode == 1
    )
