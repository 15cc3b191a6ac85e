"""Prints the worst error of every attention backend against the dense formula in the same precision.

``JAX_PLATFORMS=cpu python -m tests.kernels.error_table [BACKEND …]``; the TPU and GPU kernels are interpreted.
A ratio of 1 is the dense formula's own error; the suite allows 2 for outputs and 5 for gradients.
"""

import contextlib
import functools
import sys
from unittest import mock

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hstu_attention import mosaic_gpu_pieces, mosaic_tpu_tiles, xla, xla_tiles
from tests.kernels.attention_cases import attend_each, cases, error_ratios

BOTH = (jnp.float32, jnp.bfloat16)
# Name of the line: (backend, block its cases straddle, width of a head, dtypes).
LINES = {
    "reference": ("reference", 64, 8, BOTH),
    "xla": ("xla", 64, 8, BOTH),
    "xla, long rows": ("xla", 32, 8, BOTH),
    "mosaic_tpu, interpreted": ("mosaic_tpu", 128, 8, BOTH),
    "mosaic_gpu, interpreted": ("mosaic_gpu", 128, 64, BOTH[1:]),
}


@contextlib.contextmanager
def runnable(line):
    """Makes the backend of a line run here, on tiles small enough for the cases to have several."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        if line == "xla, long rows":
            patch(mock.patch.object(xla, "LONGEST_ROW", 0))
            patch(mock.patch.object(xla_tiles, "BLOCK", LINES[line][1]))
        elif line.startswith("mosaic_tpu"):
            patch(mock.patch.object(mosaic_tpu_tiles, "block_size", return_value=128))
            patch(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)))
        elif line.startswith("mosaic_gpu"):
            patch(mock.patch.object(mosaic_gpu_pieces, "WEIGHTS_IN_REGISTERS", False))
            patch(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)))
        yield


def main(wanted):
    """One row per line of the table and dtype."""
    print(f"{'backend':26}{'dtype':10}{'cases':>6}{'worst output':>14}{'worst gradient':>16}")
    for line, (backend, block, width, dtypes) in LINES.items():
        if wanted and backend not in wanted:
            continue
        call = functools.partial(attend_each, implementation=backend)
        for dtype in dtypes:
            found = []
            with runnable(line):
                for case in cases(block):
                    for bias in (False, True):
                        found.append(error_ratios(case, dtype, call, position=bias, time=bias, dqk=width, dv=width))
            output, gradient = max(r[0] for r in found), max(max(r[1:]) for r in found)
            name = jnp.dtype(dtype).name
            print(f"{line:26}{name:10}{len(found):>6}{output:>14.2f}{gradient:>16.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
