"""The suite runs on the CPU, whatever accelerator the machine has, and does not wait for the optimising compiler."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny cases spend their time in the compiler, not in the code it makes.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_force_host_platform_device_count=2",  # for what is spread over devices
)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes to the user's cache, and what one has compiled no other compiles again.

    Set once: the fork server keeps the environment it was started in. A folder for each process of pytest: jax's cache
    is not made for reading what another is about to write.
    """
    from genrec_jax.train.cache import enable_compilation_cache

    os.environ["GENREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    enable_compilation_cache()
