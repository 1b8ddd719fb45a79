"""Files of sparse networks: what comes back is what was saved, and nothing else is accepted."""

import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import eoi_jax as eoi
from eoi_jax.typing import Layout

RNG = np.random.default_rng(0)
SIZES = (8, 16, 32, 64)
DTYPES = ["float16", "bfloat16", "float32", "float64", "bool"]
DTYPES += [f"{sign}int{size}" for sign in ("", "u") for size in SIZES]


def masked(params, density=0.5):
    """Random values on a random mask, for each kernel of a tree; NumPy draws without compiling."""

    def draw(path, leaf):
        if not eoi.masks.is_kernel(path, leaf):
            return jnp.array(True)
        return jnp.asarray(RNG.random(leaf.shape) < density)

    mask = jax.tree_util.tree_map_with_path(draw, params)
    values = jax.tree.map(
        lambda kept, leaf: jnp.asarray(RNG.normal(size=leaf.shape) * kept, leaf.dtype), mask, params
    )
    return values, mask


def bits(leaf):
    leaf = np.asarray(leaf)
    return leaf.dtype.name, leaf.shape, leaf.tobytes()


def same(tree, other):
    """Whether two trees are equal bit for bit, in structure, shapes and dtypes."""
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        bits(a) == bits(b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


def linen():
    return jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 5, 5, 2)))


def nnx_state():
    def build():
        rngs = nnx.Rngs(0)
        layers = (nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        return nnx.state(nnx.Sequential(*layers), (nnx.Param, nnx.BatchStat))

    return jax.eval_shape(build)


def equinox():
    def build():
        return eqx.filter(eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0)), eqx.is_inexact_array)

    return eqx.filter_eval_shape(build)


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 3)))


TREES = {
    "linen": linen,
    "params": lambda: linen()["params"],
    "nnx": nnx_state,
    "equinox": equinox,
    "haiku": haiku,
}


@pytest.mark.parametrize("kind", TREES)
def test_trees_of_every_framework_come_back_bit_for_bit(kind, tmp_path):
    shapes = TREES[kind]()
    params, mask = masked(shapes)
    path = tmp_path / "net.safetensors"
    eoi.save(path, params, mask)
    for like in (shapes, params):
        saved = eoi.load(path, like)
        assert isinstance(saved, eoi.SavedNetwork)
        assert same(saved.params, params)
        assert same(saved.mask, mask)
        leaves = jax.tree.leaves((saved.params, saved.mask))
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    layouts = jax.tree_util.tree_map_with_path(saved.layout, params)
    assert all(found == Layout() for found in jax.tree.leaves(layouts, is_leaf=is_layout))
    assert os.listdir(tmp_path) == ["net.safetensors"]


def is_layout(node):
    return isinstance(node, Layout)


@pytest.mark.parametrize("kind", ["linen", "haiku"])
def test_dicts_need_no_structure_to_come_back(kind, tmp_path):
    params, mask = masked(TREES[kind]())
    eoi.save(tmp_path / "net", params, mask)
    saved = eoi.load(str(tmp_path / "net"))
    assert same(saved.params, params)
    assert same(saved.mask, mask)


def test_names_are_paths_and_other_programs_read_them(tmp_path):
    params, mask = masked(nnx_state())
    eoi.save(tmp_path / "net", params, mask)
    linear = {"layers/0/kernel~mask", "layers/0/kernel", "layers/0/bias"}
    norm = {f"layers/1/{name}" for name in ("scale", "bias", "mean", "var")}
    plain = load_file(tmp_path / "net")
    assert set(plain) == linear | norm
    assert np.array_equal(plain["layers/0/kernel"], params["layers"][0]["kernel"][...])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, tmp_path, x64):
    values = np.array([[3, 0, 1], [0, 7, 0]]).astype(jnp.dtype(dtype))
    params = {"kernel": jnp.asarray(values), "one": jnp.asarray(values[0, 0])}
    mask = {"kernel": params["kernel"] != 0, "one": jnp.array(True)}
    eoi.save(tmp_path / "net", params, mask)
    saved = eoi.load(tmp_path / "net")
    assert same(saved.params, params)
    assert same(saved.mask, mask)


def test_every_bit_of_a_float_comes_back(tmp_path):
    """Zeros of both signs, subnormals, extremes."""
    info = jnp.finfo(jnp.bfloat16)
    special = [-0.0, 0.0, info.smallest_subnormal, -info.smallest_subnormal, info.max, info.min]
    params = {"kernel": jnp.asarray([special], jnp.bfloat16), "bias": np.float32([1e-45, -0.0])}
    mask = {"kernel": jnp.ones((1, 6), bool), "bias": jnp.array(True)}
    eoi.save(tmp_path / "net", params, mask)
    assert same(eoi.load(tmp_path / "net").params, params)


def test_the_order_in_memory_does_not_matter(tmp_path):
    kernel = np.arange(1.0, 7, dtype=np.float32).reshape(2, 3).T
    params, mask = {"kernel": kernel}, {"kernel": np.array([[1, 1, 1], [1, 1, 1]], bool).T}
    eoi.save(tmp_path / "net", params, mask)
    assert np.array_equal(eoi.load(tmp_path / "net").params["kernel"], kernel)


@pytest.mark.slow
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_of_any_shape_are_packed_and_unpacked(shape, density, seed, tmp_path_factory):
    """Against the definition: bit ``7 - i % 8`` of byte ``i // 8`` is weight ``i``."""
    path = tmp_path_factory.getbasetemp() / "packed"
    mask = np.random.default_rng(seed).random(shape) < density
    eoi.save(path, {"table": mask.astype(np.int8)}, {"table": mask})
    packed = load_file(path)["table~mask"]
    assert packed.nbytes == -(-mask.size // 8)
    for index, kept in enumerate(mask.ravel()):
        assert packed[index // 8] >> (7 - index % 8) & 1 == kept
    saved = eoi.load(path)
    assert same(saved.mask, {"table": mask})
    record = saved.metadata["leaves"]["table"]
    assert record["kept"] == mask.sum()
    assert record["density"] == (mask.mean() if mask.size else 1.0)


def test_a_mask_takes_a_thirty_second_of_the_weights(tmp_path):
    params, mask = masked({"kernel": jax.ShapeDtypeStruct((256, 512), "float32")}, 0.1)
    eoi.save(tmp_path / "net", params, mask)
    header = 1024
    assert 0 < os.path.getsize(tmp_path / "net") - 256 * 512 * (4 + 1 / 8) < header


# ------------------------------------------------------------------ records


def test_what_is_recorded(tmp_path):
    """The error of a linear layer against NumPy in float64, versions and the user's."""
    params, mask = masked({"dense": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}})
    eoi.save(tmp_path / "net", params, mask, metadata={"step": 3, "names": ["ä", None]})
    found = eoi.load(tmp_path / "net").metadata
    matrix = np.asarray(params["dense"]["kernel"], np.float64)
    kept = int(mask["dense"]["kernel"].sum())
    error = found["leaves"]["dense/kernel"].pop("orthogonality_error")
    digests = found.pop("sha256")
    assert set(digests) == {"records", "tensors"}
    assert digests["tensors"] == {
        name: hashlib.sha256(value.tobytes()).hexdigest()
        for name, value in load_file(tmp_path / "net").items()
    }
    assert abs(error - np.abs(matrix.T @ matrix - np.eye(3)).max()) < 1e-5
    assert found == {
        "format": 1,
        "versions": {"eoi_jax": eoi.__version__, "jax": jax.__version__},
        "user": {"step": 3, "names": ["ä", None]},
        "leaves": {
            "dense/bias": {"dtype": "float32", "shape": [3]},
            "dense/kernel": {
                "dtype": "float32",
                "shape": [5, 3],
                "kept": kept,
                "density": kept / 15,
            },
        },
    }


def test_a_layout_is_recorded_and_read_by(tmp_path):
    """Two layers of a stack, the second twice an orthogonal matrix: its Gram matrix is 4 I."""
    kernel = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
    params, mask = {"kernel": kernel}, {"kernel": kernel != 0}
    eoi.save(tmp_path / "net", params, mask)
    assert "orthogonality_error" not in eoi.load(tmp_path / "net").metadata["leaves"]["kernel"]
    eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(batch_axes=1))
    record = eoi.load(tmp_path / "net").metadata["leaves"]["kernel"]
    assert record["layout"] == {"batch_axes": 1, "groups": 1, "transposed": False}
    assert record["orthogonality_error"] == 3
    saved = eoi.load(tmp_path / "net", like=params)
    assert jax.tree_util.tree_map_with_path(saved.layout, params)["kernel"] == Layout(batch_axes=1)
    with refuses("layout(kernel).batch_axes=3"):
        eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(batch_axes=3))


def test_the_axes_of_a_layout_are_recorded(tmp_path):
    """Two heads, each an isometry; read as one matrix they are not."""
    kernel = jnp.moveaxis(jnp.stack([jnp.eye(4, 2), jnp.eye(4, 2)]), 0, 1)
    params, mask = {"kernel": kernel}, {"kernel": kernel != 0}
    layout = Layout(in_axis=0, out_axis=2, batch_axis=1)
    eoi.save(tmp_path / "net", params, mask, layout=lambda *_: layout)
    saved = eoi.load(tmp_path / "net", like=params)
    assert saved.metadata["leaves"]["kernel"]["orthogonality_error"] == 0
    found = saved.layout(jax.tree_util.tree_leaves_with_path(params)[0][0], kernel)
    assert spectrum_errors(params, found) == 0
    assert spectrum_errors(params, layout._replace(out_axis=(1, 2), batch_axis=())) == 1
    with refuses("layout(kernel).in_axis=3"):
        eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(in_axis=3))


def spectrum_errors(params, layout):
    [error] = eoi.spectrum.kernel_orthogonality_errors(params, layout=lambda *_: layout).values()
    return error


def orthogonal(*shape):
    return np.linalg.qr(RNG.normal(size=shape))[0].astype(np.float32)


def test_shapes_that_may_mean_several_things_have_no_error(tmp_path):
    """As a convolution of 2 x 3 taps six orthogonal matrices are 5 off; each alone is not."""
    params = {"heads": {"kernel": orthogonal(2, 3, 8, 8)}, "last": {"kernel": orthogonal(8, 4)}}
    mask = jax.tree.map(lambda leaf: leaf != 0, params)
    eoi.save(tmp_path / "net", params, mask)
    records = eoi.load(tmp_path / "net").metadata["leaves"]
    assert "orthogonality_error" not in records["heads/kernel"]
    assert records["last/kernel"]["orthogonality_error"] < 1e-5
    eoi.save(tmp_path / "net", params, mask, layout=lambda _, leaf: Layout(leaf.ndim - 2))
    records = eoi.load(tmp_path / "net").metadata["leaves"]
    assert records["heads/kernel"]["orthogonality_error"] < 1e-5


def test_leaves_that_are_no_kernels_are_not_measured(tmp_path):
    """And no layout is asked for them: that of the stacked kernel would not fit its biases."""
    shapes = {"kernel": (2, 3, 3), "bias": (2, 3), "embedding": (5, 3), "table": (1,) * 6}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    mask = jax.tree.map(lambda leaf: leaf != 0, params)
    eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(batch_axes=1))
    records = eoi.load(tmp_path / "net").metadata["leaves"]
    for entry in ("layout", "orthogonality_error"):
        assert {name for name, record in records.items() if entry in record} == {"kernel"}


def test_layouts_are_for_the_whole_tree(tmp_path):
    params = {"params": {"kernel": ONES}}
    eoi.save(tmp_path / "net", params, {"params": {"kernel": FULL}})
    saved = eoi.load(tmp_path / "net")
    with refuses("path='kernel'", "'params/kernel'", "saved.params"):
        eoi.budgets.uniform(saved.params["params"], 0.5, layout=saved.layout)


def test_errors_that_json_has_not_are_left_out(tmp_path):
    params = {"kernel": jnp.full((2, 2), 1e30)}
    eoi.save(tmp_path / "net", params, {"kernel": jnp.ones((2, 2), bool)})
    assert "orthogonality_error" not in eoi.load(tmp_path / "net").metadata["leaves"]["kernel"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 3, 2, 4), (3, 3, 4, 2), (1, 1, 2, 2)])
def test_errors_of_convolutions(shape, groups):
    """Against the matrix of the whole map on a grid, column by column, in float64."""
    *taps, inputs, outputs = shape
    kernel = RNG.normal(size=shape) * 0.5
    grid = [2 * size - 1 for size in taps]
    rows = []
    for group in range(groups):
        part = kernel[..., group * outputs // groups : (group + 1) * outputs // groups]
        matrix = np.zeros((*grid, inputs, *grid, outputs // groups))
        for position in np.ndindex(*grid):
            for tap in np.ndindex(*taps):
                target = tuple((p + t) % n for p, t, n in zip(position, tap, grid, strict=True))
                matrix[(*position, slice(None), *target)] += part[tap]
        matrix = matrix.reshape(np.prod(grid) * inputs, -1)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.T
        rows.append(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())
    found = eoi.spectrum.kernel_orthogonality_errors(
        {"conv": {"kernel": kernel.astype(np.float32)}}, layout=lambda *_: Layout(groups=groups)
    )
    np.testing.assert_allclose(found["conv/kernel"], max(rows), rtol=1e-5)


def test_errors_of_matrices_stacks_and_empty_kernels():
    stack = RNG.normal(size=(2, 3, 4, 3)).astype(np.float32)
    tree = {"a": {"kernel": stack}, "b": {"kernel": stack[0, 0]}, "c": {"kernel": stack[:0, 0, 0]}}
    axes = {"a": 2, "b": 0, "c": 0}
    found = eoi.spectrum.kernel_orthogonality_errors(
        tree, layout=lambda path, leaf: Layout(axes[path[0].key])
    )
    expected = eoi.spectrum.orthogonality_error(stack)
    np.testing.assert_allclose(found["a/kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["b/kernel"], expected[0, 0], rtol=1e-6)
    assert found["c/kernel"] == 0


# ------------------------------------------------------------------ training goes on


def test_training_goes_on_as_if_nothing_had_been_saved(tmp_path):
    x, y = RNG.normal(size=(16, 6)).astype(np.float32), RNG.normal(size=(16, 4))
    params, mask = masked({"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)})
    eoi.save(tmp_path / "net", params, mask)
    saved = eoi.load(tmp_path / "net", like=params)

    def loss(params):
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    def trained(params, mask):
        tx = eoi.static_sparse(optax.adamw(0.1), mask)
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            params, state = step(params, state)
        return params, state

    went, goes = trained(params, mask), trained(saved.params, saved.mask)
    assert same(goes, went)
    assert not same(goes[0], params)
    assert (np.asarray(goes[0]["kernel"])[~np.asarray(mask["kernel"])] == 0).all()


# ------------------------------------------------------------------ what is not saved

ONES, FULL = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
HALF = jnp.asarray([[True, False, True], [False, False, True]])


class Pair(eqx.Module):
    value: jax.Array
    other: jax.Array


REFUSED = {
    "weights off the mask": (
        {"dense": {"kernel": ONES}},
        {"dense": {"kernel": HALF}},
        ["params[dense/kernel]", "3 weights off", "eoi.masks.apply(mask, params)"],
    ),
    "NaN": (
        {"kernel": ONES.at[0, 1].set(jnp.nan)},
        {"kernel": FULL},
        ["params[kernel]", "1 weights", "NaN"],
    ),
    "infinite bias": (
        {"bias": jnp.full(3, jnp.inf)},
        {"bias": jnp.array(True)},
        ["params[bias]", "3 weights"],
    ),
    "a mask that does not fit": ({"kernel": ONES}, {"kernel": FULL.T}, ["mask[kernel]", "(3, 2)"]),
    "no mask": ({"kernel": ONES}, {}, ["mask"]),
    "a mask of integers": ({"kernel": ONES}, {"kernel": ONES}, ["mask[kernel]", "float32"]),
    "a leaf that is masked as a whole": (
        {"b": ONES},
        {"b": jnp.array(False)},
        ["mask[b]", "False"],
    ),
    "a key": (
        {"key": jax.random.key(0)},
        {"key": jnp.array(True)},
        ["params[key]", "random key", "nnx.Param"],
    ),
    "a function": ({"act": jnp.tanh}, {"act": jnp.array(True)}, ["params[act]", "type"]),
    "a number": ({"scale": 2.0}, {"scale": jnp.array(True)}, ["params[scale]", "jnp.asarray"]),
    "complex weights": ({"w": ONES + 1j}, {"w": FULL}, ["params[w]", "complex64"]),
    "shapes alone": (
        {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")},
        {"kernel": FULL},
        ["params[kernel]", "shape"],
    ),
    "no name": (ONES, FULL, ["params[]"]),
    "an empty name": ({"": ONES}, {"": FULL}, ["params[]"]),
    "the name of the file's metadata": (
        {"__metadata__": ONES},
        {"__metadata__": FULL},
        ["params[__metadata__]"],
    ),
    "more keys than functions over trees can follow": (
        functools.reduce(lambda inner, _: {"a": inner}, range(101), ONES),
        functools.reduce(lambda inner, _: {"a": inner}, range(101), FULL),
        ["params[a/a/a", "101 keys", "100"],
    ),
    "a name that a terminal obeys": (
        {"\x1b[2J": ONES},
        {"\x1b[2J": FULL},
        [r"params[\x1b[2J]"],
    ),
    "half a character": ({"\ud800": ONES}, {"\ud800": FULL}, [r"params[\ud800]"]),
    "long doubles": ({"w": np.ones(2, np.longdouble)}, {"w": FULL[0, :2]}, ["params[w]", "float"]),
    "objects": ({"w": np.array([1, None])}, {"w": FULL[0, :2]}, ["params[w]", "object"]),
    "booleans of other bytes": (
        {"w": np.array([1, 2], np.uint8).view(bool)},
        {"w": jnp.array(True)},
        ["params[w]", "0 and 1"],
    ),
    "a mask of other bytes": (
        {"w": np.ones(2)},
        {"w": np.array([1, 2], np.uint8).view(bool)},
        ["params[w]", "0 and 1"],
    ),
    "a name within another": (
        {"a": Pair(ONES, ONES)},
        {"a": Pair(FULL, FULL)},
        ["params[a/other]", "value"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_saved(what, tmp_path):
    params, mask, named = REFUSED[what]
    with refuses(*named):
        eoi.save(tmp_path / "net", params, mask)
    assert not os.listdir(tmp_path)


DEEP = functools.reduce(lambda inner, _: [inner], range(10**4), [])
METADATA = [{"rate": float("nan")}, {"array": ONES}, {(1, 2): 3}, {1j}, 10**5000, DEEP]
CHANGED = [{1: "a"}, {"shape": (2, 3)}, {"a": [{None: 1}]}]


@pytest.mark.parametrize("metadata", METADATA + CHANGED, ids=lambda value: type(value).__name__)
def test_metadata_that_json_does_not_hold_or_would_change(metadata, tmp_path):
    with refuses("metadata"):
        eoi.save(tmp_path / "net", {"kernel": ONES}, {"kernel": FULL}, metadata=metadata)
    assert not os.listdir(tmp_path)


def test_a_traced_network_is_not_saved(tmp_path):
    with refuses("params[0]", "traced"):
        jax.jit(lambda kernel: eoi.save(tmp_path / "net", [kernel], [FULL]))(ONES)


def test_a_file_is_complete_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "net"
    with refuses("path=", tmp_path / "no" / "net", error=FileNotFoundError):
        eoi.save(tmp_path / "no" / "net", {"kernel": ONES}, {"kernel": FULL})
    eoi.save(path, {"kernel": ONES}, {"kernel": FULL})

    def fails(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="no space"):
            eoi.save(path, {"kernel": 2 * ONES}, {"kernel": FULL})
    assert os.listdir(tmp_path) == ["net"]
    assert same(eoi.load(path).params, {"kernel": ONES})
    eoi.save(path, {"kernel": 2 * ONES}, {"kernel": FULL})
    assert same(eoi.load(path).params, {"kernel": 2 * ONES})


def test_names_that_need_escapes_come_back(tmp_path):
    params = {"a/b": {"~": ONES}, "a": {"b/~": ONES + 1, "b~mask": ONES + 2, "b": ONES + 3}}
    params |= {"~1": ONES + 4, "a~1b": {"~": ONES + 5}}
    mask = jax.tree.map(lambda _: FULL, params)
    eoi.save(tmp_path / "net", params, mask)
    saved = eoi.load(tmp_path / "net")
    assert same(saved.params, params)
    assert same(saved.mask, mask)


# ------------------------------------------------------------------ what is not loaded


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Tensors and metadata of a good file, to be spoiled."""
    path = tmp_path_factory.mktemp("good") / "net"
    params = {"a": {"kernel": ONES * HALF, "bias": jnp.ones(3)}}
    eoi.save(path, params, {"a": {"kernel": HALF, "bias": jnp.array(True)}})
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["eoi_jax"])
    return load_file(path), header, path.read_bytes()


def spoiled(path, tensors, header):
    """A file of these records, without digests: those of the good file would not fit."""
    if isinstance(header, dict):
        header = {key: value for key, value in header.items() if key != "sha256"}
    save_file(tensors, path, {"eoi_jax": json.dumps(header)})
    return path


def test_the_good_file_is_good(written, tmp_path):
    _, header, content = written
    (tmp_path / "net").write_bytes(content)
    saved = eoi.load(tmp_path / "net")
    assert saved.metadata == header
    assert np.array_equal(saved.mask["a"]["kernel"], HALF)


KERNEL, MASK = "a/kernel", "a/kernel~mask"
BYTE = np.packbits(np.asarray(HALF))
NO_RECORDS = ["metadata"]
TENSORS = {
    "no mask": ({MASK: None}, ["['a/kernel~mask']"]),
    "no weights": ({KERNEL: None}, ["['a/kernel']"]),
    "one too many": ({"b": np.ones(1)}, ["['b']"]),
    "a mask too many": ({"a/bias~mask": BYTE}, ["['a/bias~mask']"]),
    "another shape": ({KERNEL: np.ones((3, 2), np.float32)}, ["a/kernel", "[3, 2]", "[2, 3]"]),
    "another dtype": ({KERNEL: np.ones((2, 3), np.int32)}, ["a/kernel", "int32", "float32"]),
    "a dtype of others": ({KERNEL: np.ones((2, 3), jnp.float8_e4m3fn)}, ["dtype", "float8"]),
    "a longer mask": ({MASK: np.append(BYTE, BYTE)}, ["a/kernel", "(2,)", "6 weights"]),
    "no bytes": ({MASK: BYTE[:0]}, ["a/kernel", "(0,)", "6 weights"]),
    "a mask of signed bytes": ({MASK: BYTE.view(np.int8)}, ["a/kernel", "int8"]),
    "bits beyond the end": ({MASK: BYTE | np.uint8(1)}, ["a/kernel", "bits after the end"]),
    "a bit more": ({MASK: BYTE | np.uint8(64)}, ["a/kernel", "4 weights", "3"]),
    "another bit": ({MASK: BYTE ^ np.uint8(0b11000000)}, ["a/kernel", "1 weights off"]),
    "a weight off the mask": (
        {KERNEL: np.ones((2, 3), np.float32)},
        ["a/kernel", "3 weights off"],
    ),
    "a NaN": ({"a/bias": np.full(3, np.nan, np.float32)}, ["a/bias", "NaN"]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_agree_with_the_records(what, written, tmp_path):
    (tensors, header, _), (changes, named) = written, TENSORS[what]
    changed = {name: value for name, value in (tensors | changes).items() if value is not None}
    with refuses(f"path='{tmp_path}", *named):
        eoi.load(spoiled(tmp_path / "net", changed, header))
    save_file(changed, tmp_path / "net", {"eoi_jax": json.dumps(header)})
    with refuses(f"path='{tmp_path}", *named):  # and says so though the digest differs as well
        eoi.load(tmp_path / "net")


LEAVES = {
    "another count": ({KERNEL: {"kept": 4}}, ["3 weights of a/kernel", "4"]),
    "another density": ({KERNEL: {"density": 0.4}}, ["a/kernel", "density 0.4"]),
    "no density": ({KERNEL: {"density": None}}, NO_RECORDS),
    "a count in words": ({KERNEL: {"kept": "three"}}, NO_RECORDS),
    "an unknown dtype": ({KERNEL: {"dtype": "float7"}}, NO_RECORDS),
    "another dtype": ({KERNEL: {"dtype": "float16"}}, ["a/kernel", "float16", "float32"]),
    "a layout of others": ({KERNEL: {"layout": {"axes": 1}}}, NO_RECORDS),
    "a layout in words": ({KERNEL: {"layout": {"groups": "two"}}}, NO_RECORDS),
    "no groups": ({KERNEL: {"layout": {"groups": 0}}}, NO_RECORDS),
    "a group": ({KERNEL: {"layout": {"groups": True}}}, NO_RECORDS),
    "half an axis": ({KERNEL: {"layout": {"batch_axes": 1.0}}}, NO_RECORDS),
    "an axis less": ({KERNEL: {"layout": {"batch_axes": -1}}}, NO_RECORDS),
    "all axes": ({KERNEL: {"layout": {"batch_axes": 2}}}, NO_RECORDS),
    "an axis twice": ({KERNEL: {"layout": {"in_axis": [0], "out_axis": [0]}}}, NO_RECORDS),
    "no list of axes": ({KERNEL: {"layout": {"in_axis": 0}}}, NO_RECORDS),
    "an axis in words": ({KERNEL: {"layout": {"in_axis": "0"}}}, NO_RECORDS),
    "nearly transposed": ({KERNEL: {"layout": {"transposed": 1}}}, NO_RECORDS),
    "an error in words": ({KERNEL: {"orthogonality_error": "0"}}, NO_RECORDS),
    "no error": ({KERNEL: {"orthogonality_error": float("nan")}}, NO_RECORDS),
    "a long error": ({KERNEL: {"orthogonality_error": 10**400}}, NO_RECORDS),
    "a shape of floats": ({KERNEL: {"shape": [2.0, 3.0]}}, NO_RECORDS),
    "a shape in words": ({KERNEL: {"shape": "ab"}}, NO_RECORDS),
    "another leaf": ({"a": {"dtype": "int8", "shape": []}}, NO_RECORDS),
}


@pytest.mark.parametrize("what", LEAVES)
def test_records_that_do_not_agree_with_the_tensors(what, written, tmp_path):
    (tensors, header, _), (changes, named) = written, LEAVES[what]
    leaves = dict(header["leaves"])
    for name, record in changes.items():
        leaves[name] = {**leaves.get(name, {}), **record}
    with refuses(f"path='{tmp_path}", *named):
        eoi.load(spoiled(tmp_path / "net", tensors, {**header, "leaves": leaves}))


HEADERS = [{}, [], 3, {"format": 1}, {"format": 1, "leaves": []}, {"format": 1, "leaves": {}}]
VERSIONS = ([], {}, {"eoi_jax": 1}, {"eoi_jax": "\x1b[2J"}, {"eoi_jax": "\ud800"}, "eoi_jax")


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_metadata_of_other_programs(header, written, tmp_path):
    with refuses(f"path='{tmp_path}", *NO_RECORDS):
        eoi.load(spoiled(tmp_path / "net", written[0], header))


@pytest.mark.parametrize("versions", VERSIONS, ids=ascii)
def test_versions_of_other_programs(versions, written, tmp_path):
    with refuses(f"path='{tmp_path}", *NO_RECORDS):
        eoi.load(spoiled(tmp_path / "net", written[0], {**written[1], "versions": versions}))


@pytest.mark.parametrize("text", ["", "{", "NaN", "[" * 100_000, "1" * 5000], ids=len)
def test_metadata_that_are_no_json(text, written, tmp_path):
    save_file(written[0], tmp_path / "net", {"eoi_jax": text})
    with refuses(f"path='{tmp_path}", *NO_RECORDS):
        eoi.load(tmp_path / "net")


def test_formats_of_the_future(written, tmp_path):
    with refuses(f"path='{tmp_path}", "format 2", "Update"):
        eoi.load(spoiled(tmp_path / "net", written[0], {**written[1], "format": 2}))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_without_masks(metadata, written, tmp_path):
    save_file(written[0], tmp_path / "net", metadata)
    with refuses(f"path='{tmp_path}", "masks", "eoi.masks.support"):
        eoi.load(tmp_path / "net")


def test_files_cut_short_or_of_another_kind(written, tmp_path):
    whole, path = written[2], tmp_path / "net"
    for content in (*(whole[:end] for end in (0, 7, 100, len(whole) - 1)), whole + b"0"):
        path.write_bytes(content)
        with refuses(f"path='{tmp_path}", "safetensors"):
            eoi.load(path)
    with pytest.raises(FileNotFoundError):
        eoi.load(tmp_path / "none")
    with refuses("path=", tmp_path, error=IsADirectoryError):
        eoi.load(tmp_path)


# ------------------------------------------------------------------ digests


@pytest.mark.slow
def test_every_bit_of_the_file_is_verified(written, tmp_path):
    """A changed bit is refused, or changed the way in which the same is written."""
    content, path = written[2], tmp_path / "net"
    path.write_bytes(content)
    good = eoi.load(path)
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        # Of the tensors all bits; of the header, which is longer, another one of each byte.
        for bit in range(8) if position >= start else [position % 8]:
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = eoi.load(path)
            except ValueError as error:
                message = str(error)
            else:
                assert position < start
                assert same(found[:2], good[:2])
                assert found.metadata == good.metadata
                message = str(path)
            assert str(path) in message
            assert message.isprintable()


def test_files_of_earlier_versions_are_read_with_a_warning(written, tmp_path):
    tensors, header, _ = written
    with pytest.warns(UserWarning, match="digests") as warned:
        saved = eoi.load(spoiled(tmp_path / "net", tensors, header))
    assert str(tmp_path / "net") in str(warned[0].message)
    assert warned[0].filename == __file__
    assert np.array_equal(saved.params["a"]["kernel"], tensors[KERNEL])
    kept = {key: value for key, value in header.items() if key != "sha256"}
    assert saved.metadata == kept
    # The key of the digests, changed by a bit, makes no earlier version.
    save_file(tensors, tmp_path / "net", {"eoi_jax": json.dumps(kept | {"qha256": {}})})
    with refuses(f"path='{tmp_path}", "metadata"):
        eoi.load(tmp_path / "net")


RECORDS = {
    "versions": {"eoi_jax": "0.0", "jax": "0.0"},
    "user": {"accuracy": 1.0},
    "leaves": {"a/kernel": {"orthogonality_error": 0.0}},
}


@pytest.mark.parametrize("key", RECORDS)
def test_records_that_no_tensor_tells_are_verified(key, written, tmp_path):
    tensors, header, _ = written
    changed = json.loads(json.dumps(header))
    for name, value in RECORDS[key].items():
        changed[key] = changed[key] or {}
        if key == "leaves":
            changed[key][name] |= value
        else:
            changed[key][name] = value
    save_file(tensors, tmp_path / "net", {"eoi_jax": json.dumps(changed)})
    with refuses(f"path='{tmp_path}", "metadata"):
        eoi.load(tmp_path / "net")


@pytest.mark.parametrize(
    "digests", [None, [], {}, {"records": ""}, {"records": "", "tensors": {}}], ids=str
)
def test_digests_of_others(digests, written, tmp_path):
    tensors, header, _ = written
    changed = json.dumps(header | {"sha256": digests})
    save_file(tensors, tmp_path / "net", {"eoi_jax": changed})
    with refuses(f"path='{tmp_path}"):
        eoi.load(tmp_path / "net")


# ------------------------------------------------------------------ files of strangers


STRANGE = {
    "as deep as the file is long": ("a/" * 200_000 + "a", "200001 keys"),
    "deeper than functions over trees can follow": ("a/" * 999 + "a", "1000 keys"),
    "one deeper than allowed": ("a/" * 100 + "a", "101 keys"),
    "without an escape": ("~", "'~'"),
    "with an escape of nothing": ("a/~2", "'a/~2'"),
    "with an escape at the end": ("a~0~", "'a~0~'"),
    "that erases the screen": ("\x1b[2J\x1b[Hfine", r"\x1b[2J"),
    "with a second line": ("a\nerror: none", r"a\nerror"),
    "that is read from the right": ("a\u202eb", r"\u202e"),
    "with an empty key": ("a//b", "'a//b'"),
    "within another": ("b/c", "'b/c'"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_names_of_strangers_are_refused_at_once(what, tmp_path):
    name, shown = STRANGE[what]
    leaves = {key: {"dtype": "float32", "shape": [2]} for key in ("b", name, "~0")}
    header = {"format": 1, "versions": {"eoi_jax": "0"}, "leaves": leaves, "user": None}
    tensors = dict.fromkeys(leaves, np.ones(2, np.float32))
    began = time.monotonic()
    with refuses(f"path='{tmp_path}", shown.replace("\\", "\\\\")) as raised:
        eoi.load(spoiled(tmp_path / "net", tensors, header))
    assert time.monotonic() - began < 5
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_a_hundred_keys_are_saved_and_loaded(tmp_path):
    params = functools.reduce(lambda inner, _: {"~": inner}, range(100), ONES)
    mask = jax.tree.map(lambda _: FULL, params)
    eoi.save(tmp_path / "net", params, mask)
    assert same(eoi.load(tmp_path / "net").params, params)


@pytest.mark.slow
def test_many_names_take_little_time(tmp_path):
    """Each differs from the next in its last key only, the worst for the check of clashes."""
    beginning = "/".join(["layer"] * 98)
    params = {f"{beginning}/{number}": np.ones((), np.int8) for number in range(3000)}
    leaves = {name: {"dtype": "int8", "shape": []} for name in params}
    header = {"format": 1, "versions": {"eoi_jax": "0"}, "leaves": leaves, "user": None}
    spoiled(tmp_path / "net", params, header)
    began = time.monotonic()
    with pytest.warns(UserWarning, match="digests"):
        saved = eoi.load(tmp_path / "net")
    assert time.monotonic() - began < 10
    assert len(jax.tree.leaves(saved.params)) == 3000


def test_tensors_with_names_of_strangers_are_not_printed_as_they_are(written, tmp_path):
    tensors, header, _ = written
    strange = {f"\x1b[2J{number}" + "n" * 10**4: np.ones(1) for number in range(9)}
    with refuses(f"path='{tmp_path}", "4 more") as raised:
        eoi.load(spoiled(tmp_path / "net", tensors | strange, header))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 3000


def test_booleans_of_other_bytes_are_refused(tmp_path):
    eoi.save(tmp_path / "net", {"on": np.array([True, False])}, {"on": np.array(True)})
    with safe_open(tmp_path / "net", "numpy") as file:
        header = json.loads(file.metadata()["eoi_jax"])
    for value in (2, 255):
        tensors = {"on": np.array([1, value], np.uint8).view(bool)}
        with refuses(f"path='{tmp_path}", "on", "0 and 1"):
            eoi.load(spoiled(tmp_path / "net", tensors, header))


# ------------------------------------------------------------------ two writers, a full disk


def test_many_writers_of_one_path_all_succeed(tmp_path):
    errors = []

    def write(number):
        try:
            for _ in range(5):
                eoi.save(tmp_path / "net", {"b": np.full(50_000, number)}, {"b": np.array(True)})
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    with safe_open(tmp_path / "net", "numpy") as file:
        assert np.ptp(file.get_tensor("b")) == 0
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such limit")
def test_a_full_disk_is_an_oserror(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            eoi.save(tmp_path / "net", {"b": np.ones(10**5, np.float32)}, {"b": np.array(True)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------ zeros, and arrays of others


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_weight_of_any_size_is_kept_by_support_and_saved(dtype, tmp_path, x64):
    """Also what some backends take for zero: the smallest numbers, of either sign."""
    info = jnp.finfo(dtype)
    small = [info.smallest_subnormal, -info.smallest_subnormal, info.tiny / 2, 0.0, -0.0, 1.0]
    values = np.array([small]).astype(jnp.dtype(dtype))
    expected = [[True, True, True, False, False, True]]
    for array in (jnp.asarray(values), values):
        for support in (eoi.masks.support, jax.jit(eoi.masks.support)):
            mask = support({"kernel": array})
            assert mask["kernel"].tolist() == expected
        eoi.save(tmp_path / "net", {"kernel": array}, mask)
        saved = eoi.load(tmp_path / "net")
        assert bits(saved.params["kernel"]) == bits(values)
        with refuses("params[kernel]", "3 weights off"):
            eoi.save(
                tmp_path / "net", {"kernel": array}, {"kernel": np.array([[False] * 5 + [True]])}
            )
    only = {"kernel": jnp.asarray(values[:, :1])}
    assert eoi.masks.support(only)["kernel"].all(), "not a kernel of zeros only"


FOREIGN = {
    "big-endian": lambda values: values.astype(values.dtype.newbyteorder(">")),
    "little-endian": lambda values: values.astype(values.dtype.newbyteorder("<")),
    "read-only": lambda values: np.broadcast_to(values, values.shape),
    "with gaps": lambda values: np.repeat(values, 2, axis=-1)[..., ::2],
    "backwards": lambda values: values[::-1].copy()[::-1],
    "by columns": np.asfortranarray,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_arrays_of_numpy_are_saved_as_their_values(what, tmp_path, x64):
    kernel = np.arange(6.0).reshape(2, 3)
    values = {name: {"kernel": kernel.astype(name)} for name in ("f2", "f4", "f8", "i2", "u8")}
    mask = jax.tree.map(lambda leaf: FOREIGN[what](leaf != 0), values)
    eoi.save(tmp_path / "net", jax.tree.map(FOREIGN[what], values), mask)
    saved = eoi.load(tmp_path / "net")
    assert same(saved.params, values)
    assert same(saved.mask, jax.tree.map(np.ascontiguousarray, mask))
    records = saved.metadata["leaves"]
    assert records["f4/kernel"]["orthogonality_error"] == np.max(kernel @ kernel.T - np.eye(2))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["EOI_BOMB"],)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("EOI_BOMB", str(tmp_path / "went off"))
    path = tmp_path / "net"
    for write in (pickle.dump, lambda value, file: np.save(file, np.array([value], object))):
        with path.open("wb") as file:
            write(Bomb(), file)
        with refuses(f"path='{tmp_path}", "safetensors"):
            eoi.load(path)
    assert os.listdir(tmp_path) == ["net"]


def test_wide_weights_are_not_narrowed(tmp_path, x64):
    eoi.save(tmp_path / "net", {"kernel": np.ones((2, 2))}, {"kernel": np.ones((2, 2), bool)})
    with jax.enable_x64(False), refuses(f"path='{tmp_path}", "float64", "JAX_ENABLE_X64=1"):
        eoi.load(tmp_path / "net")
    assert eoi.load(tmp_path / "net").params["kernel"].dtype == "float64"


# ------------------------------------------------------------------ like


MESHES = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import eoi_jax as eoi

path = pathlib.Path(sys.argv[1]) / "net"
rng = np.random.default_rng(0)
values = {"kernel": rng.normal(size=(8, 12)), "bias": rng.normal(size=12), "w": np.ones((2, 4, 6))}
values = {name: np.float32(value * (value > 0)) for name, value in values.items()}
mask = eoi.masks.support(values)
layout = lambda path, leaf: eoi.typing.Layout(batch_axes=leaf.ndim - 2)
eoi.save(path, values, mask, layout=layout)
expected = path.read_bytes()
specs = {"kernel": P("a", "b"), "bias": P("b"), "w": P("a", None, "b")}
for axis_types in ((AxisType.Explicit,) * 2, (AxisType.Auto,) * 2):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=axis_types)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(values, shardings)
    for placed in (mask, eoi.masks.support(params)):
        eoi.save(path, params, placed, layout=layout)
        assert path.read_bytes() == expected
    with jax.set_mesh(mesh):
        eoi.save(path, params, mask, layout=layout)
        assert path.read_bytes() == expected

    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in values.items()
    }
    for like in (params, shapes):
        saved = eoi.load(path, like=like)
        for name, leaf in saved.params.items():
            assert leaf.sharding == shardings[name], (name, leaf.sharding)
            assert np.array_equal(leaf, values[name])
            if np.ndim(mask[name]):
                assert saved.mask[name].sharding == shardings[name]
                assert np.array_equal(saved.mask[name], mask[name])
        assert saved.mask["bias"].shape == ()
    for like in (values, jax.eval_shape(lambda: values)):  # which ask for no place
        assert all(len(leaf.devices()) == 1 for leaf in eoi.load(path, like=like).params.values())
"""


@pytest.mark.slow
def test_sharded_arrays_are_saved_as_on_one_device_and_keep_their_sharding(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", MESHES, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_like_has_to_fit(tmp_path):
    params = {"a": {"kernel": ONES * HALF, "bias": jnp.ones(3)}}
    eoi.save(tmp_path / "net", params, {"a": {"kernel": HALF, "bias": jnp.array(True)}})

    layer = params["a"]
    turned = jax.ShapeDtypeStruct((3, 2), "float32")
    half = jax.ShapeDtypeStruct((2, 3), "float16")
    for like, named in [
        ({"a": layer | {"kernel": turned}}, ["like[a/kernel]", "(3, 2)", "(2, 3)"]),
        ({"a": layer | {"kernel": half}}, ["like[a/kernel]", "float16", "float32"]),
        ({"a": layer | {"scale": ONES}}, ["like[a/scale]", "'a/bias'"]),
        ({"b": layer}, ["like[b/bias]"]),
        ({"a": {"bias": layer["bias"]}}, ["like", "a/kernel", "1"]),
        (layer["kernel"], ["like[]"]),
    ]:
        with refuses(*named):
            eoi.load(tmp_path / "net", like)
