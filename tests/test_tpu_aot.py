"""Block products compiled for TPUs, which needs none: ``pip install '.[tpu-aot]'``."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import NUM_DENSE, assert_products_alone, compiled, has_dense

from eoi_jax import blocks

pytest.importorskip("libtpu", reason="the TPU compiler is missing: pip install '.[tpu-aot]'")


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
    program = compiled(device, multiply, dtype, "tpu", **blocked)
    # The forward product, and both of the gradient.
    num_kernels = 3 if implementation == "pallas" else 0
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == num_kernels
    assert_products_alone(program, dtype)


@pytest.mark.slow
def test_a_dense_array_would_be_found(device):
    program = compiled(device, lambda x, w: x @ w.to_dense(), jnp.float32, "tpu")
    assert has_dense(program)
    assert program.memory_analysis().temp_size_in_bytes >= 4 * NUM_DENSE
