"""Two devices: what one device draws, shard_map draws on two."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import eoi_jax as eoi

assert jax.device_count() == 2
axis_types = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((2,), ("seeds",), axis_types=axis_types)
keys = jax.random.split(jax.random.key(0), 4)
diagonal = {"kernel": jnp.eye(16, dtype=bool)}
for draw in (
    lambda key: eoi.orthogonal(key, (16, 12), 0.3),
    lambda key: eoi.conv(0.2)(key, (3, 3, 8, 8)),
    lambda key: eoi.masks.fill(key, diagonal, 0.3)["kernel"],
    lambda key: eoi.givens.waves(eoi.givens.sample(key, 16, 50), 16),
):
    batch = jax.vmap(draw)
    sharded = jax.shard_map(batch, mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"))
    expected = batch(keys)
    np.testing.assert_allclose(jax.jit(sharded)(keys), expected, atol=1e-6)
    placed = jax.device_put(keys, jax.sharding.NamedSharding(mesh, P("seeds")))
    np.testing.assert_allclose(jax.jit(batch)(placed), expected, atol=1e-6)
"""


def test_shard_map_draws_what_one_device_draws():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
