"""Networks drawn into the shards of four CPU devices: the bits of one, and nothing gathered.

``python tests/over_meshes.py`` needs XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import eoi_jax as eoi
from eoi_jax._internal import drawing

KEY = jax.random.key(0)
SHAPE = (72, 48)
SPECS = {
    "linear": {"kernel": PartitionSpec("data", "model"), "bias": PartitionSpec("model")},
    "conv": {"kernel": PartitionSpec(None, None, None, "model")},
}


def network():
    return {
        "linear": {"kernel": jnp.ones((48, 72)), "bias": jnp.ones(72)},
        "conv": {"kernel": jnp.ones((3, 3, 4, 16))},
    }


def mesh_of(number, kind=AxisType.Auto):
    devices = np.array(jax.devices()[:number]).reshape(-1, 2)
    return Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


def assert_same(found, expected, sharding=None, *, or_further=False):
    """Require the bits of one device and a sharding, ``or_further`` divided."""
    np.testing.assert_array_equal(found, expected)
    is_same = sharding is None or found.sharding.is_equivalent_to(sharding, found.ndim)
    if not is_same and or_further:
        part, right = (math.prod(to.shard_shape(found.shape)) for to in (found.sharding, sharding))
        is_same = part <= right
    assert is_same, found.sharding


def compiled(function, mesh, out_shardings):
    """Compile a function of the key and require that it gathers nothing."""
    with jax.set_mesh(mesh):
        program = jax.jit(function, out_shardings=out_shardings).lower(KEY).compile()
    assert "all-gather" not in program.as_text()
    return program


def check_meshes():
    options = {"permute": True, "planes": eoi.planes.matching}

    def draw(key):
        return eoi.orthogonal(key, SHAPE, 0.2, **options)

    expected = draw(KEY)
    specs = {2: ("model", None), 4: ("model", "data")}
    for number, spec in specs.items():
        mesh = mesh_of(number)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        assert_same(compiled(draw, mesh, sharding)(KEY), expected, sharding)


def check_out_sharding(kind):
    mesh = mesh_of(4, kind)
    spec = PartitionSpec("data", "model")
    dense = eoi.dense(0.2)
    expected = dense(KEY, SHAPE)
    sharding = NamedSharding(mesh, spec)
    assert_same(dense(KEY, SHAPE, out_sharding=sharding), expected, sharding)
    traced = compiled(lambda key: dense(key, SHAPE, out_sharding=spec), mesh, None)
    assert_same(traced(KEY), expected, sharding)


def check_network(kind):
    mesh, params = mesh_of(4, kind), network()
    expected = eoi.exact_orthogonal(KEY, params, 0.4)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    shapes = jax.tree.map(
        lambda leaf, to: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to) if leaf.ndim > 1 else leaf
        ),
        params,
        shardings,
    )

    def check(start, or_further=False):
        assert jax.tree.structure(start) == jax.tree.structure(expected)
        for layer, specs in shardings.items():
            for part, other in zip(start, expected, strict=True):
                to = specs["kernel"]
                pair = part[layer]["kernel"], other[layer]["kernel"]
                assert_same(*pair, to, or_further=or_further and part is start.mask)

    check(eoi.exact_orthogonal(KEY, shapes, 0.4))
    if kind == AxisType.Auto:
        out = eoi.networks.SparseInit(shardings, None)
        with jax.set_mesh(mesh):
            draw = jax.jit(lambda key: eoi.exact_orthogonal(key, network(), 0.4), out_shardings=out)
            check(draw(KEY), or_further=True)
    if kind == AxisType.Explicit:
        check_others(shapes, params)


def check_others(shapes, params):
    """The other starts that draw, each on the kernel of one layer."""
    arguments = {eoi.networks.sparsity_aware_orthogonal: 0.5, eoi.networks.redraw: init}
    for start, argument in arguments.items():
        [found], [whole] = (
            jax.tree.leaves(start(KEY, {"kernel": tree["conv"]["kernel"]}, argument))[:1]
            for tree in (shapes, params)
        )
        assert_same(found, whole, shapes["conv"]["kernel"].sharding)


def check_refusal():
    """Equal angles inside a pattern may miss their density; shards of NaN are refused too."""
    law = eoi.planes.within(np.kron(np.eye(32), np.ones((2, 2))) > 0)
    sharding = NamedSharding(mesh_of(4), PartitionSpec("model", None))
    tree = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)}
    with pytest.raises(ValueError, match="is not reached inside planes"):
        eoi.exact_orthogonal(KEY, tree, 1 / 32, angles=math.pi / 4, planes=law)


def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype)


def check_memory():
    """A device holds its shard a few times, and no whole matrix, nor the support of one."""
    mesh = mesh_of(4)
    size = 2048
    sharding = NamedSharding(mesh, PartitionSpec(("data", "model"), None))
    program = compiled(lambda key: eoi.orthogonal(key, (size, size), 0.05), mesh, sharding)
    shard = 4 * size**2 // 4
    assert program.memory_analysis().temp_size_in_bytes <= 4 * shard + 2**20


if __name__ == "__main__":
    # Matrices of a test are small, and are to be divided all the same.
    drawing._DIVIDED_FROM = 1000
    check_meshes()
    check_memory()
    check_refusal()
    for kind in (AxisType.Auto, AxisType.Explicit):
        check_out_sharding(kind)
        check_network(kind)
