from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from genrec_jax.train.cache import enable_compilation_cache


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For modules that begin the same trial again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        enable_compilation_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
