"""The public operation: argument checks, the choice of a backend, and the derivative they share."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.gated_norm import formula
from kernels_pallas.gated_norm.dropout import Part, keep_mask
from kernels_pallas.gated_norm.formula import Rule
from kernels_pallas.target import target

BACKENDS = ("reference", "xla", "mosaic_tpu")
_LIMIT = 4096  # widest row of the TPU kernels: a block must hold whole rows

Implementation = str | Sequence[str] | None


def gated_norm(
    attended: jax.Array,
    gate: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    part: Part | None = None,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> jax.Array:
    """``dropout(LayerNorm(attended) · gate)`` over the last axis, the normalisation without an affine part.

    Differentiable once in ``attended`` and ``gate``. Between the passes live only these two and the mask of dropout,
    a byte per entry; the normalised value is computed again.

    Args:
      attended, gate: [..., W]; statistics and products are in at least float32, the result is rounded once.
      rate: share of entries that dropout zeroes (a multiple of 2^-16 after rounding) when a ``key`` is given.
      key: of dropout; None for none.
      part: where the arrays lie in larger ones, of whose mask of dropout theirs is to be a part.
      implementation: "reference" (the definition, by autodiff), "xla", "mosaic_tpu"; a sequence of names to try in
        order; None for the best here.

    Returns:
      As ``attended``.

    Raises:
      ValueError: shapes that differ, a rate outside [0, 1), or an unknown implementation.
      NotImplementedError: no chosen implementation can serve the call; the message gives each one's reason.
    """
    if attended.shape != gate.shape or attended.ndim == 0:
        raise ValueError(f"attended and gate must share one shape [..., W], got {attended.shape} and {gate.shape}")
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout must be in [0, 1), got {rate}")
    chosen = _chosen(implementation, attended, gate)
    if attended.size == 0:
        return attended
    keep = keep_mask(key, attended.shape, rate, part) if key is not None and rate else None
    rule = Rule(chosen, eps, 1 / (1 - rate))
    if chosen == "reference":
        return formula.forward(rule, attended, gate, keep)
    return _gated(rule, attended, gate, keep)


def _chosen(implementation: Implementation, attended: jax.Array, gate: jax.Array) -> str:
    """The first implementation that can serve the call."""
    if implementation is None:
        implementation = ("mosaic_tpu", "xla") if target() == "tpu" else "xla"
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"unknown implementation {unknown or names}; choose from {sorted(BACKENDS)}")
    reasons = []
    for name in names:
        reason = _obstacle(attended, gate) if name == "mosaic_tpu" else ""
        if not reason:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no implementation can serve this gated norm: " + "; ".join(reasons))


def _obstacle(attended: jax.Array, gate: jax.Array) -> str:
    """Why the TPU kernels cannot serve the call, or nothing."""
    if not {attended.dtype, gate.dtype} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        return f"takes bfloat16 or float32, got {attended.dtype} and {gate.dtype}"
    if attended.shape[-1] > _LIMIT:
        return f"rows of {attended.shape[-1]} are wider than {_LIMIT}"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None) -> jax.Array:
    if rule.backend == "mosaic_tpu":
        from kernels_pallas.gated_norm import mosaic_tpu

        return mosaic_tpu.forward(rule, a, u, keep)
    return formula.forward(rule, a, u, keep)


_Residuals = tuple[jax.Array, jax.Array, jax.Array | None]


def _gated_forward(rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, _Residuals]:
    return _gated(rule, a, u, keep), (a, u, keep)


def _gated_backward(rule: Rule, residuals: _Residuals, d_y: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    if rule.backend == "mosaic_tpu":
        from kernels_pallas.gated_norm import mosaic_tpu

        return *mosaic_tpu.backward(rule, *residuals, d_y), None
    return *formula.backward(rule, *residuals, d_y), None


_gated.defvjp(_gated_forward, _gated_backward)
