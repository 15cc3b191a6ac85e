"""The public operations: argument checks, and the choice of a backend."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas.hstu_attention import reference, xla
from kernels_pallas.hstu_attention.plan import Plan, plan
from kernels_pallas.hstu_attention.tokens import Tokens

# A backend raises NotImplementedError, with the reason, for a call it cannot serve.
BACKENDS: dict[str, dict[str, Callable[..., jax.Array]]] = {
    "xla": {"hstu": xla.hstu, "softmax": xla.softmax},
    "reference": {"hstu": reference.hstu, "softmax": reference.softmax},
}
_DEFAULT = ("xla",)

Implementation = str | Sequence[str] | None


def hstu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens | Plan,
    *,
    divisor: float,
    alpha: float = 1.0,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Pointwise SiLU attention, ``(SiLU(alpha · q kᵀ + bias) ⊙ mask / divisor) v`` (HSTU, arXiv 2402.17152).

    Differentiable once in q, k, v and both tables; padding tokens get exact zeros, whatever they hold.

    Args:
      q, k: [B, T, H, Dqk], float32, bfloat16 or float64; products accumulate in at least float32.
      v: [B, T, H, Dv].
      tokens: attributes of the tokens [B, T], or the `Plan` made from them once for all layers of a step.
      divisor: a configured constant (the longest sequence), never the batch's own length.
      alpha: factor on the products of queries and keys.
      position_bias: [2n - 1], indexed by ``clip(order_k - order_q, -(n-1), n-1) + n - 1``; shared by the heads.
      time_bias: [129], indexed by ``time_bucket(query_time_q, key_time_k)``; shared by the heads.
      implementation: a name of `BACKENDS` to insist on, a sequence of names to try in order, None for the default.

    Returns:
      [B, T, H, Dv] in the dtype of v.

    Raises:
      ValueError: shapes that do not fit, a plan made for other tables, or an unknown backend.
      NotImplementedError: no chosen backend can serve the call; the message gives each one's reason.
    """
    if divisor <= 0:
        raise ValueError(f"divisor must be positive, got {divisor}")
    pairs = _checked_plan(q, k, v, tokens, position_bias, time_bias)
    options = {"divisor": divisor, "alpha": alpha, "position_bias": position_bias, "time_bias": time_bias}
    return _dispatch("hstu", implementation, (q, k, v, pairs), options)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens | Plan,
    *,
    scale: float,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Softmax attention under the same mask and biases, the control of `hstu_attention`.

    ``softmax(scale · q kᵀ + bias)`` over the visible keys, times v; padding rows give exact zeros. Arguments,
    result and errors as in `hstu_attention`.
    """
    pairs = _checked_plan(q, k, v, tokens, position_bias, time_bias)
    options = {"scale": scale, "position_bias": position_bias, "time_bias": time_bias}
    return _dispatch("softmax", implementation, (q, k, v, pairs), options)


def _checked_plan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens | Plan,
    position_bias: jax.Array | None,
    time_bias: jax.Array | None,
) -> Plan:
    """The plan of the call, made here if the caller passed bare tokens; ValueError if anything does not fit."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"expected q and k [B, T, H, Dqk] and v [B, T, H, Dv], got {q.shape}, {k.shape}, {v.shape}")
    if position_bias is not None and (position_bias.ndim != 1 or position_bias.shape[0] % 2 == 0):
        raise ValueError(f"position_bias must have an odd length 2n - 1, got shape {position_bias.shape}")
    if time_bias is not None and (time_bias.ndim != 1 or time_bias.shape[0] == 0):
        raise ValueError(f"time_bias must be a non-empty vector, got shape {time_bias.shape}")
    positions = 0 if position_bias is None else (position_bias.shape[0] + 1) // 2
    buckets = 0 if time_bias is None else time_bias.shape[0]
    pairs = tokens if isinstance(tokens, Plan) else plan(tokens, positions=positions, buckets=buckets)
    if (pairs.positions, pairs.buckets) != (positions, buckets):
        raise ValueError(
            f"the plan is for tables of n={pairs.positions} positions and {pairs.buckets} buckets, "
            f"the call has n={positions} and {buckets}"
        )
    if pairs.tokens.segment.shape != q.shape[:2]:
        raise ValueError(f"tokens are {pairs.tokens.segment.shape}, q is {q.shape}")
    return pairs


def _dispatch(
    operation: str, implementation: Implementation, arguments: tuple[Any, ...], options: dict[str, Any]
) -> jax.Array:
    """Calls the first backend that can serve; a name insists on one, a sequence falls through."""
    names = _DEFAULT if implementation is None else implementation
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"unknown implementation {unknown or names}; choose from {sorted(BACKENDS)}")
    reasons = []
    for name in names:
        try:
            return BACKENDS[name][operation](*arguments, **options)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no backend can serve this {operation} attention: " + "; ".join(reasons))
