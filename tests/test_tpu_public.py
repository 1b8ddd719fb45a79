"""The public functions compiled for a TPU v5e, which needs none: ``pip install '.[tpu-aot]'``.

Each is compiled for four chips, among which arrays are divided, and has to leave the host alone.
"""

import importlib.util
import math
import re

import jax
import over_trees
import public_calls
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import eoi_jax as eoi
from experiments.benchmarks import sharding
from experiments.tools import programs
from experiments.training import meshes

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is missing: pip install '.[tpu-aot]'",
)
MIB = 2**20
CALLS = {**public_calls.CONSTRUCTION, **public_calls.SELECTION, **public_calls.OTHERS}
# What draws or selects, of which no whole array is gathered: all but measurements and products.
DRAWS_OR_SELECTS = {
    *public_calls.CONSTRUCTION,
    *public_calls.SELECTION,
    *(name for name in public_calls.TREES if name.split(".")[0] in ("masks", "networks")),
}
# Dividing decompositions of matrices ends libtpu 0.0.42 with a segmentation fault.
ON_ONE_CHIP = {
    "networks.approximate_isometry",
    *(name for name in (*CALLS, *public_calls.TREES) if name.startswith("spectrum.")),
}
GATHERS = {
    "blocks.orthogonal": "one all-gather of 16 bytes, of the pattern of 4 blocks",
    "blocks.rigl_step": "one all-gather of 16 bytes, of the pattern of 4 blocks",
    "blocks.set_step": "one all-gather of 16 bytes, of the pattern of 4 blocks",
    "networks.exact_orthogonal": "2 all-gathers of 120 bytes, of a kernel of 24 weights, its mask",
}


def test_every_public_name_is_compiled_or_has_a_reason():
    compiled = {*CALLS, *public_calls.TREES}
    assert compiled.isdisjoint(public_calls.NOT_COMPILED)
    assert compiled | set(public_calls.NOT_COMPILED) == set(public_calls.public())
    # The face has no function that is in none of the modules.
    modules = [getattr(eoi, name) for name in public_calls.MODULES]
    shown = {id(getattr(module, name)) for module in modules for name in module.__all__}
    functions = set(eoi.__all__) - set(public_calls.MODULES) - {"__version__"}
    assert all(id(getattr(eoi, name)) in shown for name in functions)


@pytest.fixture(scope="module")
def mesh():
    """Four chips of a TPU v5e, described and not there."""
    devices = programs.tpu_devices("v5e:2x2")
    return meshes.make(meshes.MeshShape(data=2, model=2), devices)


def divided(mesh, tree, *, blocks=False):
    """Divide all by the last axis among all chips, or stored blocks by their rows among two."""

    def of_leaf(leaf):
        spec = [None] * leaf.ndim
        if blocks and leaf.ndim == 4:
            spec[0] = "data"
        elif not blocks and leaf.ndim > 1 and leaf.shape[-1] % mesh.size == 0:
            spec[-1] = mesh.axis_names
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of_leaf, tree)


def as_in_over_trees(mesh, tree):
    """Return the shapes of a tree, divided as SPECS says; a scalar mask is whole."""
    return {
        layer: {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(
                    mesh, PartitionSpec(*(over_trees.SPECS[layer][name] if leaf.ndim else ()))
                ),
            )
            for name, leaf in tree[layer].items()
        }
        for layer in tree
    }


def built(name, mesh):
    if name in ON_ONE_CHIP:
        mesh = meshes.make(meshes.MeshShape(), mesh.devices.ravel()[:1].tolist())
    if name in CALLS:
        function, *shapes = CALLS[name]
        blocks = name.startswith("blocks.")
        out = divided(mesh, jax.eval_shape(function, *shapes), blocks=blocks)
        # Stored blocks are divided already; all else is given whole.
        whole = NamedSharding(mesh, PartitionSpec())
        given = divided(mesh, shapes, blocks=True) if blocks else whole
        arguments = programs.placed(shapes, given)
        return programs.build(function, *arguments, out_shardings=out)
    arguments = [as_in_over_trees(mesh, tree) for tree in over_trees.trees()]
    return programs.build(public_calls.TREES[name], *arguments)


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=GATHERS[name]))
        if name in GATHERS
        else name
        for name in (*CALLS, *public_calls.TREES)
    ],
)
def test_public_functions_compile_for_a_tpu(name, mesh):
    program = built(name, mesh)
    assert "callback" not in program.text
    assert not re.search(r"\b(send|recv|infeed|outfeed)\(", program.text)
    # The largest array here has 0.5 MiB, a shard of it an eighth.
    assert program.temporary <= 64 * MIB
    if name in DRAWS_OR_SELECTS:
        assert "all-gather" not in program.collectives, program.collectives


def drawn(side, axis, number):
    mesh = sharding._mesh(sharding._devices("v5e", number))
    return sharding.draw(
        lambda key, shape: eoi.orthogonal(key, shape, 0.05), (side, side), mesh, axis
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "axis", "number"),
    [(4096, "columns", 16), (16384, "rows", 256), (65536, "columns", 256)],
)
def test_a_divided_matrix_is_drawn_in_the_memory_of_its_shards(side, axis, number):
    program = drawn(side, axis, number)
    shard = 4 * side**2 // number
    assert program.outputs == shard
    assert "all-gather" not in program.collectives
    assert program.temporary <= 4 * shard + 64 * MIB


@needs_compiler
def test_a_gathered_matrix_would_be_found(mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    x = programs.placed(public_calls.SQUARE, divided(mesh, public_calls.SQUARE))
    program = programs.build(lambda x: x + 1, x, out_shardings=whole)
    assert program.collectives["all-gather"].bytes == 4 * math.prod(x.shape)


@needs_compiler
def test_a_callback_would_be_found(mesh):
    x = programs.placed(
        jax.ShapeDtypeStruct((256, 256), "float32"), NamedSharding(mesh, PartitionSpec())
    )

    def print_sum(x):
        jax.debug.print("{}", x.sum())
        return x + 1

    text = programs.build(print_sum, x).text
    assert "callback" in text or re.search(r"\b(send|recv|infeed|outfeed)\(", text)
