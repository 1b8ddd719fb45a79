"""Each network, small, against the same network written once more in NumPy and float64."""

import functools
import math

import jax
import numpy as np
import pytest
from scipy.special import erf, softmax

from experiments import models

CASES = {
    "mlp7": ({"depth": 5, "width": 6}, (4, 4, 1)),
    "cnn1000": ({"depth": 7, "width": 4}, (16, 16, 3)),
    "resnet32": ({"depth": 8, "width": 4}, (8, 8, 3)),
    "vgg16": ({"width": 2}, (32, 32, 3)),
    "efficientnet_b0": ({"depth": 4, "width": 8}, (32, 32, 3)),
    "resnet50": ({"depth": 14, "width": 2}, (32, 32, 3)),
    "deit_s": ({"depth": 2, "width": 12}, (32, 48, 3)),
}


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def linear(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def convolve(x, layer, stride=1, padding=0, groups=1, mode="constant"):
    """Sum over the taps."""
    kernel = layer["kernel"]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode)
    size, _, inputs, outputs = kernel.shape
    rows, columns = ((length - size) // stride + 1 for length in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, groups, outputs // groups))
    for i in range(size):
        for j in range(size):
            taken = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            taken = taken.reshape(*taken.shape[:-1], groups, inputs)
            tap = kernel[i, j].reshape(inputs, groups, outputs // groups)
            out += np.einsum("nhwgi,igo->nhwgo", taken, tap)
    return out.reshape(*out.shape[:3], outputs) + layer.get("bias", 0)


def pool(x, size, stride, padding, reduce):
    x = np.pad(x, ((0, 0), *[(padding, padding)] * 2, (0, 0)), constant_values=-np.inf)
    rows, columns = ((length - size) // stride + 1 for length in x.shape[1:3])
    taken = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(size)
        for j in range(size)
    ]
    return reduce(taken, axis=0)


class Normed:
    """Layers of one module, each followed by batch normalization."""

    def __init__(self, params, stats, train):
        self.params, self.stats, self.train = params, stats, train

    def __getitem__(self, name):
        return Normed(self.params[name], self.stats[name], self.train)

    def norm(self, name, y):
        if self.train:
            axes = tuple(range(y.ndim - 1))
            mean, var = y.mean(axes), y.var(axes)
        else:
            mean, var = self.stats[name]["mean"], self.stats[name]["var"]
        return (y - mean) / np.sqrt(var + 1e-5) * self.params[name]["scale"] + self.params[name][
            "bias"
        ]

    def conv(self, name, x, stride=1, padding=0, groups=1):
        y = convolve(x, self.params[name], stride, padding, groups)
        return self.norm(f"{name}_norm", y)


def mlp(net, x):
    x = np.tanh(linear(x.reshape(len(x), -1), net.params["first"]))
    stack = net.params["hidden"]["linear"]
    for kernel, bias in zip(stack["kernel"], stack["bias"], strict=True):
        x = np.tanh(x @ kernel + bias)
    return linear(x, net.params["last"])


def cnn(net, x):
    conv = functools.partial(convolve, padding=1, mode="wrap")
    x = np.tanh(conv(x, net.params["first"]))
    x = np.tanh(conv(x, net.params["strided1"], 2))
    x = np.tanh(conv(x, net.params["strided2"], 2))
    stack = net.params["hidden"]["conv"]
    for kernel, bias in zip(stack["kernel"], stack["bias"], strict=True):
        x = np.tanh(conv(x, {"kernel": kernel, "bias": bias}))
    x = pool(x, 2, 2, 0, np.mean)
    return linear(x.reshape(len(x), -1), net.params["last"])


def resnet(net, x):
    x = relu(net.conv("first", x, 1, 1))
    for stage in (1, 2, 3):
        block, stride = net[f"block{stage}_1"], 1 if stage == 1 else 2
        y = relu(block.conv("conv1", x, stride, 1))
        y = block.conv("conv2", y, 1, 1)
        x = relu(y + (block.conv("shortcut", x, stride) if stage > 1 else x))
    return linear(x.mean((1, 2)), net.params["last"])


def bottleneck_resnet(net, x):
    x = pool(relu(net.conv("first", x, 2, 3)), 3, 2, 1, np.max)
    for stage in (1, 2, 3, 4):
        block, stride = net[f"block{stage}_1"], 1 if stage == 1 else 2
        y = relu(block.conv("conv1", x))
        y = relu(block.conv("conv2", y, stride, 1))
        x = relu(block.conv("conv3", y) + block.conv("shortcut", x, stride))
    return linear(x.mean((1, 2)), net.params["last"])


def vgg(net, x):
    for stage, number in enumerate((2, 2, 3, 3, 3), 1):
        for layer in range(1, number + 1):
            x = relu(net.conv(f"conv{stage}_{layer}", x, 1, 1))
        x = pool(x, 2, 2, 0, np.max)
    x = x.reshape(len(x), -1)
    for name in ("linear1", "linear2"):
        x = relu(net.norm(f"{name}_norm", linear(x, net.params[name])))
    return linear(x, net.params["last"])


def efficientnet(net, x):
    x = silu(net.conv("first", x, 2, 1))
    for name, size, stride in [("1_1", 3, 1), ("2_1", 3, 2), ("2_2", 3, 1), ("3_1", 5, 2)]:
        block = net[f"block{name}"]
        y = x if name == "1_1" else silu(block.conv("expand", x))
        y = silu(block.conv("depthwise", y, stride, size // 2, y.shape[-1]))
        gate = silu(convolve(y.mean((1, 2), keepdims=True), block.params["squeeze"]))
        y = block.conv("project", y * sigmoid(convolve(gate, block.params["excite"])))
        x = x + y if x.shape == y.shape else y
    x = silu(net.conv("final", x))
    return linear(x.mean((1, 2)), net.params["last"])


def layer_norm(x, layer):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def deit(net, x):
    params = net.params
    x = convolve(x, params["embed"], 16).reshape(len(x), -1, 12) + params["position"]
    x = np.concatenate([np.broadcast_to(params["token"], (len(x), 1, 12)), x], axis=1)
    for index in range(2):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], params["hidden"])
        attention, y = block["attention"], layer_norm(x, block["norm1"])
        added = attention["out"]["bias"]
        for head in range(6):
            q, k, v = (
                y @ attention[name]["kernel"][head] + attention[name]["bias"][head]
                for name in ("query", "key", "value")
            )
            looked = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(2), axis=-1) @ v
            added = added + looked @ attention["out"]["kernel"][head]
        x = x + block["scale1"] * added
        y = gelu(linear(layer_norm(x, block["norm2"]), block["mlp_in"]))
        x = x + block["scale2"] * linear(y, block["mlp_out"])
    return linear(layer_norm(x, params["norm"])[:, 0], params["last"])


ORACLES = {
    "mlp7": mlp,
    "cnn1000": cnn,
    "resnet32": resnet,
    "vgg16": vgg,
    "efficientnet_b0": efficientnet,
    "resnet50": bottleneck_resnet,
    "deit_s": deit,
}


@functools.cache
def small(name):
    """A network, random variables of order 1 / sqrt(inputs), positive ones of norms, and images."""
    sizes, shape = CASES[name]
    model = models.create(name, 3, **sizes)
    noise = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key != "kernel":
            return noise.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        inputs = math.prod(leaf.shape[models.layout(path, leaf).batch_axes : -1])
        return (noise.standard_normal(leaf.shape) / math.sqrt(inputs)).astype(np.float32)

    images = noise.standard_normal((4, *shape)).astype(np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, jax.tree_util.tree_map_with_path(fill, variables), images


TRAINED = ("resnet32", "vgg16", "efficientnet_b0")
EVALUATED = ("mlp7", "cnn1000", "resnet32", "resnet50", "deit_s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train"), [(name, False) for name in EVALUATED] + [(name, True) for name in TRAINED]
)
def test_a_network_equals_numpy(name, train):
    model, variables, images = small(name)
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    logits, updated = jax.jit(apply)(variables, images)
    exact, pixels = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, images))
    net = Normed(exact["params"], exact.get("batch_stats"), train)
    expected = ORACLES[name](net, pixels)
    assert expected.shape == (4, 3)
    assert np.ptp(expected, axis=0).min() > 1e-3  # the images do matter
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    old, new = variables.get("batch_stats", {}), updated.get("batch_stats", {})
    same = [(a == b).all() for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)]
    assert same == [not train] * len(same)


def test_running_statistics_must_be_mutable_to_train():
    model, variables, images = small("resnet32")
    with pytest.raises(Exception, match="batch_stats"):
        model.apply(variables, images, train=True)


@pytest.mark.parametrize("name", CASES)
def test_one_image_without_a_batch(name):
    """As the Jacobian of an example calls a network."""
    model, variables, images = small(name)
    logits = jax.eval_shape(model.apply, variables, images[0])
    assert logits.shape == (3,)


def test_training_changes_nothing_without_normalization():
    for name in ("mlp7", "cnn1000", "deit_s"):
        model, variables, images = small(name)
        evaluated, trained = (
            jax.make_jaxpr(functools.partial(model.apply, train=train))(variables, images)
            for train in (False, True)
        )
        assert str(evaluated) == str(trained)
