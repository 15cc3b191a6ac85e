"""Feature interactions of the classical rankers: pairwise dots (DLRM) and cross layers (DCN-v2)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genrec_jax.nn.basic import Linear
from genrec_jax.nn.cost import Cost, total


def dot_interaction(v: jax.Array) -> jax.Array:
    """v [..., F, d] -> {<v_i, v_j>: j < i} [..., F (F - 1) / 2], row by row (Naumov et al. 2019, section 2.4)."""
    rows, columns = np.tril_indices(v.shape[-2], k=-1)
    return jnp.einsum("...id,...jd->...ij", v, v)[..., rows, columns]


def dot_interaction_cost(rows: int, vectors: int, dim: int, dtype: jnp.dtype | None = None) -> Cost:
    """Pairwise dots of ``rows`` sets of vectors; the pairs are half the square, as for causal attention."""
    item = jnp.dtype(dtype or jnp.float32).itemsize
    return Cost(
        flops=2.0 * rows * dot_interaction_count(vectors) * dim, activation_bytes=float(rows * vectors * dim * item)
    )


def dot_interaction_count(vectors: int) -> int:
    """F (F - 1) / 2."""
    return vectors * (vectors - 1) // 2


class Cross(nnx.Module):
    """DCN-v2's cross network: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l (Wang et al. 2021, equation 1).

    ``rank`` > 0 factors W_l = U_l V_l^T with ``rank`` columns (equation 2); 0 keeps it full.
    """

    def __init__(self, inputs: int, layers: int, *, rank: int = 0, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
        into = rank or inputs
        self.down = nnx.List(
            [Linear(inputs, rank, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(layers if rank else 0)]
        )
        self.up = nnx.List([Linear(into, inputs, dtype=dtype, rngs=rngs) for _ in range(layers)])

    def __call__(self, x0: jax.Array) -> jax.Array:
        """x0 [..., inputs] -> [..., inputs]."""
        x = x0
        for i, up in enumerate(self.up):
            x = x0 * up(self.down[i](x) if self.down else x) + x
        return x

    def cost(self, rows: int) -> Cost:
        """Cost of crossing ``rows`` vectors."""
        return total([layer.cost(rows) for layer in (*self.down, *self.up)])
