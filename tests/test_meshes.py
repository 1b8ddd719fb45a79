"""The one rule that divides networks among devices."""

import jax
import numpy as np
import optax
import pytest
from helpers import refuses
from jax.sharding import AbstractMesh, PartitionSpec

import eoi_jax as eoi
from experiments import models
from experiments.training import meshes
from experiments.training.meshes import MeshShape

MESH = AbstractMesh((2, 4), ("data", "model"))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=16,model=8", (16, 8)),
        ("model=4, data=2", (2, 4)),
        ("data=3", (3, 1)),
        ("model=10", (1, 10)),
    ],
)
def test_meshes_are_read_and_written(text, shape):
    assert meshes.parse(text) == shape
    assert meshes.parse(str(meshes.parse(text))) == shape


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=0", "data=-1", "data=1.5", "data=2,data=2", "batch=2", "data=2;model=2"],
)
def test_other_forms_are_refused(text):
    with refuses("mesh", text, "data=16,model=16"):
        meshes.parse(text)


def test_a_mesh_has_as_many_places_as_devices():
    devices = jax.devices()[:1]
    with pytest.raises(ValueError, match=r"mesh='data=4,model=2' has 8 places, .* 1 devices"):
        meshes.make(MeshShape(4, 2), devices)
    mesh = meshes.make(MeshShape(), devices)
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(meshes.shardings(MESH, tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): s.spec for path, s in leaves}


@pytest.mark.parametrize("name", ["mlp7", "resnet32", "deit_s"])
def test_kernels_are_divided_by_outputs_and_nothing_else_is(name):
    model = models.create(name, num_classes=10)
    images = jax.ShapeDtypeStruct((1, *models.input_shape(name)), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    found = specs(variables)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    divided = 0
    for path, leaf in leaves:
        spec = found[jax.tree_util.keystr(path, simple=True, separator="/")]
        whole = not eoi.masks.is_kernel(path, leaf) or leaf.shape[-1] % 4
        assert spec == (
            PartitionSpec() if whole else PartitionSpec(*[None] * (leaf.ndim - 1), "model")
        )
        divided += not whole
    assert 0 < divided < len(leaves)


def test_masks_and_moments_are_divided_as_their_kernels():
    params = {"first": {"kernel": np.ones((3, 8), "f4"), "bias": np.ones(8, "f4")}}
    mask = eoi.masks.random(jax.random.key(0), params, 0.5)
    state = eoi.static_sparse(optax.adam(0.1), mask).init(params)
    divided = [path for path, spec in specs((params, state)).items() if spec != PartitionSpec()]
    kernels = [path for path in specs((params, state)) if path.endswith("kernel")]
    assert divided == kernels
    assert len(kernels) == 4  # the params, their mask, two moments
