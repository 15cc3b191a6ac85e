"""Linear maps, normalisation and MLPs that state their cost."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.tensor import UNDIVIDED, Tensor
from genrec_jax.nn.cost import Cost, total
from kernels_pallas.dense import dense
from kernels_pallas.gated_norm import Part

Activation = Callable[[jax.Array], jax.Array]

# The initial values of the public PyTorch code, to the distribution: jax's own Xavier normal is cut at two deviations.
xavier_normal = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


def fan_in_uniform(inputs: int) -> jax.nn.initializers.Initializer:
    """U(-1 / sqrt(inputs), 1 / sqrt(inputs)): biases of PyTorch's linear maps and convolutions."""

    def init(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return init


class Linear(nnx.Linear):
    """``y = x W + b`` over the last axis, in the compute type ``dtype``."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return self.columns(inputs, slice(None))

    def columns(self, inputs: jax.Array, outputs: slice) -> jax.Array:
        """These of the outputs alone, for a map whose parts read different inputs."""
        return self._biased(self._product(inputs, outputs), outputs)

    def summed(self, inputs: jax.Array, tensor: Tensor) -> jax.Array:
        """The map of inputs of which every device has a part, and so of the kernel."""
        return self._biased(tensor.leave(self._product(inputs, slice(None))), slice(None))

    def _product(self, inputs: jax.Array, outputs: slice) -> jax.Array:
        dtype = self.dtype or jnp.float32
        return dense(inputs.astype(dtype), self.kernel[...][:, outputs].astype(dtype))

    def _biased(self, y: jax.Array, outputs: slice) -> jax.Array:
        return y if self.bias is None else y + self.bias[...][outputs].astype(y.dtype)

    def cost(self, rows: int) -> Cost:
        """Cost of applying the map to ``rows`` vectors."""
        params = self.in_features * self.out_features + (self.out_features if self.use_bias else 0)
        item = jnp.dtype(self.dtype or jnp.float32).itemsize
        return Cost(
            flops=2.0 * rows * self.in_features * self.out_features,
            dense_params=params,
            activation_bytes=float(rows * self.in_features * item),
        )


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation; statistics in float32. FLOPs are not counted (memory-bound, below 1 % of a block)."""

    def cost(self, rows: int) -> Cost:
        params = self.num_features * (int(self.use_scale) + int(self.use_bias))
        item = jnp.dtype(self.dtype or jnp.float32).itemsize
        return Cost(dense_params=params, activation_bytes=float(rows * self.num_features * item))


def dropout(
    x: jax.Array, rate: float, rngs: nnx.Rngs | None, part: Part | None = None, tensor: Tensor = UNDIVIDED
) -> jax.Array:
    """Inverted dropout when ``rngs`` is given (training), the identity otherwise; x may be a ``part`` of more, and have
    a device's units alone."""
    if rngs is None or rate == 0.0:
        return x
    return jnp.where(tensor.keep(rngs.dropout(), x.shape, rate, part), x / (1.0 - rate), 0).astype(x.dtype)


class MLP(nnx.Module):
    """Hidden layers with an activation after each, and a linear last layer unless ``activate_last``.

    The first layer may read ``beside`` further inputs by a map of their own, whose initial values and learning rate
    need not follow the number of ``inputs``. Devices of a ``tensor`` axis divide the hidden units of one with a single
    hidden layer.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        *,
        beside: int = 0,
        beside_init: jax.nn.initializers.Initializer | None = None,
        activation: Activation = jax.nn.relu,
        activate_last: bool = False,
        dropout: float = 0.0,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = [inputs, *widths]
        self.layers = nnx.List([Linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.beside = (
            Linear(beside, sizes[1], use_bias=False, kernel_init=beside_init, dtype=dtype, rngs=rngs)
            if beside and beside_init
            else None
        )
        self.activation = activation
        self.activate_last = activate_last
        self.dropout = dropout

    def __call__(
        self,
        x: jax.Array,
        *,
        beside: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
        tensor: Tensor = UNDIVIDED,
    ) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer.summed(x, tensor) if i else layer(tensor.enter(x))
            if i == 0 and self.beside is not None:
                assert beside is not None
                x = x + self.beside(beside)
            if i + 1 < len(self.layers) or self.activate_last:
                x = dropout(self.activation(x), self.dropout, rngs)
        return x

    def cost(self, rows: int, tensor: Tensor = UNDIVIDED) -> Cost:
        layers = enumerate(self.layers)
        beside = Cost() if self.beside is None else self.beside.cost(rows)
        return total([beside, *(layer.cost(rows).among(tensor.size, activations=i > 0) for i, layer in layers)])
