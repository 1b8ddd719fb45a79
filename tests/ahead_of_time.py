"""Block products compiled ahead of time, for devices that are described and not there."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from eoi_jax import blocks

BATCH, SHAPE = 300, (8192, 8192)
NUM_DENSE = math.prod(SHAPE)


def compiled(device, multiply, dtype, platform, density=1 / 16, block_size=128):
    """Compile the product and both gradients for a device of a platform."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def found(w, x):
        def loss(x, values):
            y = multiply(x, dataclasses.replace(w, values=values))
            return jnp.sin(y).astype(jnp.float32).sum(), y

        (dx, dw), y = jax.grad(loss, (0, 1), has_aux=True)(x, w.values)
        return y, dx, dw

    w = jax.eval_shape(
        lambda: blocks.orthogonal(jax.random.key(0), SHAPE, density, block_size=block_size)
    )
    w = dataclasses.replace(w, values=w.values.update(dtype=dtype))
    x = jax.ShapeDtypeStruct((BATCH, SHAPE[0]), dtype)
    w, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), (w, x)
    )
    return jax.jit(found).trace(w, x).lower(lowering_platforms=(platform,)).compile()


def has_dense(program):
    """Whether the program has an array of as many entries as the dense matrix, or more."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", program.as_text())
    return any(math.prod(map(int, shape.split(","))) >= NUM_DENSE for shape in shapes)


def assert_products_alone(program, dtype):
    """Require that a program calls nothing of the host and holds nothing as large as the matrix."""
    text = program.as_text()
    assert "callback" not in text
    assert not re.search(r"\b(send|recv|infeed|outfeed)\(", text)
    assert not has_dense(program)
    dense = NUM_DENSE * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < dense / 8
