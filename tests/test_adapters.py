"""Libraries that call initializers in their own way get the matrices that ``eoi.dense`` draws.

The pages' blocks run in test_readme.py; here the callers are as the libraries have them.
"""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import gram_error

import eoi_jax as eoi

KEY = jax.random.key(1)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "other_frameworks.md"
DENSITY = 0.2


def namespace_of(title):
    """Run the one block of a section of the page."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    [block] = re.findall(r"```py(?:thon)?\n(.*?)```", section, re.DOTALL)
    namespace = {}
    exec(compile(block, title, "exec"), namespace)
    return namespace


# nd_dense_init(...) of AI-Hypercomputer/maxtext, src/MaxText/layers/initializers.py, returns
# init_fn(key, shape, dtype, in_axis, out_axis), which layers/linears.py calls by position.
def maxtext_init_fn(key, shape, dtype, in_axis, out_axis):
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis, out_axis)(
        key, shape, dtype
    )


@pytest.mark.slow
def test_maxtext_calls_with_axes():
    init = namespace_of("MaxText")["sparse_init"](DENSITY)
    assert list(inspect.signature(init).parameters) == list(
        inspect.signature(maxtext_init_fn).parameters
    )
    for shape, in_axis, out_axis in (((32, 4, 8), (0,), (1, 2)), ((4, 8, 32), (0, 1), (2,))):
        call = KEY, shape, jnp.float32, in_axis, out_axis
        drawn = init(*call)
        assert drawn.shape == maxtext_init_fn(*call).shape
        assert drawn.dtype == jnp.float32
        np.testing.assert_array_equal(drawn.reshape(32, 32), eoi.orthogonal(KEY, (32, 32), DENSITY))


# Initializer.initialize of apple/axlearn, axlearn/common/param_init.py.
AXLEARN = ["self", "name", "prng_key", "shape", "dtype", "axes"]


@pytest.mark.slow
def test_axlearn_gives_fan_axes():
    found = namespace_of("AXLearn")
    initializer, fan_axes = found["SparseInitializer"], found["FanAxes"]
    assert list(inspect.signature(initializer.initialize).parameters) == AXLEARN
    call = {"prng_key": KEY, "shape": (2, 32, 4, 8), "dtype": jnp.float32}
    axes = fan_axes(in_axis=(1,), out_axis=(2, 3), batch_axis=(0,))
    drawn = initializer().initialize("weight", **call, axes=axes)
    for key, layer in zip(jax.random.split(KEY, 2), drawn, strict=True):
        expected = eoi.orthogonal(key, (32, 32), DENSITY)
        np.testing.assert_array_equal(layer.reshape(32, 32), expected)


@pytest.mark.slow
def test_axlearn_has_the_recorded_signature():
    param_init = pytest.importorskip("axlearn.common.param_init", exc_type=ImportError)
    assert list(inspect.signature(param_init.Initializer.initialize).parameters) == AXLEARN
    assert param_init.FanAxes._fields == ("in_axis", "out_axis", "batch_axis")


def test_haliax_weights_are_drawn_by_the_names_of_their_axes():
    hax = pytest.importorskip("haliax", exc_type=ImportError)
    sparse = namespace_of("Haliax and Levanter")["sparse"]
    embed, heads, head = hax.Axis("embed", 32), hax.Axis("heads", 4), hax.Axis("head", 8)
    for inputs, outputs in ((embed, (heads, head)), ((heads, head), embed)):
        for out_first in (False, True):
            linear = hax.nn.Linear.init(inputs, outputs, key=KEY, out_first=out_first)
            drawn = sparse(KEY, linear, DENSITY)
            assert drawn.weight.axes == linear.weight.axes
            weight = np.asarray(drawn.weight.array).reshape(32, 32)
            assert gram_error(weight) < 1e-5
            expected = eoi.orthogonal(KEY, (32, 32), DENSITY)
            np.testing.assert_array_equal(weight.T if out_first else weight, expected)


@pytest.mark.slow
def test_nnx_shards_at_the_call():
    """One process may have one device: a mesh of one still takes the path of eager sharding."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(eoi.dense(DENSITY), ("a", "b"))
        layer = nnx.Linear(32, 32, kernel_init=init, rngs=nnx.Rngs(0))
    assert layer.kernel[...].sharding.spec == jax.sharding.PartitionSpec("a", "b")
    alone = nnx.Linear(32, 32, kernel_init=eoi.dense(DENSITY), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], alone.kernel[...])
