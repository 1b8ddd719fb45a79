"""Several devices: the values of one device, with the shardings of what is given."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import over_meshes
import over_trees
import pytest

import eoi_jax as eoi
from eoi_jax._internal import selection

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import eoi_jax as eoi

assert jax.device_count() == 2
axis_types = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((2,), ("seeds",), axis_types=axis_types)
keys = jax.random.split(jax.random.key(0), 4)
diagonal = {"kernel": jnp.eye(16, dtype=bool)}
def draw(key):
    return (
        eoi.orthogonal(key, (16, 12), 0.3),
        eoi.conv(0.2)(key, (3, 3, 8, 8)),
        eoi.masks.fill(key, diagonal, 0.3)["kernel"],
        eoi.givens.waves(eoi.givens.sample(key, 16, 50), 16),
    )

batch = jax.jit(jax.vmap(draw))
expected = batch(keys)
sharded = jax.shard_map(jax.vmap(draw), mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"))
placed = jax.device_put(keys, jax.sharding.NamedSharding(mesh, P("seeds")))
for found in (jax.jit(sharded)(keys), batch(placed)):
    for on_two, on_one in zip(found, expected, strict=True):
        assert len(on_two.sharding.device_set) == 2
        assert len(on_one.sharding.device_set) == 1
        np.testing.assert_allclose(on_two, on_one, atol=1e-6)
"""


def run_on_devices(number, *arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_shard_map_draws_what_one_device_draws():
    run_on_devices(2, "-c", PROGRAM)


@pytest.mark.slow
def test_functions_over_trees_on_four_devices():
    run_on_devices(4, over_trees.__file__, "auto", "explicit")


@pytest.mark.slow
def test_networks_are_drawn_into_the_shards_of_four_devices():
    run_on_devices(4, over_meshes.__file__)


def draw_kernels(name, params):
    options = {
        "exact_orthogonal": 0.4,
        "sparsity_aware_orthogonal": 0.5,
        "redraw": over_meshes.init,
    }
    return getattr(eoi.networks, name)(over_meshes.KEY, params, options[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact_orthogonal", "sparsity_aware_orthogonal", "redraw"])
def test_of_a_kernel_its_shape_is_enough(name):
    params = over_meshes.network()
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if leaf.ndim > 1 else leaf, params
    )
    found, expected = draw_kernels(name, shapes), draw_kernels(name, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"params\[linear/bias\] is a shape without values"):
        draw_kernels(name, jax.eval_shape(over_meshes.network))


@pytest.mark.slow
def test_padded_layers_unmask_what_layers_unmask():
    keys = jax.random.split(over_meshes.KEY, 3)
    mask = jax.random.bernoulli(over_meshes.KEY, 0.2, (3, 7, 30))
    counts = jnp.array([210, 100, 63])
    expected = selection.unmask_layers(keys, mask, counts)
    flat = jnp.pad(mask.reshape(3, -1), ((0, 0), (0, 90)), constant_values=False)
    found = selection.unmask_flat(jax.random.key_data(keys), flat, counts, jnp.int32(210))
    np.testing.assert_array_equal(found[:, :210].reshape(mask.shape), expected)
    assert not found[:, 210:].any()


def test_a_spec_without_a_mesh_is_refused():
    init = eoi.dense(0.2)
    with pytest.raises(ValueError, match=r"out_sharding=.* names no mesh\. .*set_mesh"):
        init(over_meshes.KEY, (8, 8), out_sharding=jax.sharding.PartitionSpec("x", None))
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    with pytest.raises(ValueError, match="more entries than the 2 axes"):
        init(over_meshes.KEY, (8, 8), out_sharding=sharding)


def test_every_function_over_trees_is_among_them():
    modules = ("masks", "budgets", "criteria", "networks", "optim", "dynamic")
    public = {f"{name}.{symbol}" for name in modules for symbol in getattr(eoi, name).__all__}
    # A predicate of one leaf, a dict, and types.
    others = {"masks.is_kernel", "budgets.RULES", "networks.SparseInit"}
    of_state = {name for name in public if name.endswith("State")}
    kernels = {f"spectrum.{name}" for name in eoi.spectrum.__all__ if name.startswith("kernel_")}
    assert set(over_trees.FUNCTIONS) == (public - others - of_state) | kernels
