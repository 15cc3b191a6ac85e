"""The suite runs on the CPU, whatever accelerator the machine has, and does not wait for the optimising compiler."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny cases spend their time in the compiler, not in the code it makes.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_force_host_platform_device_count=2",  # for what is spread over devices
)
