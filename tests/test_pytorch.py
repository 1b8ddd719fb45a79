"""Saved networks in PyTorch: the same logits, the same masks, and training that keeps them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import refuses
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import eoi_jax as eoi
from eoi_jax.typing import Layout
from experiments import models, pytorch

STACKS = ("hidden",)
MODULES = {"mlp7": pytorch.Mlp, "resnet32": pytorch.ResNet}


def network_of(name, seed=0):
    """Weights, statistics and scales, all of them random: nothing is 0 or 1 that need not be."""
    rng = np.random.default_rng(seed)
    model, shape = models.create(name), models.input_shape(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def draw(path, leaf):
        last = path[-1].key
        if last == "kernel":
            fan_in = np.prod(leaf.shape[:-1]) / (leaf.shape[0] if len(leaf.shape) == 3 else 1)
            return rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5
        if last in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(size=leaf.shape) * 0.3

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, leaf: rng.random(leaf.shape) < 0.5 if path[-1].key == "kernel" else True,
        shapes,
    )
    mask = jax.tree.map(np.asarray, mask)
    variables = jax.tree.map(lambda kept, leaf: np.float32(kept * leaf), mask, variables)
    return model, variables, mask, rng.normal(size=(4, *shape)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_logits_are_the_same(name, tmp_path):
    model, variables, mask, images = network_of(name)
    eoi.save(tmp_path / "net", variables, mask, layout=models.layout)
    saved = eoi.load(tmp_path / "net", like=variables)
    expected = jax.jit(functools.partial(model.apply, train=False))(saved.params, images)

    twin = MODULES[name]().eval()
    network = pytorch.load(tmp_path / "net", stacks=STACKS)
    twin.load_state_dict(network.state_dict)  # strict: no name too many, none too few
    with torch.no_grad():
        found = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.std(expected) > 0.1
    assert np.ptp(expected, axis=0).min() > 0.01, "the images matter"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask) if leaf.ndim)
    assert sum(int(weight_mask.sum()) for weight_mask in network.masks.values()) == kept
    for name, weight_mask in network.masks.items():
        assert ((twin.get_parameter(name) != 0) == weight_mask).all()


def test_layers_one_by_one(tmp_path):
    """All axes of a kernel differ in length, and each entry is where PyTorch's formula has it."""
    rng = np.random.default_rng(0)
    kernels = {
        "linear": rng.normal(size=(3, 5)).astype(np.float32),
        "conv": rng.normal(size=(2, 3, 4, 6)).astype(np.float32),
        "narrow": rng.normal(size=(2, 4, 5)).astype(np.float32),
    }
    norm = {name: np.full(2, i, np.float32) for i, name in enumerate(("scale", "bias"))}
    stats = {name: np.full(2, i, np.float32) for i, name in enumerate(("mean", "var"), 2)}
    params = {
        **{name: {"kernel": kernel} for name, kernel in kernels.items()},
        "norm": norm,
        "scanned": {"dense": {"kernel": np.stack([kernels["linear"], -kernels["linear"]])}},
    }
    params["conv"]["bias"] = jnp.ones(6, jnp.bfloat16)
    variables = {"params": params, "batch_stats": {"norm": stats}}
    mask = jax.tree.map(lambda leaf: np.array(True), variables)
    mask["params"]["conv"]["kernel"] = kernels["conv"] > 0
    mask["params"]["scanned"]["dense"]["kernel"] = params["scanned"]["dense"]["kernel"] > 0
    eoi.save(tmp_path / "net", eoi.masks.apply(mask, variables), mask)

    found, masks = pytorch.load(tmp_path / "net", stacks=["scanned"])
    assert set(found) == {
        *("linear.weight", "conv.weight", "conv.bias", "narrow.weight"),
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        *("scanned.0.dense.weight", "scanned.1.dense.weight"),
    }
    assert set(masks) == {"conv.weight", "scanned.0.dense.weight", "scanned.1.dense.weight"}
    linear, conv, narrow = (found[f"{name}.weight"] for name in ("linear", "conv", "narrow"))
    for i, o in np.ndindex(3, 5):
        assert linear[o, i] == kernels["linear"][i, o]
    for h, w, i, o in np.ndindex(2, 3, 4, 6):
        assert conv[o, i, h, w] == max(kernels["conv"][h, w, i, o], 0)
        assert masks["conv.weight"][o, i, h, w] == (kernels["conv"][h, w, i, o] > 0)
    for w, i, o in np.ndindex(2, 4, 5):
        assert narrow[o, i, w] == kernels["narrow"][w, i, o]
    both = [found[f"scanned.{number}.dense.weight"] for number in (0, 1)]
    assert torch.equal(both[0] - both[1], linear)
    for number in (0, 1):
        assert torch.equal(masks[f"scanned.{number}.dense.weight"], both[number] > 0)
    names = ("weight", "bias", "running_mean", "running_var")
    assert [float(found[f"norm.{name}"][0]) for name in names] == [0, 1, 2, 3]
    assert found["conv.bias"].dtype == torch.bfloat16
    assert all(value.is_contiguous() for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_keeps_the_mask(momentum, tmp_path):
    """As ``static_sparse`` trains: SGD with momentum and decay, against three steps by hand."""
    rng = np.random.default_rng(1)
    mask = rng.random((6, 4)) < 0.5
    kernel = (rng.normal(size=(6, 4)) * mask).astype(np.float32)
    params = {"kernel": kernel, "bias": np.zeros(4, np.float32)}
    eoi.save(tmp_path / "net", params, {"kernel": mask, "bias": np.array(True)})
    network = pytorch.load(tmp_path / "net")
    layer = torch.nn.Linear(6, 4)
    layer.load_state_dict(network.state_dict)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    weight, bias, trace, bias_trace = kernel.astype(float), np.zeros(4), 0.0, 0.0
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.from_numpy(x)).square().mean().backward()
        pytorch.mask_(layer, network.masks, gradients=True)
        optimizer.step()
        pytorch.mask_(layer, network.masks)
        error = 2 * (x @ weight + bias) / 32
        trace = momentum * trace + (x.T @ error + 0.01 * weight) * mask
        bias_trace = momentum * bias_trace + error.sum(0) + 0.01 * bias
        weight, bias = weight - 0.1 * trace, bias - 0.1 * bias_trace
    found = layer.weight.detach().numpy().T
    assert (found[~mask] == 0).all()
    np.testing.assert_allclose(found, weight, atol=1e-6)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, atol=1e-6)


def test_gradients_off_the_mask_are_masked():
    layer = torch.nn.Linear(2, 2)
    mask = {"weight": torch.eye(2, dtype=torch.bool)}
    pytorch.mask_(layer, mask, gradients=True)  # there are none yet
    layer(torch.full((1, 2), torch.inf)).sum().backward()
    before = layer.weight.clone()
    pytorch.mask_(layer, mask, gradients=True)
    assert torch.equal(layer.weight.grad == 0, ~mask["weight"])
    assert torch.equal(layer.weight, before)
    with pytest.raises(AttributeError, match="nothing"):
        pytorch.mask_(layer, {"nothing": mask["weight"]})


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "net"
    kernel = np.eye(3, dtype=np.float32)
    save_file({"kernel": kernel}, path)
    with refuses("path", path):
        pytorch.load(path)
    eoi.save(path, {"kernel": kernel}, {"kernel": kernel != 0})
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"kept\\": 3', b'\\"kept\\": 4'))
    with refuses("path", path, "kernel", "3", "4"):
        pytorch.load(path)
    for other in (b"", content[:-1], b"PK" + content):
        path.write_bytes(other)
        with refuses("path", path):
            pytorch.load(path)
    with pytest.raises(FileNotFoundError):
        pytorch.load(tmp_path / "none")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of each kind of value, as bytes, tensors and header."""
    path = tmp_path_factory.mktemp("good") / "net"
    mask = np.array([[True, False, True], [False, False, True]])
    params = {name: {"kernel": mask.astype(name)} for name in ("float32", "float16", "int8")}
    params["bfloat16"] = {"kernel": jnp.asarray(mask, jnp.bfloat16)}
    params["on"] = np.array([True, False])
    masks = {name: {"kernel": mask} for name in params if name != "on"} | {"on": np.array(True)}
    eoi.save(path, params, masks, metadata={"accuracy": 0.5})
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["eoi_jax"])
    return path.read_bytes(), load_file(path), header


@pytest.mark.slow
def test_every_byte_of_the_file_is_verified(written, tmp_path):
    """A changed bit is refused, or changed the way in which the same is written."""
    content, path = written[0], tmp_path / "net"
    path.write_bytes(content)
    good = pytorch.load(path)
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = pytorch.load(path)
        except ValueError as error:
            message = str(error)
        else:
            assert position < start
            for tensors, expected in zip(found, good, strict=True):
                assert tensors.keys() == expected.keys()
                assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
            message = str(path)
        assert str(path) in message
        assert message.isprintable()


SMALL = np.array([[1, 0, 1], [0, 1e-40, 1]], np.float32)
SPOILED = {
    "NaN": ({"float32/kernel": np.float32([[1, 0, np.nan], [0, 0, 1]])}, ["float32/kernel", "NaN"]),
    "infinite": ({"float16/kernel": np.float16([[1, 0, 1], [0, 0, -np.inf]])}, ["float16/kernel"]),
    "infinite bfloat16": (
        {"bfloat16/kernel": np.full((2, 3), jnp.inf, jnp.bfloat16)},
        ["bfloat16/kernel"],
    ),
    "off the mask": ({"float16/kernel": np.ones((2, 3), np.float16)}, ["float16/kernel", "3"]),
    "integers off the mask": ({"int8/kernel": np.ones((2, 3), np.int8)}, ["int8/kernel", "3"]),
    "hardly off the mask": ({"float32/kernel": SMALL}, ["float32/kernel", "1 weights"]),
    "booleans of other bytes": ({"on": np.array([1, 2], np.uint8).view(bool)}, ["'on'", "0 and 1"]),
    "a mask of more bytes": ({"int8/kernel~mask": np.zeros(2, np.uint8)}, ["int8/kernel"]),
    "a mask of fewer bits": (
        {"int8/kernel~mask": np.zeros(1, np.uint8)},
        ["int8/kernel", "0", "3"],
    ),
    "no mask": ({"int8/kernel~mask": None}, ["int8/kernel~mask"]),
}


@pytest.mark.parametrize("what", SPOILED)
def test_tensors_that_eoi_load_would_refuse_are_refused(what, written, tmp_path):
    (_, tensors, header), (changes, named) = written, SPOILED[what]
    changed = {name: value for name, value in (tensors | changes).items() if value is not None}
    old = {key: value for key, value in header.items() if key != "sha256"}
    save_file(tensors, tmp_path / "net", {"eoi_jax": json.dumps(old)})
    pytorch.load(tmp_path / "net")  # of the first version, without digests
    save_file(changed, tmp_path / "net", {"eoi_jax": json.dumps(old)})
    with refuses("path", tmp_path / "net", *named):
        pytorch.load(tmp_path / "net")


@pytest.mark.parametrize("header", [[], 3, {"format": 1}, {"format": 1, "leaves": [1]}], ids=str)
def test_records_of_others_are_refused(header, tmp_path):
    save_file({"kernel": np.eye(3)}, tmp_path / "net", {"eoi_jax": json.dumps(header)})
    with refuses("path", tmp_path / "net"):
        pytorch.load(tmp_path / "net")


def test_two_leaves_of_one_name_in_pytorch_are_refused(tmp_path):
    params = {"norm": {"scale": np.ones(2), "weight": np.zeros(2)}}
    eoi.save(tmp_path / "net", params, jax.tree.map(lambda _: np.array(True), params))
    with refuses("path", "norm/weight", "norm.weight"):
        pytorch.load(tmp_path / "net")


def test_transposed_convolutions_are_refused(tmp_path):
    """Their weights have another order of axes: loaded as others are, they would be wrong."""
    params = {"up": {"kernel": np.ones((2, 2, 3, 3), np.float32)}}
    mask = {"up": {"kernel": np.array(True)}}
    eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(transposed=True))
    with refuses("path", "up/kernel", "transposed"):
        pytorch.load(tmp_path / "net")


def test_kernels_with_axes_of_their_own_are_refused(tmp_path):
    params = {"query": {"kernel": np.ones((4, 2, 2), np.float32)}}
    mask = {"query": {"kernel": np.array(True)}}
    layout = Layout(in_axis=0, out_axis=(1, 2))
    eoi.save(tmp_path / "net", params, mask, layout=lambda *_: layout)
    with refuses("path", "query/kernel", "in_axis", "out_axis"):
        pytorch.load(tmp_path / "net")


def test_tensors_are_saved_as_arrays(tmp_path):
    weight = torch.ones(2, 3)
    with refuses("params[kernel]", "Tensor", ".numpy()"):
        eoi.save(tmp_path / "net", {"kernel": weight}, {"kernel": np.ones((2, 3), bool)})
