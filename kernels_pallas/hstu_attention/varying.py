"""Inside `jax.shard_map`, which mesh axes a value differs along is part of its type; these helpers keep it right."""

import jax


def varying_like(x: jax.Array, *models: jax.Array) -> jax.Array:
    """x, marked as differing along every mesh axis that a model does; x itself outside `jax.shard_map`.

    Differentiated, this sums over those axes: a table shared by all devices gets the gradient of all of them.
    """
    axes = frozenset().union(*(jax.typeof(model).manual_axis_type.varying for model in models))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x
