"""Block products compiled for GPUs, which needs none: ``pip install '.[cuda-aot]'``."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import assert_products_alone, compiled
from test_blocks_pallas import described_gpu

from eoi_jax import blocks
from eoi_jax.blocks import kernels

pytest.importorskip(
    "jax_cuda12_plugin", reason="the GPU compiler is missing: pip install '.[cuda-aot]'"
)
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
dnn_version_info { major: 9 minor: 8 }
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def device():
    """One GPU, described and not there."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    # Programs of a GPU that is not there cannot be read back from the cache of compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)
    with described_gpu():
        yield found.devices[0]
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize(
    ("dtype", "precision", "block_size"),
    [
        (jnp.float32, None, 128),
        (jnp.float32, "highest", 64),
        (jnp.bfloat16, None, 128),
        (jnp.float16, None, 128),
    ],
)
def test_products_compile_for_cuda_without_a_dense_array(device, dtype, precision, block_size):
    multiply = functools.partial(blocks.matmul, implementation="pallas", precision=precision)
    program = compiled(device, multiply, dtype, "cuda", block_size=block_size)
    # The forward product, and both of the gradient.
    assert program.as_text().count("xla.gpu.triton") == 3
    assert_products_alone(program, dtype)


@pytest.mark.slow
def test_tiles_that_no_gpu_holds_would_be_found(device, monkeypatch):
    monkeypatch.setattr(kernels, "_GPU_TILE", 512)
    monkeypatch.setattr(kernels, "_GPU_ROWS", 512)
    multiply = functools.partial(blocks.matmul, implementation="pallas")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compiled(device, multiply, jnp.float32, "cuda", block_size=512)
