"""The memory of a process that trains on a CPU."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Lets the process keep freed memory, up to 1 GiB in a piece, instead of giving it back; call before any thread.

    On a CPU, XLA allocates the temporary arrays of a step anew in every step. Glibc hands pieces of that size back to
    the system at once, and getting fresh pages for them took a quarter of a step of HSTU at width 96. Other C libraries
    are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # One arena: those of other threads than the first cannot hold pieces above 64 MiB.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT)):
        mallopt(option, value)
