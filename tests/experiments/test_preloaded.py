import subprocess
import sys

import pytest

FORK = """
import os, sys, warnings
{before}
warnings.simplefilter("error")  # jax warns of a fork beside its own threads
if os.fork() == 0:
    {child}
    os._exit(0)
# Libraries that know of forks (OpenBLAS) have ended their threads for it; any left is one that a worker would lack.
threads = len(os.listdir("/proc/self/task"))
assert os.wait()[1] == 0
sys.exit(threads - 1)
"""


def fork(before: str, child: str) -> subprocess.CompletedProcess[str]:
    """Runs ``before`` in a process and ``child`` in its fork; the exit code is how many threads the fork lacks."""
    script = FORK.format(before=before, child=child)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_what_workers_are_forked_from_has_no_threads_and_no_backend() -> None:
    run = fork(
        before="import experiments.cli, experiments.worker, experiments.executors.preloaded, genrec_jax.train.loop",
        child="import jax; assert jax.numpy.ones(3).sum() == 3.0",
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_thread_would_be_noticed() -> None:
    run = fork(
        before="import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", child="pass"
    )
    assert run.returncode == 1
