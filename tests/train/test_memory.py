"""A process that trains keeps what it frees."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, threading
from genrec_jax.train.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
c = ctypes.CDLL(None)
c.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, faults = 200 << 20, []

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = c.malloc(size)
    ctypes.memset(piece, 1, size)
    c.free(piece)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(3):  # as XLA does, in threads of its own
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(*faults, size // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc's malloc")
@pytest.mark.parametrize("keep", [True, False])
def test_pages_are_taken_from_the_system_once(keep: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True)
    first, second, third, pages = map(int, done.stdout.split())
    assert first > 0.9 * pages
    if keep:
        assert max(second, third) < 0.01 * pages
    else:
        assert min(second, third) > 0.9 * pages  # or there would be nothing to mend
