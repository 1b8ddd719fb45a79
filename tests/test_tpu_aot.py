"""Block products compiled by the TPU compiler, which needs no TPU: ``pip install '.[tpu-aot]'``."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from eoi_jax import blocks

pytest.importorskip("libtpu", reason="the TPU compiler is missing: pip install '.[tpu-aot]'")

BATCH, SHAPE = 300, (8192, 8192)


@pytest.fixture(scope="module")
def device():
    """A chip of a TPU v5e, described and not there."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        # Where there is no TPU, libtpu would ask the network for it.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    # Programs of a chip that is not there cannot be read back from the cache of compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)
    yield found.devices[0]
    jax.config.update("jax_enable_compilation_cache", True)


def compiled(device, multiply, dtype, density=1 / 16, block_size=128):
    """Compile the product and both gradients."""
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
    return jax.jit(found).trace(w, x).lower(lowering_platforms=("tpu",)).compile()


def has_dense(program):
    """Whether the program has an array of as many entries as the dense matrix, or more."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", program.as_text())
    return any(math.prod(map(int, shape.split(","))) >= math.prod(SHAPE) for shape in shapes)


@pytest.mark.parametrize(
    ("implementation", "dtype", "precision", "blocked"),
    [
        ("pallas", jnp.float32, None, {}),
        ("pallas", jnp.bfloat16, None, {}),
        # Four tiles in a block, and a precision that Mosaic does not have.
        ("pallas", jnp.float32, "high", {"density": 1 / 8, "block_size": 1024}),
        pytest.param("xla", jnp.float32, None, {}, marks=pytest.mark.slow),
    ],
)
def test_products_compile_for_tpu_without_a_dense_array(
    device, implementation, dtype, precision, blocked
):
    multiply = functools.partial(blocks.matmul, implementation=implementation, precision=precision)
    program = compiled(device, multiply, dtype, **blocked)
    text = program.as_text()
    # The forward product, and both of the gradient.
    num_kernels = 3 if implementation == "pallas" else 0
    assert text.count('custom_call_target="tpu_custom_call"') == num_kernels
    assert "callback" not in text
    assert not re.search(r"\b(send|recv|infeed|outfeed)\(", text)
    assert not has_dense(program)
    dense = math.prod(SHAPE) * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < dense / 8


@pytest.mark.slow
def test_a_dense_array_would_be_found(device):
    program = compiled(device, lambda x, w: x @ w.to_dense(), jnp.float32)
    assert has_dense(program)
    assert program.memory_analysis().temp_size_in_bytes >= math.prod(SHAPE) * 4
