"""The persistent compilation cache: a trial of a known shape starts without compiling."""

import jax

from genrec_jax.paths import cache_root


def enable_compilation_cache() -> None:
    """Caches every compilation of this process, however small; call before the first one."""
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
