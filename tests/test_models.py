import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eoi_jax as eoi
from eoi_jax.typing import Layout
from experiments import models

# Of each network with 10 classes: prunable weights, and all trainable parameters.
COUNTS = {
    "mlp7": (129_400, 130_010),
    "mlp1000": (784 * 128 + 998 * 128**2 + 1280, 784 * 128 + 998 * 128**2 + 1280 + 999 * 128 + 10),
    "resnet32": (464_432, 466_906),
}


@functools.cache
def shapes_of(model, input_shape):
    images = jax.ShapeDtypeStruct((2, *input_shape), "float32")
    return jax.eval_shape(model.init_with_output, jax.random.key(0), images)


def sizes(params):
    """Prunable weights and all trainable parameters."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = sum(leaf.size for path, leaf in paths_and_leaves if eoi.masks.is_kernel(path, leaf))
    return kernels, sum(leaf.size for _, leaf in paths_and_leaves)


def test_every_network_has_its_counts():
    assert set(COUNTS) == set(models.NAMES)


@pytest.mark.parametrize("name", models.NAMES)
def test_counts_and_shapes(name):
    logits, variables = shapes_of(models.create(name), models.input_shape(name))
    assert sizes(variables["params"]) == COUNTS[name]
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert ("batch_stats" in variables) == (name == "resnet32")


@pytest.mark.parametrize("name", models.NAMES)
def test_classes_only_change_the_last_layer(name):
    logits, variables = shapes_of(models.create(name, 200), models.input_shape(name))
    inputs = variables["params"]["last"]["kernel"].shape[0]
    assert logits.shape == (2, 200)
    weights, parameters = COUNTS[name]
    assert sizes(variables["params"]) == (weights + 190 * inputs, parameters + 190 * (inputs + 1))


@pytest.mark.parametrize("depth", [8, 20, 32, 56, 110])
def test_residual_networks_of_other_depths(depth):
    """n blocks a stage: the first convolution, three stages, two projections, one linear layer."""
    _, variables = shapes_of(models.ResNet(depth), (32, 32, 3))
    n = (depth - 2) // 6
    assert 1 + 2 * 3 * n + 1 == depth
    weights = 9 * 3 * 16 + 9 * 16**2 * 2 * n + 16 * 32 + 32 * 64 + 64 * 10
    weights += sum(9 * (w // 2 * w + w**2 * (2 * n - 1)) for w in (32, 64))
    norms = 16 * (1 + 2 * n) + 32 * (2 * n + 1) + 64 * (2 * n + 1)
    assert sizes(variables["params"]) == (weights, weights + 2 * norms + 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == 2 * norms


def test_depths_that_no_residual_network_has():
    for depth in (2, 7, 30, 33):
        with pytest.raises(ValueError, match=rf"depth={depth} is outside \{{8, 14, 20"):
            models.ResNet(depth)


def convolve(x, kernel, stride, padding):
    """Sum over the taps, in float64."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    k = kernel.shape[0]
    rows, columns = ((size - k) // stride + 1 for size in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(k):
        for j in range(k):
            taken = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            out += taken @ kernel[i, j]
    return out


def residual_forward(params, stats, x, train):
    """Evaluate a residual network of one block a stage, in NumPy."""

    def layer(scope, own, name, x, stride, padding):
        norm = "first_norm" if name == "first" else f"{name}_norm"
        y = convolve(x, scope[name]["kernel"], stride, padding)
        if train:
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        else:
            mean, var = own[norm]["mean"], own[norm]["var"]
        return (y - mean) / np.sqrt(var + 1e-5) * scope[norm]["scale"] + scope[norm]["bias"]

    x = np.maximum(layer(params, stats, "first", x, 1, 1), 0)
    for stage in (1, 2, 3):
        scope, own = params[f"block{stage}_1"], stats[f"block{stage}_1"]
        stride = 1 if stage == 1 else 2
        y = np.maximum(layer(scope, own, "conv1", x, stride, 1), 0)
        y = layer(scope, own, "conv2", y, 1, 1)
        if stage > 1:
            x = layer(scope, own, "shortcut", x, stride, 0)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["last"]["kernel"] + params["last"]["bias"]


def filled(model, input_shape):
    """Random variables of a model, each number of order 1 / sqrt(inputs), positive for norms."""
    noise = np.random.default_rng(0)

    def fill(leaf):
        if leaf.ndim < 2:
            return noise.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        inputs = math.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1])
        return (noise.standard_normal(leaf.shape) / math.sqrt(inputs)).astype(np.float32)

    return jax.tree.map(fill, shapes_of(model, input_shape)[1])


@pytest.fixture(scope="module")
def small_resnet():
    model = models.ResNet(8)
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype(np.float32)
    return model, filled(model, (8, 8, 3)), images


@pytest.mark.parametrize("train", [False, True])
def test_a_residual_network_equals_numpy(small_resnet, train):
    model, variables, images = small_resnet
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    logits, updated = jax.jit(apply)(variables, images)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, images))
    expected = residual_forward(wide[0]["params"], wide[0]["batch_stats"], wide[1], train)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    old, new = variables["batch_stats"], updated["batch_stats"]
    same = [(a == b).all() for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)]
    assert same == [not train] * len(same)


def test_running_statistics_must_be_mutable_to_train(small_resnet):
    model, variables, images = small_resnet
    with pytest.raises(Exception, match="batch_stats"):
        model.apply(variables, images, train=True)


def test_one_calling_convention():
    model = models.create("mlp7")
    images = np.random.default_rng(1).standard_normal((3, 28, 28, 1)).astype(np.float32)
    variables = filled(model, (28, 28, 1))
    logits = model.apply(variables, images)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(model.apply(variables, images, train=True), logits)


def slope(x):
    return np.where(x > 0, x, 0.01 * x)


def selu(x):
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * np.where(x > 0, x, alpha * np.expm1(x))


ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": slope,
    "selu": selu,
}


def test_activations_are_those_of_the_list():
    assert set(models.ACTIVATIONS) == set(ACTIVATIONS)
    x = np.linspace(-3, 3, 61)
    for name, expected in ACTIVATIONS.items():
        got = models.create("mlp7", activation=name).activation(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, expected(x), rtol=1e-5, atol=1e-6, err_msg=name)


def test_activations_by_default_and_by_function():
    assert models.create("mlp7").activation is jnp.tanh
    assert models.create("mlp1000").activation is jnp.tanh
    assert models.create("resnet32").activation is nn.relu
    for name in models.NAMES:
        assert models.create(name, activation=nn.softplus).activation is nn.softplus


def marked(value):
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jnp.full(shape, value, dtype)


def test_each_initializer_fills_what_it_is_for():
    inits = {"kernel_init": marked(2.0), "conv_init": marked(3.0), "bias_init": marked(4.0)}
    for model, shape in (
        (models.create("mlp7", **inits), (28, 28, 1)),
        (models.ResNet(8, **inits), (8, 8, 3)),
        (models.create("resnet32", **inits).clone(depth=8), (8, 8, 3)),
    ):
        params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *shape)))["params"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = [key.key for key in path]
            if any("norm" in name for name in names):
                continue
            expected = 4.0 if names[-1] == "bias" else 3.0 if leaf.ndim == 4 else 2.0
            np.testing.assert_array_equal(leaf, expected, err_msg="/".join(names))


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2), ("leaky_relu", 2), ("tanh", 1)])
def test_default_kernels_follow_the_activation(activation, gain):
    """He's variance 2 / inputs for rectifiers, LeCun's 1 / inputs for others."""
    key, shape = jax.random.key(0), (3, 3, 64, 64)
    variances = [
        models.create("mlp7", activation=activation).kernel_init(key, (576, 64)).var() * 576,
        models.create("resnet32", activation=activation).conv_init(key, shape).var() * 576,
        models.create("resnet32", activation=activation).kernel_init(key, (576, 64)).var() * 576,
    ]
    # 36 864 entries of a truncated normal: a variance's standard error is below sqrt(2 / 36 864).
    np.testing.assert_allclose(variances, gain, rtol=5 * np.sqrt(2 / 36_864))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.create("mpl7"), r"name='mpl7' is outside .*Did you mean 'mlp7'\?"),
        (lambda: models.input_shape("resnet-32"), r"Did you mean 'resnet32'\?"),
        (
            lambda: models.create("vgg"),
            r"name='vgg' is outside \{'mlp7', 'mlp1000', 'resnet32'\}\. Choose one of them\.",
        ),
        (
            lambda: models.create("mlp7", activation="hardtanh"),
            r"activation='hardtanh' is outside .*Did you mean 'hard_tanh'\?",
        ),
        (lambda: models.create("mlp7", 0), r"num_classes=0 is outside \[1, \.\.\.\)"),
    ],
)
def test_bad_names_are_answered(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", models.NAMES)
def test_layout_stacks_the_scanned_kernels_alone(name):
    params = shapes_of(models.create(name), models.input_shape(name))[1]
    mask = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bool"), params)
    for tree in (params, mask):
        stacked = {
            "/".join(key.key for key in path): models.layout(path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if models.layout(path, leaf) != Layout()
        }
        expected = {} if name == "resnet32" else {"params/hidden/linear/kernel": Layout(1)}
        assert stacked == expected
    scalar = [(path, jnp.array(True)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert all(models.layout(path, leaf) == Layout() for path, leaf in scalar)


def test_a_stack_counts_as_its_layers():
    """Erdős–Rényi sees 5 matrices of 100 x 100, not one kernel of three axes."""
    params = shapes_of(models.create("mlp7"), (28, 28, 1))[1]["params"]
    found = eoi.budgets.erdos_renyi_kernel(params, 0.1, layout=models.layout)
    alone = [
        {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
        for shape in [(784, 100), *[(100, 100)] * 5, (100, 10)]
    ]
    expected = [layer["kernel"] for layer in eoi.budgets.erdos_renyi_kernel(alone, 0.1)]
    stack = found["hidden"]["linear"]["kernel"].tolist()
    assert [found["first"]["kernel"], *stack, found["last"]["kernel"]] == expected
