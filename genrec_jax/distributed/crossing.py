"""From what every device of a mesh axis has alike to each one's own part, and back, for functions in `jax.shard_map`.

Outside of the part that the devices divide among them each repeats the same work, so a value there is the same on all
of them, and its cotangent is, too: whole, not a share. These functions say what that makes of derivatives, which
`jax.shard_map` cannot know.
"""

import functools

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def own(x: jax.Array, over: str, axis: int) -> jax.Array:
    """The device's chunk, along ``axis``, of the same x on every device of ``over``; cotangents are put together."""
    size = x.shape[axis] // jax.lax.axis_size(over)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(over) * size, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(x: jax.Array, over: str, axis: int) -> jax.Array:
    """The chunks of all devices, put together along ``axis`` on each; of a cotangent each takes its own chunk."""
    return jax.lax.all_gather(x, over, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(x: jax.Array, over: str) -> jax.Array:
    """x, the same on every device, for each to use in its own way: their cotangents are summed."""
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reduced(x: jax.Array, over: str) -> jax.Array:
    """The sum of the devices' parts, on each; a cotangent is that of every part."""
    return jax.lax.psum(x, over)


own.defvjp(lambda x, over, axis: (own(x, over, axis), None), lambda over, axis, _, d: (whole(d, over, axis),))
whole.defvjp(lambda x, over, axis: (whole(x, over, axis), None), lambda over, axis, _, d: (own(d, over, axis),))
shared.defvjp(lambda x, over: (x, None), lambda over, _, d: (reduced(d, over),))
reduced.defvjp(lambda x, over: (reduced(x, over), None), lambda over, _, d: (d,))
