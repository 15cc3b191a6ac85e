"""Golden files of packed pointwise attention."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity import fields
from experiments.parity.case import GRADIENT, OUTPUT, Arrays, Case, wanted
from genrec_jax.errors import UserError
from kernels_pallas.hstu_attention import hstu_attention


def read(file: Path, arrays: Arrays) -> Case:
    """Packed pointwise attention: q, k, v, seq_offsets, perhaps num_targets; out and dout, dq, dk, dv."""
    fields.require(file, arrays, ("meta", "q", "k", "v", "seq_offsets", "out", "dout", "dq", "dk", "dv"))
    meta = fields.meta(file, arrays, ("alpha", "divisor"))
    q, v = fields.floats(file, arrays, "q"), fields.floats(file, arrays, "v")
    if q.ndim != 3 or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise UserError(f"{file}: q and v must be [T, H, D], they are {list(q.shape)} and {list(v.shape)}")
    k, dq, dk = (fields.floats(file, arrays, name, q.shape) for name in ("k", "dq", "dk"))
    out, dout, dv = (fields.floats(file, arrays, name, v.shape) for name in ("out", "dout", "dv"))
    offsets = fields.offsets(file, arrays, len(q))
    targets = fields.targets(file, arrays, len(offsets) - 1)
    if not meta.get("causal", True):
        raise UserError(f"{file}: meta says causal is false, and there is only causal attention here")
    number = {
        name: fields.number(file, meta, name)
        for name in ("alpha", "divisor", "max_attn_len", "contextual_seq_len", "min_full_attn_seq_len")
    }
    if number["divisor"] <= 0:
        raise UserError(f"{file}: meta's divisor must be positive")
    options: dict[str, Any] = {
        "max_len": number["divisor"],
        "alpha": number["alpha"],
        "num_targets": None if targets is None else jnp.asarray(targets, jnp.int32),
        "window": int(number["max_attn_len"]),
        "context_len": int(number["contextual_seq_len"]),
        "full_len": int(number["min_full_attn_seq_len"]),
    }

    def run(backend: str) -> Arrays:
        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
            def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                given = jnp.asarray(offsets, jnp.int32)
                return hstu_attention(q, k, v, given, **options, implementation=backend)

            value, pull = jax.vjp(call, q, k, v)
            return value, *pull(dout)

        return dict(zip(("out", "dq", "dk", "dv"), map(np.asarray, both(*map(jnp.asarray, (q, k, v, dout))))))

    return Case(run, wanted({"out": out}, OUTPUT), wanted({"dq": dq, "dk": dk, "dv": dv}, GRADIENT))
