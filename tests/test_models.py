import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from jax.tree_util import tree_leaves_with_path

import eoi_jax as eoi
from eoi_jax import linen
from eoi_jax.typing import Layout
from experiments import models
from experiments.models.transformer import gelu

ZEROS = nn.initializers.zeros  # quick to trace
TEXT = ("gpt", "gpt_plain")
NORMED = ("resnet20", "resnet32", "resnet56", "resnet110", "vgg16", "efficientnet_b0", "resnet50")


def mlp(depth, width):
    weights = 784 * width + (depth - 2) * width**2 + width * 10
    return weights, weights + (depth - 1) * width + 10


def cnn():
    """994 convolutions after the three that change size; every layer has biases."""
    weights = 9 * 3 * 128 + 2 * 9 * 128**2 + 994 * 9 * 128**2 + 4 * 4 * 128 * 10
    return weights, weights + 997 * 128 + 10


def resnet(depth):
    """n blocks a stage: the first convolution, three stages, two projections, one linear layer."""
    n = (depth - 2) // 6
    assert 1 + 2 * 3 * n + 1 == depth
    weights = 9 * 3 * 16 + 9 * 16**2 * 2 * n + 16 * 32 + 32 * 64 + 64 * 10
    weights += sum(9 * (w // 2 * w + w**2 * (2 * n - 1)) for w in (32, 64))
    norms = 16 * (1 + 2 * n) + 32 * (2 * n + 1) + 64 * (2 * n + 1)
    return weights, weights + 2 * norms + 10


def vgg():
    """A scale and a shift of the norm and a bias for every channel of all layers but the last."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    windows = [9, 9, 9, 9, 9, 9, 1, 9, 9, 1, 9, 9, 1]
    layers = zip(channels[:-1], channels[1:], windows, strict=True)
    weights = sum(math.prod(layer) for layer in layers) + 2048 * 512 + 512 * 512 + 512 * 10
    return weights, weights + 3 * (sum(channels[1:]) + 2 * 512) + 10


def efficientnet(classes):
    weights, others, inputs = (
        9 * 3 * 32 + 320 * 1280 + 1280 * classes,
        2 * (32 + 1280) + classes,
        32,
    )
    for expansion, window, outputs, blocks in [
        (1, 9, 16, 1),
        (6, 9, 24, 2),
        (6, 25, 40, 2),
        (6, 9, 80, 3),
        (6, 25, 112, 3),
        (6, 25, 192, 4),
        (6, 9, 320, 1),
    ]:
        for _ in range(blocks):
            inner, squeezed = expansion * inputs, inputs // 4
            if expansion > 1:
                weights, others = weights + inputs * inner, others + 2 * inner
            weights += window * inner + 2 * inner * squeezed + inner * outputs
            others += 2 * inner + squeezed + inner + 2 * outputs
            inputs = outputs
    return weights, weights + others


def bottlenecks():
    weights, norms, inputs = 49 * 3 * 64 + 2048 * 1000, 64, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        weights, norms = weights + inputs * 4 * width, norms + 4 * width  # the shortcut
        for _ in range(blocks):
            weights += inputs * width + 9 * width**2 + width * 4 * width
            norms += 6 * width
            inputs = 4 * width
    return weights, weights + 2 * norms + 1000


def blocks(d, depth, norms):
    """Perceptrons are four times as wide; there are two norms and two LayerScales."""
    weights = depth * (4 * d**2 + 2 * d * 4 * d)
    return weights, depth * (4 * d + 4 * d + d + norms * 2 * 2 * d + 2 * d) + norms * 2 * d


def deit(d, depth, patch, size, classes, norms=1):
    """Patches have positions, the class token none."""
    weights, others = blocks(d, depth, norms)
    weights += patch * patch * 3 * d + d * classes
    return weights, weights + others + d + (size // patch) ** 2 * d + d + classes


def gpt(d, depth, length, characters, norms=1):
    """Characters are embedded by no kernel; there is no class token."""
    weights, others = blocks(d, depth, norms)
    weights += d * characters
    return weights, weights + others + characters * d + length * d + characters


# Of each network: prunable weights, and all trainable parameters.
COUNTS = {
    "mlp7": mlp(7, 100),
    "mlp1000": mlp(1000, 128),
    "mlp7_wide": mlp(7, 2048),
    "mlp1000_wide": mlp(1000, 512),
    "cnn1000": cnn(),
    "resnet20": resnet(20),
    "resnet32": resnet(32),
    "resnet56": resnet(56),
    "resnet110": resnet(110),
    "vgg16": vgg(),
    "efficientnet_b0": efficientnet(200),
    "resnet50": bottlenecks(),
    "deit_s": deit(384, 12, 16, 224, 1000),
    "vit": deit(256, 4, 4, 32, 10),
    "vit_plain": deit(256, 4, 4, 32, 10, norms=0),
    "gpt": gpt(64, 6, 64, 96),
    "gpt_plain": gpt(64, 6, 64, 96, norms=0),
}
SMALL = {
    "mlp7": {},
    "mlp1000": {"depth": 4},
    "mlp7_wide": {"width": 16},
    "mlp1000_wide": {"depth": 4, "width": 16},
    "cnn1000": {"depth": 6, "width": 8},
    "resnet20": {"depth": 8},
    "resnet32": {"depth": 8, "width": 4},
    "resnet56": {"depth": 8},
    "resnet110": {"depth": 8},
    "vgg16": {"width": 4},
    "efficientnet_b0": {"depth": 3, "width": 8},
    "resnet50": {"depth": 14, "width": 4},
    "deit_s": {"depth": 2, "width": 12},
    "vit": {"depth": 2, "width": 16},
    "vit_plain": {"depth": 2, "width": 16},
    "gpt": {"depth": 2, "width": 16},
    "gpt_plain": {"depth": 2, "width": 16},
}


def shapes_of(model, input_shape):
    images = jax.ShapeDtypeStruct((2, *input_shape), "float32")
    return jax.eval_shape(model.init_with_output, jax.random.key(0), images)


@functools.cache
def built(name):
    """Shapes of logits and variables, at full size."""
    model = models.create(name, kernel_init=ZEROS, conv_init=ZEROS)
    return shapes_of(model, models.input_shape(name))


def params_of(name, **sizes):
    model = models.create(name, **sizes, kernel_init=ZEROS, conv_init=ZEROS)
    return shapes_of(model, models.input_shape(name))[1]["params"]


def sizes(params):
    """Prunable weights and all trainable parameters."""
    paths_and_leaves = tree_leaves_with_path(params)
    kernels = sum(leaf.size for path, leaf in paths_and_leaves if eoi.masks.is_kernel(path, leaf))
    return kernels, sum(leaf.size for _, leaf in paths_and_leaves)


def path_of(path):
    return "/".join(key.key for key in path)


def test_counts_are_the_published_ones():
    assert set(COUNTS) == set(models.NAMES) == set(SMALL)
    assert COUNTS["mlp7"] == (129_400, 130_010)
    assert COUNTS["resnet32"] == (464_432, 466_906)
    assert COUNTS["resnet50"][1] == 25_557_032
    assert efficientnet(1000)[1] == 5_288_548
    assert COUNTS["deit_s"][1] == 22_059_496


@pytest.mark.parametrize("name", models.NAMES)
def test_counts_and_shapes(name):
    logits, variables = built(name)
    classes = {"efficientnet_b0": 200, "resnet50": 1000, "deit_s": 1000}.get(name, 10)
    expected = (2, 64, 96) if name in TEXT else (2, classes)
    assert sizes(variables["params"]) == COUNTS[name]
    assert (logits.shape, logits.dtype) == (expected, jnp.float32)
    assert ("batch_stats" in variables) == (name in NORMED)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_classes_only_change_the_last_layer(name):
    logits, few, many = None, None, None
    for classes in (10, 200):
        model = models.create(name, classes, **SMALL[name], kernel_init=ZEROS, conv_init=ZEROS)
        logits, variables = shapes_of(model, models.input_shape(name))
        few, many = many, sizes(variables["params"])
    inputs = variables["params"]["last"]["kernel"].shape[0]
    assert logits.shape == ((2, 64, 200) if name in TEXT else (2, 200))
    assert many == (few[0] + 190 * inputs, few[1] + 190 * (inputs + 1))


def test_depths_of_residual_networks():
    for depth in (8, 20):
        params = shapes_of(models.create("resnet32", depth=depth), (32, 32, 3))[1]["params"]
        assert sizes(params) == resnet(depth)
    blocks = {
        depth: sum(name.startswith("block") for name in params_of("resnet50", depth=depth))
        for depth in (14, 26)
    }
    assert blocks == {14: 4, 26: 8}  # of three convolutions each


def test_channels_of_efficient_networks():
    """Those of B7, twice as wide, are published."""
    for width, expected in {
        32: [16, 24, 40, 80, 112, 192, 320],
        64: [32, 48, 80, 160, 224, 384, 640],
        36: [24, 32, 48, 88, 128, 216, 360],  # 16 would be less than nine tenths of 18
    }.items():
        model = models.EfficientNet(width=width)
        assert [
            model.channels(channels) for channels in (16, 24, 40, 80, 112, 192, 320)
        ] == expected
    params = params_of("efficientnet_b0", depth=2, width=64)
    assert params["first"]["kernel"].shape[-1] == 64
    assert params["block2_1"]["project"]["kernel"].shape[-1] == 48
    assert params["final"]["kernel"].shape[-1] == 4 * 640


def test_widths_scale_all_stages():
    for name in ("resnet32", "vgg16", "resnet50"):
        params = params_of(name, width=8)
        full = built(name)[1]["params"]
        first_width = full["conv1_1" if name == "vgg16" else "first"]["kernel"].shape[-1]
        for (path, leaf), whole in zip(
            tree_leaves_with_path(params), jax.tree.leaves(full), strict=True
        ):
            if path[0].key != "last":
                assert leaf.shape[-1] * first_width == whole.shape[-1] * 8, path_of(path)


@pytest.mark.parametrize("depth", [2, 7, 30, 33])
def test_depths_that_no_residual_network_has(depth):
    with refuses("depth", f"depth={depth}", "{8, 14, 20, ...}"):
        models.ResNet(depth)


def slope(x):
    return np.where(x > 0, x, 0.01 * x)


def selu(x):
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * np.where(x > 0, x, alpha * np.expm1(x))


def silu(x):
    return x / (1 + np.exp(-x))


def normal_cdf_times(x):
    return x * np.array([math.erfc(-one / math.sqrt(2)) / 2 for one in x])


ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": slope,
    "selu": selu,
    "silu": silu,
    "gelu": normal_cdf_times,
}


def test_activations_are_those_of_the_list():
    assert set(models.ACTIVATIONS) == set(ACTIVATIONS)
    x = np.linspace(-3, 3, 61)
    for name, expected in ACTIVATIONS.items():
        got = models.create("mlp7", activation=name).activation(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, expected(x), rtol=1e-5, atol=1e-6, err_msg=name)


def test_activations_by_default_and_by_function():
    defaults = {"mlp7": jnp.tanh, "mlp1000": jnp.tanh, "cnn1000": jnp.tanh}
    defaults |= {"mlp7_wide": jnp.tanh, "mlp1000_wide": jnp.tanh}
    defaults |= {"efficientnet_b0": nn.silu, "deit_s": gelu, "vit": gelu, "vit_plain": gelu}
    defaults |= dict.fromkeys(TEXT, gelu)
    for name in models.NAMES:
        assert models.create(name).activation is defaults.get(name, nn.relu)
        assert models.create(name, activation=nn.softplus).activation is nn.softplus


def marked(dtype):
    """Leave a mark that shapes show: a dtype."""
    return lambda key, shape, _=None, out_sharding=None: jnp.zeros(shape, dtype)


@pytest.mark.parametrize("name", models.NAMES)
def test_each_initializer_fills_what_it_is_for(name):
    inits = {"kernel_init": marked("float16"), "conv_init": marked("bfloat16")}
    model = models.create(name, **SMALL[name], **inits, bias_init=marked("int8"))
    params = shapes_of(model, models.input_shape(name))[1]["params"]
    for path, leaf in tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] not in ("kernel", "bias") or any("norm" in name for name in names):
            assert leaf.dtype == "float32"
            continue
        linear = "attention" in names or leaf.ndim - ("hidden" in names) == 2
        expected = "int8" if names[-1] == "bias" else "float16" if linear else "bfloat16"
        assert leaf.dtype == expected, path_of(path)


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


def test_default_kernels_of_the_transformer():
    values = models.create("deit_s").kernel_init(jax.random.key(0), (384, 96)) / 0.02
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: models.create("mpl7"), ("name='mpl7'", "Did you mean 'mlp7'?")),
        (lambda: models.input_shape("resnet-32"), ("name='resnet-32'", "mean 'resnet32'?")),
        (lambda: models.where("deit"), ("name='deit'", "Did you mean 'deit_s'?")),
        (lambda: models.choose("vgg", ("mlp7", "resnet32")), ("name='vgg'", "'mlp7', 'resnet32'")),
        (
            lambda: models.create("mlp7", activation="hardtanh"),
            ("activation='hardtanh'", "Did you mean 'hard_tanh'?"),
        ),
        (lambda: models.create("mlp7", 0), ("num_classes=0", "[1, ...)")),
        (lambda: models.create("mlp7", depth=1), ("depth=1", "[2, ...)")),
        (lambda: models.create("mlp7", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("cnn1000", depth=3), ("depth=3", "[4, ...)")),
        (lambda: models.create("cnn1000", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("resnet32", depth=33), ("depth=33", "{8, 14, 20, ...}")),
        (lambda: models.create("resnet32", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("vgg16", depth=13), ("depth=13", "vgg16")),
        (lambda: models.create("vgg16", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("efficientnet_b0", depth=17), ("depth=17", "{1, 2,", "16}")),
        (lambda: models.create("efficientnet_b0", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("resnet50", depth=18), ("depth=18", "{14, 26, 50, 101, 152}")),
        (lambda: models.create("resnet50", width=0), ("width=0", "[1, ...)")),
        (lambda: models.create("deit_s", width=100), ("width=100", "multiples of 6")),
        (lambda: models.create("deit_s", depth=0), ("depth=0", "[1, ...)")),
        (
            lambda: shapes_of(models.create("deit_s"), (225, 224, 3)),
            ("images", "225 x 224", "patch=16"),
        ),
        (lambda: models.where("vgg16", attention=True), ("attention=True", "vgg16")),
    ],
)
def test_bad_names_and_sizes_are_answered(call, parts):
    with refuses(*parts):
        call()


# ------------------------------------------------------------------ how kernels are read

# Kernels with a layout of their own; depthwise ones come by name.
STACKS = {
    "mlp7": {"hidden/linear": Layout(1)},
    "mlp1000": {"hidden/linear": Layout(1)},
    "mlp7_wide": {"hidden/linear": Layout(1)},
    "mlp1000_wide": {"hidden/linear": Layout(1)},
    "cnn1000": {"hidden/conv": Layout(1)},
    "deit_s": {
        **{f"hidden/attention/{name}": Layout(2) for name in ("query", "key", "value", "out")},
        **{f"hidden/{name}": Layout(1) for name in ("mlp_in", "mlp_out")},
    },
}
STACKS |= dict.fromkeys(("vit", "vit_plain", *TEXT), STACKS["deit_s"])


@pytest.mark.parametrize("name", models.NAMES)
def test_layout_reads_the_stacks_and_groups_alone(name):
    params = built(name)[1]["params"]
    mask = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bool"), params)
    expected = {f"{layer}/kernel": stack for layer, stack in STACKS.get(name, {}).items()}
    if name == "efficientnet_b0":
        channels_of = {
            path_of(path): leaf.shape[-1]
            for path, leaf in tree_leaves_with_path(params)
            if leaf.ndim == 4 and leaf.shape[0] > 1 and leaf.shape[-2] == 1
        }
        assert len(channels_of) == 16
        expected = {path: Layout(groups=channels) for path, channels in channels_of.items()}
    for tree in (params, mask):
        found = {
            path_of(path): models.layout(path, leaf)
            for path, leaf in tree_leaves_with_path(tree)
            if models.layout(path, leaf) != Layout()
        }
        assert found == expected
    scalar = [(path, jnp.array(True)) for path, _ in tree_leaves_with_path(params)]
    assert all(models.layout(path, leaf) == Layout() for path, leaf in scalar)


@pytest.mark.parametrize("name", models.NAMES)
def test_budgets_count_the_layers_that_layout_tells(name):
    """Of the leaves to be pruned alone, and in all as many weights as the density allows."""
    params, where = built(name)[1]["params"], models.where(name)
    found = eoi.budgets.erdos_renyi_kernel(params, 0.1, where=where, layout=models.layout)
    kept = weights = 0
    for (path, leaf), density in zip(
        tree_leaves_with_path(params), jax.tree.leaves(found), strict=True
    ):
        if where(path, leaf):
            assert np.shape(density) == leaf.shape[: models.layout(path, leaf).batch_axes]
            kept += np.sum(density) * leaf.size / np.size(density)
            weights += leaf.size
        else:
            assert density == 1.0
    assert round(kept) == math.floor(0.1 * weights + 0.5)


@pytest.mark.parametrize("name", models.NAMES)
def test_no_network_means_something_else_by_a_name(name):
    """What all networks state together reads each network as it states it alone."""
    spec = models.SPECS[name]
    for path, leaf in tree_leaves_with_path(built(name)[1]["params"]):
        if path[-1].key == "kernel":
            names = {key.key for key in path}
            stacked, depthwise = names & set(spec.stacked), names & set(spec.depthwise)
            expected = Layout(len(stacked), leaf.shape[-1] if depthwise else 1)
            assert models.layout(path, leaf) == expected


@pytest.mark.slow
def test_networks_that_are_fast_in_a_loop_compute_the_same():
    """On CPUs convolutions without residuals get other gradients, and those with them no loop."""
    adapt = {name: spec.in_cpu_loop for name, spec in models.SPECS.items() if spec.in_cpu_loop}
    assert set(adapt) == {"mlp7", "mlp1000", "mlp7_wide", "mlp1000_wide", "cnn1000"}
    model = models.create("cnn1000", 3, depth=5, width=4)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), images)
    adapted = adapt["cnn1000"](model)
    assert adapted.convolve is not model.convolve
    np.testing.assert_allclose(
        adapted.apply(variables, images), model.apply(variables, images), rtol=1e-5, atol=1e-6
    )


def test_what_is_pruned():
    perceptrons, transformers = {"mlp7_wide", "mlp1000_wide"}, {"deit_s", "vit", "vit_plain", *TEXT}
    for name in set(models.NAMES) - perceptrons - transformers:
        assert models.where(name) is eoi.masks.is_kernel

    def pruned(name, **parts):
        where = models.where(name, **parts)
        leaves = tree_leaves_with_path(built(name)[1]["params"])
        return {path_of(path[:-1]) for path, leaf in leaves if where(path, leaf)}

    for name in perceptrons:
        assert pruned(name) == {"hidden/linear"}
    for name in transformers:
        assert pruned(name) == {"hidden/mlp_in", "hidden/mlp_out"}
        assert pruned(name, attention=True) == set(STACKS["deit_s"])
        heads = pruned(name, attention=True, perceptrons=False)
        assert heads == set(STACKS["deit_s"]) - {"hidden/mlp_in", "hidden/mlp_out"}
        with refuses("perceptrons=False", "attention=True"):
            models.where(name, perceptrons=False)


# ------------------------------------------------------------------ layers of blocks


@pytest.mark.parametrize("name", ["mlp7_wide", "deit_s", "vit"])
def test_what_is_pruned_is_what_is_stored_in_blocks(name):
    """Half of each such kernel; all other leaves are those of the dense network."""
    sizes = {"depth": 4, "width": 24}
    dense, sparse = (
        shapes_of(models.create(name, **sizes, blocks=blocks), models.input_shape(name))[1]
        for blocks in (None, models.Blocks(density=0.5, size=4))
    )
    stored = {path_of(path): leaf for path, leaf in tree_leaves_with_path(sparse["params"])}
    assert set(dense) == {"params"}
    for path, leaf in tree_leaves_with_path(dense["params"]):
        if models.where(name)(path, leaf):
            assert 2 * stored.pop(path_of(path)).size == leaf.size
        else:
            assert stored.pop(path_of(path)).shape == leaf.shape
    assert not stored


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp7_wide", "vit"])
def test_blocks_compute_what_the_dense_network_does(name):
    """With the blocks in their places, which the mask keeps, and orthogonal at the start."""
    sizes, shape = {"depth": 4, "width": 16}, (2, 8, 8, 1)
    sparse = models.create(name, **sizes, blocks=models.Blocks(0.5, 4, scale=2.0))
    images = jax.random.normal(jax.random.key(0), shape)
    logits, variables = jax.jit(sparse.init_with_output)(jax.random.key(1), images)
    dense, mask = linen.to_dense(variables)
    found = models.create(name, **sizes).apply({"params": dense}, images)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    for path, leaf in tree_leaves_with_path(dense):
        if not models.where(name)(path, leaf):
            continue
        names = tuple(key.key for key in path[:-1])
        kept = functools.reduce(lambda tree, name: tree[name], names, mask)["kernel"]
        for matrix, matrix_mask in zip(leaf, kept, strict=True):
            assert matrix_mask.mean() == 0.5
            assert (matrix[~matrix_mask] == 0).all()
            narrow = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            np.testing.assert_allclose(narrow @ narrow.T, 4 * np.eye(len(narrow)), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp7", "resnet32"])
def test_networks_without_layers_of_blocks_say_so(name):
    with refuses("blocks", name, "vit"):
        models.create(name, blocks=models.Blocks(0.5, 4))


def test_a_stack_counts_as_its_layers():
    """Erdős–Rényi sees 5 matrices of 100 x 100, not one kernel of three axes."""
    params = built("mlp7")[1]["params"]
    found = eoi.budgets.erdos_renyi_kernel(params, 0.1, layout=models.layout)
    alone = [
        {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
        for shape in [(784, 100), *[(100, 100)] * 5, (100, 10)]
    ]
    expected = [layer["kernel"] for layer in eoi.budgets.erdos_renyi_kernel(alone, 0.1)]
    stack = found["hidden"]["linear"]["kernel"].tolist()
    assert [found["first"]["kernel"], *stack, found["last"]["kernel"]] == expected


def matrices(kernel, layout):
    """All matrices of a kernel, each at the center tap; other taps have to be zero."""
    kernel = np.asarray(kernel, np.float64)
    kernel = kernel.reshape(-1, *kernel.shape[layout.batch_axes :])
    center = tuple((size - 1) // 2 for size in kernel.shape[1:-2])
    tap = kernel[(slice(None), *center)]
    assert np.count_nonzero(kernel) == np.count_nonzero(tap)
    split = tap.reshape(*tap.shape[:2], layout.groups, -1)
    return np.moveaxis(split, 2, 1).reshape(-1, tap.shape[1], split.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "count"),
    [("deit_s", "hidden/attention/query", 2 * 6), ("efficientnet_b0", "block2_1/depthwise", 48)],
)
def test_every_head_and_channel_gets_an_orthogonal_matrix(name, layer, count):
    params = params_of(name, **SMALL[name])
    names = layer.split("/")
    shape = functools.reduce(lambda tree, name: tree[name], names, params)["kernel"].shape
    alone = functools.reduce(
        lambda tree, name: {name: tree}, reversed(names), {"kernel": jnp.zeros(shape)}
    )
    start = eoi.exact_orthogonal(jax.random.key(0), alone, 0.6, layout=models.layout)
    [(path, kernel)] = tree_leaves_with_path(start.params)
    assert eoi.masks.density(start.mask) == math.floor(0.6 * kernel.size + 0.5) / kernel.size
    blocks = matrices(kernel, models.layout(path, kernel))
    assert len(blocks) == count
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_initializers_draw_each_head_by_itself(merge):
    """As of one kernel of three axes, fans would be wrong and no head orthogonal."""

    def init(key, shape, dtype):
        assert shape == ((4, 3) if not merge else (3, 4))
        return jax.random.uniform(key, shape, dtype)

    x = np.zeros((5, 2, 3) if merge else (5, 4), np.float32)
    layer = models.HeadProjection(2, 4 if merge else 3, merge, kernel_init=init)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    assert params["bias"].shape == ((4,) if merge else (2, 3))
    first, second = params["kernel"]
    assert not np.isin(first, second).any()
