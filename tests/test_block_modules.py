"""Convolutions and MLPs of blocks, conversions, and block-sparse layers under Flax's transforms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import gram_error, refuses
from jax.sharding import PartitionSpec

import eoi_jax as eoi
from eoi_jax import linen
from eoi_jax import nnx as eoi_nnx
from eoi_jax.blocks import BlockSparse

KEY = jax.random.key(5)
BLOCKS = {"density": 0.5, "block_size": 2}
X = jax.random.normal(KEY, (3, 8))
IMAGES = jax.random.normal(KEY, (2, 5, 6, 8))
# Names for the axes of a stored kernel, (R, k, b, c).
AXES = ("model", None, None, None)


def dense_of(variables):
    params, mask = linen.to_dense(variables)
    return params["kernel"], mask["kernel"]


def convolve(images, kernel, strides, padding):
    """An ordinary convolution whose kernel has the given matrix at its center tap."""
    size = 1 if padding == "VALID" else 3
    taps = jnp.zeros((size, size, *kernel.shape)).at[size // 2, size // 2].set(kernel)
    if padding == "CIRCULAR":
        images, padding = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "wrap"), "VALID"
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        images, taps, strides, padding, dimension_numbers=numbers, precision="highest"
    )


def make_conv(kind, **options):
    """A convolution from 8 to 12 channels, as a function, its dense kernel and its bias."""
    options = BLOCKS | options
    if kind == "nnx":
        layer = eoi_nnx.BlockSparseConv(8, 12, **options, rngs=nnx.Rngs(0))
        return layer, layer.matrix().to_dense(), layer.bias[...]
    layer = linen.BlockSparseConv(12, **options)
    variables = layer.init(KEY, IMAGES)
    apply = functools.partial(layer.apply, variables)
    return apply, dense_of(variables)[0], variables["params"]["bias"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_convolution_is_that_of_a_center_tap(kind):
    apply, kernel, bias = make_conv(kind, bias_init=nn.initializers.normal(1.0))
    assert gram_error(kernel) < 2e-6
    for padding in ("VALID", "SAME", "CIRCULAR"):  # of 1, 3 and 3 taps an axis
        expected = convolve(IMAGES, kernel, (1, 1), padding) + bias
        np.testing.assert_allclose(apply(IMAGES), expected, atol=1e-5)
    apply, kernel, _ = make_conv(kind, strides=(2, 3))
    expected = convolve(IMAGES, kernel, (2, 3), "VALID")
    np.testing.assert_allclose(apply(IMAGES), expected, atol=1e-5)
    assert expected.shape == (2, 3, 2, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("strides", "named"),
    [(2, "strides=2"), ((), "strides=()"), ((2, 0), "strides=0"), ((1,) * 4, "inputs.shape=")],
)
def test_strides_that_make_no_sense_are_refused(kind, strides, named):
    with refuses(named):
        make_conv(kind, strides=strides)[0](IMAGES)


@pytest.mark.slow
def test_an_mlp_of_linen_is_its_two_layers():
    mlp = linen.BlockSparseMlp(16, **BLOCKS, activation=jnp.sin, dropout_rate=0.5)
    variables = mlp.init(KEY, X, deterministic=True)
    (first, second), _ = [linen.to_dense(variables)[i].values() for i in (0, 1)]
    for layer in (first, second):
        assert gram_error(layer["kernel"]) < 2e-6
    hidden = jnp.sin(X @ first["kernel"])
    expected = hidden @ second["kernel"]
    np.testing.assert_allclose(mlp.apply(variables, X, True), expected, atol=1e-5)
    # What dropout leaves of the hidden units is twice as large.
    options = {"deterministic": False, "rngs": {"dropout": KEY}, "capture_intermediates": True}
    found, seen = mlp.apply(variables, X, **options)
    [dropped] = seen["intermediates"]["Dropout_0"]["__call__"]
    assert 0 < (dropped != 0).sum() < dropped.size
    np.testing.assert_allclose(dropped, jnp.where(dropped != 0, 2 * hidden, 0), atol=1e-5)
    np.testing.assert_allclose(found, dropped @ second["kernel"], atol=1e-5)


@pytest.mark.slow
def test_an_mlp_of_nnx_is_its_two_layers():
    mlp = eoi_nnx.BlockSparseMlp(
        8, 16, **BLOCKS, activation=jnp.sin, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    first, second = (layer.matrix().to_dense() for layer in (mlp.hidden, mlp.output))
    expected = jnp.sin(X @ first) @ second
    np.testing.assert_allclose(mlp(X, deterministic=True), expected, atol=1e-5)
    mlp.eval()
    np.testing.assert_allclose(mlp(X), expected, atol=1e-5)
    mlp.train()
    one, other = mlp(X, rngs=nnx.Rngs(1)), mlp(X, rngs=nnx.Rngs(2))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(one, mlp(X, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_rates_outside_of_probabilities_are_refused(rate):
    with refuses("dropout_rate=", "[0, 1]"):
        linen.BlockSparseMlp(16, **BLOCKS, dropout_rate=rate).init(KEY, X)
    with refuses("dropout_rate=", "[0, 1]"):
        eoi_nnx.BlockSparseMlp(8, 16, **BLOCKS, dropout_rate=rate, rngs=nnx.Rngs(0))


class Step(nn.Module):
    """A layer with an activation and dropout behind it, of a carry."""

    kernel_axes: tuple | None = None

    @nn.compact
    def __call__(self, x, deterministic):
        axes = self.kernel_axes
        x = linen.BlockSparseDense(8, **BLOCKS, kernel_axes=axes, name="layer")(x)
        return nn.Dropout(0.2, deterministic=deterministic)(nn.tanh(x)), None


STACKED = {
    "variable_axes": {"params": 0, "pattern": 0},
    "split_rngs": {"params": True, "dropout": True},
}


@jax.jit
def dense_chain(kernels, masks):
    """Outputs of a chain of dense layers, and the masked gradients of their squares."""

    def loss(kernels):
        y = X
        for kernel in kernels:
            y = jnp.tanh(jnp.matmul(y, kernel, precision="highest"))
        return (y**2).sum(), y

    grads, y = jax.grad(loss, has_aux=True)(kernels)
    return y, grads * masks


@pytest.mark.slow
def test_scan_and_remat_of_linen_stack_layers_of_different_patterns():
    transformed = nn.scan(
        nn.remat(Step, static_argnums=(2,)),
        **STACKED,
        in_axes=nn.broadcast,
        length=4,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    net = transformed()
    variables = net.init(KEY, X, True)
    params, mask = linen.to_dense(variables)
    kernels, masks = params["layer"]["kernel"], mask["layer"]["kernel"]
    assert kernels.shape == masks.shape == (4, 8, 8)
    for kernel in kernels:
        assert gram_error(kernel) < 2e-6
    assert len({np.asarray(one).tobytes() for one in masks}) > 1
    pattern = variables["pattern"]

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, deterministic):
        def loss(params):
            tree = {"params": params, "pattern": pattern}
            y, _ = net.apply(tree, X, deterministic, rngs={"dropout": KEY})
            return (y**2).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = gradient(variables["params"], True)
    found, _ = linen.to_dense({"params": grads, "pattern": pattern})
    expected_y, expected = dense_chain(kernels, masks)
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    np.testing.assert_allclose(found["layer"]["kernel"], expected, atol=1e-5)
    _, dropped = gradient(variables["params"], False)
    assert 0 < (dropped == 0).sum() < dropped.size
    shapes = jax.eval_shape(lambda: transformed(AXES).init(KEY, X, True))
    specs = nn.get_partition_spec(shapes)["params"]["layer"]
    assert specs["kernel"] == PartitionSpec("layers", *AXES)


@pytest.mark.slow
def test_vmap_of_linen_is_a_loop_over_layers():
    layer = linen.BlockSparseDense(8, **BLOCKS)
    inputs = jnp.stack([X, 2 * X])
    net = nn.vmap(linen.BlockSparseDense, **STACKED)(8, **BLOCKS)
    variables = net.init(KEY, inputs)
    found = jax.jit(net.apply)(variables, inputs)
    for index in range(2):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], variables)
        np.testing.assert_allclose(found[index], layer.apply(one, inputs[index]), atol=1e-6)


@pytest.mark.slow
def test_vmap_and_scan_of_nnx_stack_layers_of_different_patterns():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return eoi_nnx.BlockSparseLinear(8, 8, **BLOCKS, rngs=rngs)

    stack = make(nnx.Rngs(0))
    matrices = stack.matrix()
    assert matrices.shape == (4, 8, 8)
    dense = matrices.to_dense()
    for kernel in dense:
        assert gram_error(kernel) < 2e-6
    assert len({np.asarray(one).tobytes() for one in matrices.mask()}) > 1

    @nnx.jit
    def loss_and_output(stack):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(nnx.remat(lambda layer, x: layer(x))(layer, x))

        y = forward(X, stack)
        return (y**2).sum(), y

    grads, y = nnx.grad(loss_and_output, has_aux=True)(stack)

    expected_y, expected = dense_chain(dense, matrices.mask())
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    found = BlockSparse(grads["kernel"][...], matrices.rows, matrices.slots).to_dense()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with refuses("layer=", "(4, 8, 8)"):
        eoi_nnx.to_dense(stack)


@pytest.mark.slow
def test_axes_of_linen_kernels_are_partitioned():
    names = {"kernel_axes": AXES, "bias_init": nn.with_partitioning(nn.zeros_init(), ("model",))}
    layer = linen.BlockSparseDense(8, **BLOCKS, **names)
    variables = layer.init(KEY, X)
    specs = nn.get_partition_spec(variables)
    assert specs["params"] == {"kernel": PartitionSpec(*AXES), "bias": PartitionSpec("model")}
    assert specs["pattern"] == {"rows": PartitionSpec(), "slots": PartitionSpec()}
    # Boxed or not, and drawn with names or without them, it is the same layer.
    plain = linen.BlockSparseDense(8, **BLOCKS)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(variables), plain.init(KEY, X))
    for tree in (variables, nn.unbox(variables)):
        np.testing.assert_array_equal(layer.apply(tree, X), plain.apply(nn.unbox(variables), X))
    np.testing.assert_array_equal(dense_of(variables)[0], dense_of(nn.unbox(variables))[0])
    mlp = linen.BlockSparseMlp(16, **BLOCKS, kernel_axes=AXES)
    specs = nn.get_partition_spec(jax.eval_shape(mlp.init, KEY, X))["params"]
    assert [specs[name]["kernel"] for name in specs] == [PartitionSpec(*AXES)] * 2
    with refuses("kernel_axes=('model',)", "4"):
        linen.BlockSparseDense(8, **BLOCKS, kernel_axes=("model",)).init(KEY, X)


def test_axes_of_nnx_kernels_are_metadata():
    no_mesh = {"eager_sharding": False}  # as names of axes need one, from Flax 0.12 on
    layer = eoi_nnx.BlockSparseLinear(
        8,
        8,
        **BLOCKS,
        kernel_metadata={"sharding_names": AXES, **no_mesh, "note": 1},
        bias_metadata={"sharding_names": ("model",), **no_mesh},
        rngs=nnx.Rngs(0),
    )
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
    assert specs["kernel"] == PartitionSpec(*AXES)
    assert specs["bias"] == PartitionSpec("model")
    assert specs["rows"] == PartitionSpec()
    assert layer.kernel.get_metadata()["note"] == 1
    assert layer(X).shape == (3, 8)


class Net(nn.Module):
    """A user's network, in which one line tells the class of its layers."""

    layer: type = nn.Dense
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(self.layer, **dict(self.options))
        x = nn.Dropout(0.2, deterministic=False)(nn.tanh(dense(12, name="first")(x)))
        return nn.Dense(4, name="head")(nn.LayerNorm()(dense(8, name="last")(x)))


@pytest.mark.slow
def test_trained_dense_layers_become_blocks_and_go_on_training_as_they_would_have():
    sparse = Net(linen.BlockSparseDense, tuple(BLOCKS.items()))
    start = sparse.init({"params": KEY, "dropout": KEY}, X)
    variables, target = start, jnp.cos(jnp.arange(12.0)).reshape(3, 4)
    dense, mask = linen.to_dense(variables)
    tx = optax.adamw(1e-2)
    masked = eoi.static_sparse(tx, mask)

    @functools.partial(jax.jit, static_argnums=0)
    def step(kind, params, state, pattern):
        net, more = (sparse, {"pattern": pattern}) if kind == "blocks" else (Net(), {})

        def loss(params):
            y = net.apply({"params": params, **more}, X, rngs={"dropout": KEY})
            return ((y - target) ** 2).mean(), y

        grads, y = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizers[kind].update(grads, state, params)
        return optax.apply_updates(params, updates), state, y

    optimizers = {"blocks": tx, "dense": masked}
    state = masked.init(dense)
    for _ in range(3):
        dense, state, _ = step("dense", dense, state, None)
    # Converted after some training, and once more afterwards.
    shapes = {name: start["params"][name]["kernel"].shape[2:] for name in ("first", "last")}
    variables = linen.from_dense(dense, mask, block_size=lambda path: shapes[path[0]])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, start)
    jax.tree.map(np.testing.assert_array_equal, variables["pattern"], start["pattern"])
    for found, expected in zip(linen.to_dense(variables), (dense, mask), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    params, state, dense_state = (
        variables["params"],
        tx.init(variables["params"]),
        masked.init(dense),
    )
    for _ in range(3):
        params, state, y = step("blocks", params, state, variables["pattern"])
        dense, dense_state, dense_y = step("dense", dense, dense_state, None)
        np.testing.assert_allclose(y, dense_y, atol=1e-5)
    found, _ = linen.to_dense({"params": params, "pattern": variables["pattern"]})
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, dense)


def test_what_cannot_be_converted_is_named():
    params = {"a": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}
    mask = {"a": {"kernel": jnp.eye(4) > 0, "bias": jnp.array(True)}}
    ones = {"a": {"kernel": jnp.ones((4, 4), bool), "bias": jnp.array(True)}}
    with refuses("params[a/kernel]", "[0:2, 0:2]"):
        linen.from_dense(params, mask, block_size=2)
    with refuses("params[a/kernel]", "block_size=3"):
        linen.from_dense(params, ones, block_size=3)
    with refuses("params[a/bias]", "(4,)"):
        linen.from_dense(params, {"a": ones["a"] | {"bias": jnp.ones(4, bool)}}, block_size=2)
    with refuses("mask", "bias"):
        linen.from_dense(params, {"a": {"kernel": ones["a"]["kernel"]}}, block_size=2)
    pattern = linen.from_dense(params, ones, block_size=2)["pattern"]
    with refuses("a/kernel"):
        linen.to_dense({"params": {"b": params["a"]}, "pattern": pattern})
    # Nothing is masked: nothing is converted.
    dense = {"a": jax.tree.map(lambda leaf: jnp.array(True), params["a"])}
    assert linen.from_dense(params, dense, block_size=2) == {"params": params, "pattern": {}}


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_linear_layer_of_nnx_becomes_blocks_and_back(use_bias):
    mask = np.kron([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]], np.ones((2, 2))) > 0
    layer = nnx.Linear(8, 6, use_bias=use_bias, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.where(mask, layer.kernel[...], 0)
    sparse = eoi_nnx.from_dense(layer, mask, block_size=2)
    assert isinstance(sparse, eoi_nnx.BlockSparseLinear)
    assert sparse.kernel.shape == (3, 3, 2, 2)
    back, back_mask = eoi_nnx.to_dense(sparse)
    np.testing.assert_array_equal(back_mask, mask)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(layer))
    for one in (sparse, back):
        assert one(X).dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(one(X), np.float32), np.asarray(layer(X), np.float32), atol=2e-2
        )
    with refuses("[0:2, 0:2]"):
        eoi_nnx.from_dense(layer, np.eye(8, 6) > 0, block_size=2)
    with refuses("layer='BlockSparseConv(8, 8)'"):
        eoi_nnx.to_dense(eoi_nnx.BlockSparseConv(8, 8, **BLOCKS, rngs=nnx.Rngs(0)))


def test_precision_reaches_the_products():
    layer = linen.BlockSparseDense(8, **BLOCKS, precision=jax.lax.Precision.HIGHEST)
    variables = layer.init(KEY, X)
    nnx_layer = eoi_nnx.BlockSparseLinear(
        8, 8, **BLOCKS, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(nnx_layer)
    for program in (
        jax.make_jaxpr(lambda x: layer.apply(variables, x))(X),
        jax.make_jaxpr(lambda x: nnx.merge(graphdef, state)(x))(X),
    ):
        assert "Precision.HIGHEST" in str(program)
