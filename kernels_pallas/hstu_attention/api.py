"""The public operations: argument checks, and the choice of a backend."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.gated_norm import Part, keep_mask
from kernels_pallas.hstu_attention.columns import Columns, heads_apart
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens, jagged_tokens, padded_tokens
from kernels_pallas.hstu_attention.varying import varying_like
from kernels_pallas.target import target

# A backend is a module with `prepare(tokens, positions, buckets)`, run once per plan, and the operations `hstu` and
# `softmax`; an operation raises NotImplementedError, with the reason, for a call it cannot serve. A backend with
# READS_COLUMNS is given `Columns` as they are.
BACKENDS: dict[str, str] = {
    "reference": "kernels_pallas.hstu_attention.reference",
    "xla": "kernels_pallas.hstu_attention.xla",
    "mosaic_tpu": "kernels_pallas.hstu_attention.mosaic_tpu",
    "mosaic_gpu": "kernels_pallas.hstu_attention.mosaic_gpu",
}
_DEFAULTS = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("mosaic_gpu", "xla")}

Implementation = str | Sequence[str] | None


def hstu_attention(
    q: jax.Array | Columns,
    k: jax.Array | Columns,
    v: jax.Array | Columns,
    offsets: jax.Array | Tokens | Plan,
    *,
    max_len: float,
    alpha: float = 1.0,
    num_targets: jax.Array | None = None,
    window: int = 0,
    full_len: int = 0,
    context_len: int = 0,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    timestamps: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Pointwise SiLU attention, ``(SiLU(alpha · q kᵀ + bias) ⊙ mask / max_len) v`` (HSTU, arXiv 2402.17152).

    Differentiable once in q, k, v and both tables; padding tokens get exact zeros, whatever they hold.

    Args:
      q, k: packed sequences [T, H, Dqk], or rows [B, T, H, Dqk] when ``offsets`` is `Tokens` or a `Plan`; float32,
        bfloat16 or float64; products accumulate in at least float32. `Columns` are read where they lie.
      v: as q, with Dv.
      offsets: int [B + 1], where the packed sequences begin and end; or the attributes of tokens in rows [B, T]; or
        the `Plan` made from either once for all layers of a step.
      max_len: the divisor, a configured constant (the longest sequence), never the batch's own length.
      alpha: factor on the products of queries and keys.
      num_targets, window, full_len, context_len, timestamps: the mask and the times, as in `jagged_tokens`; only
        with int offsets.
      position_bias: [2n - 1], indexed by ``clip(position_k - position_q, -(n-1), n-1) + n - 1``; shared by the heads.
      time_bias: [129], indexed by ``time_bucket(query_time_q, key_time_k)``; shared by the heads.
      implementation: a name of `BACKENDS` to insist on, a sequence of names to try in order, None for the best here.

    Returns:
      An array of v's shape and dtype.

    Raises:
      ValueError: shapes that do not fit, a plan made for other tables, or an unknown backend.
      NotImplementedError: no chosen backend can serve the call; the message gives each one's reason.
    """
    if max_len <= 0:
        raise ValueError(f"max_len must be positive, got {max_len}")
    options = {"divisor": max_len, "alpha": alpha, "position_bias": position_bias, "time_bias": time_bias}
    if isinstance(offsets, Tokens | Plan):
        if num_targets is not None or timestamps is not None or window or full_len or context_len:
            raise ValueError("num_targets, window, full_len, context_len and timestamps go with int offsets alone")
        return _call("hstu", q, k, v, offsets, options, implementation)
    if q.ndim != 3 or offsets.ndim != 1:
        raise ValueError(f"packed sequences are [T, H, D] with offsets [B + 1], got {q.shape} and {offsets.shape}")
    if time_bias is not None and timestamps is None:
        raise ValueError("a time_bias needs timestamps")
    tokens = jagged_tokens(
        offsets,
        q.shape[0],
        num_targets=num_targets,
        window=window,
        full_len=full_len,
        context_len=context_len,
        timestamps=timestamps,
    )
    q, k, v = jax.tree.map(lambda x: x[None], (q, k, v))
    return _call("hstu", q, k, v, tokens, options, implementation)[0]


def hstu_attention_padded(
    q: jax.Array | Columns,
    k: jax.Array | Columns,
    v: jax.Array | Columns,
    lengths: jax.Array,
    *,
    max_len: float,
    alpha: float = 1.0,
    num_targets: jax.Array | None = None,
    window: int = 0,
    full_len: int = 0,
    context_len: int = 0,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    timestamps: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """`hstu_attention` of one sequence per row: q, k, v [B, N, H, D], ``lengths`` [B], ``timestamps`` [B, N].

    No copy is made: the kernels read the rows as they lie, and padding gets exact zeros.
    """
    if q.ndim != 4 or lengths.shape != q.shape[:1]:
        raise ValueError(f"padded sequences are [B, N, H, D] with lengths [B], got {q.shape} and {lengths.shape}")
    if time_bias is not None and timestamps is None:
        raise ValueError("a time_bias needs timestamps")
    tokens = padded_tokens(
        lengths,
        q.shape[1],
        num_targets=num_targets,
        window=window,
        full_len=full_len,
        context_len=context_len,
        timestamps=timestamps,
    )
    return hstu_attention(
        q,
        k,
        v,
        tokens,
        max_len=max_len,
        alpha=alpha,
        position_bias=position_bias,
        time_bias=time_bias,
        implementation=implementation,
    )


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens | Plan,
    *,
    scale: float,
    position_bias: jax.Array | None = None,
    time_bias: jax.Array | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
    part: Part | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Softmax attention under the same mask and biases, the control of `hstu_attention`.

    ``dropout(softmax(scale · q kᵀ + bias))`` over the visible keys, times v; padding rows give exact zeros. Rows,
    result and errors as in `hstu_attention`.

    ``rate``: share of the weights that dropout zeroes when a ``key`` is given; the others are not normalised again but
    divided by 1 - rate. Its mask takes B · H · T² bytes, so only rows that are worked on whole have it.
    ``part``: where the heads lie among more, of whose mask theirs is to be a part.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout must be in [0, 1), got {rate}")
    options = {"scale": scale, "position_bias": position_bias, "time_bias": time_bias, "rate": rate, "keep": None}
    if key is not None and rate and q.ndim == 4:
        options["keep"] = keep_mask(key, (q.shape[0], q.shape[2], q.shape[1], q.shape[1]), rate, part)
    return _call("softmax", q, k, v, tokens, options, implementation)


def plan(tokens: Tokens, *, positions: int = 0, buckets: int = 0, implementation: Implementation = None) -> Plan:
    """Prepares the pairs of a batch once for all layers of a step.

    Args:
      tokens: attributes of each token, [B, T].
      positions: n of the position bias tables [2n - 1] that the layers will pass, 0 for none.
      buckets: length of the time bias tables that the layers will pass (`TIME_BUCKETS`), 0 for none.
      implementation: as in `hstu_attention`, for every call with this plan that does not name its own.

    Raises:
      ValueError: a negative size, token fields of different shapes, or an unknown backend.
    """
    if positions < 0 or buckets < 0:
        raise ValueError(f"table sizes must not be negative: positions={positions}, buckets={buckets}")
    shapes = {field.shape for field in tokens if field is not None}
    if len(shapes) != 1 or tokens.segment.ndim != 2:
        raise ValueError(f"token fields must share one shape [B, T], got {sorted(shapes)}")
    names = _names(implementation)
    prepared = {name: _backend(name).prepare(tokens, positions, buckets) for name in names if tokens.segment.size}
    return Plan(tokens, prepared, positions, buckets, names)


def _names(implementation: Implementation) -> tuple[str, ...]:
    """The backends to try in order."""
    if implementation is None:
        return _DEFAULTS.get(target(), ("xla",))
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"unknown implementation {unknown or names}; choose from {sorted(BACKENDS)}")
    return names


def _backend(name: str) -> Any:
    """The backend's module, imported on first use: a machine without a GPU need not load the GPU's language."""
    return importlib.import_module(BACKENDS[name])


def _call(
    operation: str,
    q: jax.Array | Columns,
    k: jax.Array | Columns,
    v: jax.Array | Columns,
    tokens: Tokens | Plan,
    options: dict[str, Any],
    implementation: Implementation,
) -> jax.Array:
    """Checks the arguments and calls the first backend that can serve; a name insists on one."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"expected q and k [B, T, H, Dqk] and v [B, T, H, Dv], got {q.shape}, {k.shape}, {v.shape}")
    for x in (q, k, v):
        if isinstance(x, Columns) and not 0 <= x.start <= x.array.shape[-1] - x.lanes:
            raise ValueError(f"columns {x.start} to {x.start + x.lanes} of an array of {x.array.shape[-1]}")
    position_bias, time_bias = options["position_bias"], options["time_bias"]
    if position_bias is not None and (position_bias.ndim != 1 or position_bias.shape[0] % 2 == 0):
        raise ValueError(f"position_bias must have an odd length 2n - 1, got shape {position_bias.shape}")
    if time_bias is not None and (time_bias.ndim != 1 or time_bias.shape[0] == 0):
        raise ValueError(f"time_bias must be a non-empty vector, got shape {time_bias.shape}")
    positions = 0 if position_bias is None else (position_bias.shape[0] + 1) // 2
    buckets = 0 if time_bias is None else time_bias.shape[0]
    names = tokens.backends if isinstance(tokens, Plan) and implementation is None else _names(implementation)
    given = (
        tokens if isinstance(tokens, Plan) else plan(tokens, positions=positions, buckets=buckets, implementation=names)
    )
    if (given.positions, given.buckets) != (positions, buckets):
        raise ValueError(
            f"the plan is for tables of n={given.positions} positions and {given.buckets} buckets, "
            f"the call has n={positions} and {buckets}"
        )
    if given.tokens.segment.shape != q.shape[:2]:
        raise ValueError(f"tokens are {given.tokens.segment.shape}, q is {q.shape}")
    if 0 in v.shape:
        return jnp.zeros(v.shape, v.dtype)
    shared = {"position_bias": position_bias, "time_bias": time_bias}
    shared = {
        name: x if x is None else varying_like(x, *jax.tree.leaves(q), given.tokens.segment)
        for name, x in shared.items()
    }
    return _first_that_can(operation, names, (q, k, v), given, options | shared)


def _first_that_can(
    operation: str,
    names: tuple[str, ...],
    qkv: tuple[jax.Array | Columns, ...],
    given: Plan,
    options: dict[str, Any],
) -> jax.Array:
    reasons = []
    for name in names:
        backend = _backend(name)
        if not hasattr(backend, operation):
            reasons.append(f"{name}: has no {operation} attention")
            continue
        if name not in given.prepared:
            extra = {name: backend.prepare(given.tokens, given.positions, given.buckets)}
            given = dataclasses.replace(given, prepared=given.prepared | extra)
        readable = qkv if hasattr(backend, "READS_COLUMNS") else map(heads_apart, qkv)
        try:
            return getattr(backend, operation)(*readable, given, **options)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no backend can serve this {operation} attention: " + "; ".join(reasons))
