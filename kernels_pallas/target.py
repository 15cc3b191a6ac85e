"""Which kind of device programs are made for: the one that is here, or one that they are compiled for without it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_chosen: ContextVar[str | None] = ContextVar("target", default=None)


def target() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what decides between backends and arrangements while a program is traced."""
    return _chosen.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Programs that are traced inside are made for this platform, whatever is here."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)
