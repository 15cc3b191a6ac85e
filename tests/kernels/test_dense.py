"""The hand-arranged product against `jnp.matmul`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dense import dense


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("leading", [(7,), (2, 5), (0,)])
def test_matches_matmul(leading, dtypes):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*leading, 4)), dtypes[0])
    weight = jnp.asarray(rng.normal(size=(4, 3)), dtypes[1])

    def value_and_gradients(product):
        out, pull = jax.vjp(product, x, weight)
        return out, *pull(jnp.cos(out))

    tolerance = 1e-5 if dtypes == ("float32", "float32") else 3e-2
    for got, want in zip(jax.jit(lambda: value_and_gradients(dense))(), value_and_gradients(jnp.matmul)):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=tolerance, atol=tolerance)


def test_vmap():
    x, weight = jnp.arange(24.0).reshape(3, 2, 4), jnp.arange(12.0).reshape(4, 3)
    slope = jax.vmap(jax.grad(lambda x: jnp.sum(dense(x, weight) ** 2)))(x)
    np.testing.assert_allclose(slope, 2 * x @ weight @ weight.T)
