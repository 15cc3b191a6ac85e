"""Golden files of the public ranking code's stack of layers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.parity import fields
from experiments.parity.case import GRADIENT, MODEL, OUTPUT, Arrays, Case, wanted
from genrec_jax import interop
from genrec_jax.nn.stack import Stack
from genrec_jax.nn.stu import stu_stack
from kernels_pallas.hstu_attention import jagged_tokens

SIZES = ("embedding_dim", "layers", "num_heads", "attention_dim", "hidden_dim")


def read(file: Path, arrays: Arrays) -> Case:
    """Packed tokens through a stack: x, seq_offsets, perhaps num_targets; out and dout, dx; parameters, gradients."""
    fields.require(file, arrays, ("meta", "x", "seq_offsets", "out", "dout", "dx"))
    meta = fields.meta(file, arrays, (*SIZES, "alpha", "divisor", "use_group_norm"))
    width, depth, heads, qk_width, v_width = (fields.size(file, meta, name) for name in SIZES)
    total = len(arrays["x"]) if arrays["x"].ndim else 0
    x, out, dout, dx = (fields.floats(file, arrays, name, (total, width)) for name in ("x", "out", "dout", "dx"))
    offsets = fields.offsets(file, arrays, total)
    targets = fields.targets(file, arrays, len(offsets) - 1)
    divisor, alpha = fields.size(file, meta, "divisor"), fields.number(file, meta, "alpha")

    def build() -> Stack:
        return stu_stack(
            width,
            depth,
            heads,
            qk_width=qk_width,
            v_width=v_width,
            longest=divisor,
            alpha=alpha,
            group_norm=bool(meta["use_group_norm"]),
            dtype=jnp.dtype("float32"),
            rngs=nnx.Rngs(0),
        )

    model = nnx.eval_shape(build)
    graph = nnx.graphdef(model)
    state = interop.from_reference(model, fields.under(arrays, "param"), f"{file}: param")
    gradients = fields.under(arrays, "grad")
    interop.from_reference(model, gradients, f"{file}: grad")  # checks names and shapes
    tokens = jagged_tokens(
        jnp.asarray(offsets, jnp.int32),
        total,
        num_targets=None if targets is None else jnp.asarray(targets, jnp.int32),
        window=int(fields.number(file, meta, "max_attn_len")),
        full_len=int(fields.number(file, meta, "min_full_attn_seq_len")),
        context_len=int(fields.number(file, meta, "contextual_seq_len")),
    )

    def run(backend: str) -> Arrays:
        @jax.jit
        def both(state: nnx.State, x: jax.Array, dout: jax.Array) -> tuple[jax.Array, nnx.State, jax.Array]:
            value, pull = jax.vjp(lambda s, x: nnx.merge(graph, s)(x[None], tokens)[0], state, x)
            return value, *pull(dout)

        got, d_state, d_x = both(state, jnp.asarray(x), jnp.asarray(dout))
        return {"out": np.asarray(got), "dx": np.asarray(d_x), **interop.to_reference(model, d_state)}

    return Case(run, wanted({"out": out}, OUTPUT), wanted({"dx": dx, **gradients}, GRADIENT), MODEL)
