"""Pallas TPU kernels: each array passes the memory once.

XLA makes several passes of the same formula: statistics, normalisation, gate.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.gated_norm import formula
from kernels_pallas.gated_norm.formula import Rule

_BLOCK_ELEMENTS = 2**17  # of one array in a step: half a MiB in float32, six arrays, two buffers each
_LEAST_ROWS = 32  # a tile of the mask, one byte per entry


def forward(rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None) -> jax.Array:
    """As `formula.forward`."""
    return _by_rows(functools.partial(formula.forward, rule), (a, u), keep, (a.dtype,))[0]


def backward(
    rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None, d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `formula.backward`."""

    def work(a: jax.Array, u: jax.Array, d_y: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return formula.backward(rule, a, u, keep, d_y)

    d_a, d_u = _by_rows(work, (a, u, d_y), keep, (a.dtype, u.dtype))
    return d_a, d_u


def _by_rows(
    work: Callable[..., jax.Array | tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    keep: jax.Array | None,
    types: tuple[jnp.dtype, ...],
) -> list[jax.Array]:
    """``work(*arrays, keep)`` in blocks of whole rows; the arrays [..., W] and the results share one shape."""
    shape = arrays[0].shape
    width = shape[-1]
    given = [*arrays, keep.astype(jnp.int8)] if keep is not None else [*arrays]
    rows = [x.reshape(-1, width) for x in given]
    block = min(max(_BLOCK_ELEMENTS // width // _LEAST_ROWS, 1) * _LEAST_ROWS, rows[0].shape[0])

    def kernel(*refs: jax.Array) -> None:
        inside, out = refs[: len(rows)], refs[len(rows) :]
        read = [ref[...] for ref in inside[: len(arrays)]]
        mask = None if keep is None else inside[-1][...].astype(jnp.int32) != 0
        results = work(*read, mask)
        for ref, result in zip(out, results if isinstance(results, tuple) else (results,)):
            ref[...] = result

    spec = pl.BlockSpec((block, width), lambda i: (i, 0))
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows[0].shape[0], block),),
        in_specs=[spec] * len(rows),
        out_specs=[spec] * len(types),
        out_shape=[jax.ShapeDtypeStruct(rows[0].shape, kind) for kind in types],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(*rows)
    return [x.reshape(shape) for x in results]
