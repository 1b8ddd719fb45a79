"""Files of sparse networks: what comes back is what was saved, and nothing else is accepted."""

import functools
import json
import os
import pickle

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import eoi_jax as eoi
from eoi_jax import serialization
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
        lambda own, leaf: jnp.asarray(RNG.normal(size=leaf.shape) * own, leaf.dtype), mask, params
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
    assert all(own == Layout() for own in jax.tree.leaves(layouts, is_leaf=is_layout))
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
    own = {"layers/0/kernel~mask", "layers/0/kernel", "layers/0/bias"}
    norm = {f"layers/1/{name}" for name in ("scale", "bias", "mean", "var")}
    plain = load_file(tmp_path / "net")
    assert set(plain) == own | norm
    assert np.array_equal(plain["layers/0/kernel"], params["layers"][0]["kernel"].get_value())


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
    """The error of a linear layer against NumPy in float64, versions and the user's own."""
    params, mask = masked({"dense": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}})
    eoi.save(tmp_path / "net", params, mask, metadata={"step": 3, "names": ["ä", None]})
    found = eoi.load(tmp_path / "net").metadata
    matrix = np.asarray(params["dense"]["kernel"], np.float64)
    kept = int(mask["dense"]["kernel"].sum())
    error = found["leaves"]["dense/kernel"].pop("orthogonality_error")
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
    with pytest.raises(ValueError, match="batch_axes=3 is outside"):
        eoi.save(tmp_path / "net", params, mask, layout=lambda *_: Layout(batch_axes=3))


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
    assert {name for name, own in records.items() if "layout" in own} == {"kernel"}
    assert {name for name, own in records.items() if "orthogonality_error" in own} == {"kernel"}


def test_layouts_are_for_the_whole_tree(tmp_path):
    params = {"params": {"kernel": ONES}}
    eoi.save(tmp_path / "net", params, {"params": {"kernel": FULL}})
    saved = eoi.load(tmp_path / "net")
    with pytest.raises(ValueError, match=r"path='kernel' .* 'params/kernel'\. .* saved\.params"):
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
        own = kernel[..., group * outputs // groups : (group + 1) * outputs // groups]
        matrix = np.zeros((*grid, inputs, *grid, outputs // groups))
        for position in np.ndindex(*grid):
            for tap in np.ndindex(*taps):
                target = tuple((p + t) % n for p, t, n in zip(position, tap, grid, strict=True))
                matrix[(*position, slice(None), *target)] += own[tap]
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
        r"params\[dense/kernel\] has 3 weights off its mask .* eoi.masks.apply\(mask, params\)",
    ),
    "NaN": ({"kernel": ONES.at[0, 1].set(jnp.nan)}, {"kernel": FULL}, "has 1 weights .* NaN"),
    "infinite bias": ({"bias": jnp.full(3, jnp.inf)}, {"bias": jnp.array(True)}, "has 3 weights"),
    "a mask that does not fit": ({"kernel": ONES}, {"kernel": FULL.T}, r"mask\[kernel\] has shape"),
    "no mask": ({"kernel": ONES}, {}, "mask has the structure"),
    "a mask of integers": ({"kernel": ONES}, {"kernel": ONES}, "outside {bool}"),
    "a leaf that is masked as a whole": ({"b": ONES}, {"b": jnp.array(False)}, "outside {True}"),
    "a key": (
        {"key": jax.random.key(0)},
        {"key": jnp.array(True)},
        r"params\[key\] is a random key, .* Save parameters only",
    ),
    "a function": ({"act": jnp.tanh}, {"act": jnp.array(True)}, "outside the arrays"),
    "a number": ({"scale": 2.0}, {"scale": jnp.array(True)}, "jnp.asarray of a number"),
    "complex weights": ({"w": ONES + 1j}, {"w": FULL}, r"params\[w\] has dtype complex64, outside"),
    "shapes alone": (
        {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")},
        {"kernel": FULL},
        "is a shape without values",
    ),
    "no name": (ONES, FULL, "outside the leaves that have a name"),
    "an empty name": ({"": ONES}, {"": FULL}, "outside the leaves that have a name"),
    "the name of the file's own": ({"__metadata__": ONES}, {"__metadata__": FULL}, "have a name"),
    "a name within another": (
        {"a": Pair(ONES, ONES)},
        {"a": Pair(FULL, FULL)},
        r"params\[a/other\] .* another has this name or a part of it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_saved(what, tmp_path):
    params, mask, message = REFUSED[what]
    path = tmp_path / "net"
    with pytest.raises(ValueError, match=message):
        eoi.save(path, params, mask)
    assert not os.listdir(tmp_path)


DEEP = functools.reduce(lambda inner, _: [inner], range(10**4), [])
METADATA = [{"rate": float("nan")}, {"array": ONES}, {(1, 2): 3}, {1j}, 10**5000, DEEP]
CHANGED = [{1: "a"}, {"shape": (2, 3)}, {"a": [{None: 1}]}]


@pytest.mark.parametrize("metadata", METADATA, ids=lambda own: type(own).__name__)
def test_metadata_that_json_does_not_hold(metadata, tmp_path):
    with pytest.raises(ValueError, match="is outside what JSON holds"):
        eoi.save(tmp_path / "net", {"kernel": ONES}, {"kernel": FULL}, metadata=metadata)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("metadata", CHANGED, ids=str)
def test_metadata_that_json_would_change(metadata, tmp_path):
    with pytest.raises(ValueError, match="is outside what JSON gives back as it was"):
        eoi.save(tmp_path / "net", {"kernel": ONES}, {"kernel": FULL}, metadata=metadata)
    assert not os.listdir(tmp_path)


def test_a_traced_network_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="is being traced"):
        jax.jit(lambda kernel: eoi.save(tmp_path / "net", [kernel], [FULL]))(ONES)


def test_a_file_is_complete_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "net"
    with pytest.raises(FileNotFoundError, match="folder that does not exist"):
        eoi.save(tmp_path / "no" / "net", {"kernel": ONES}, {"kernel": FULL})
    eoi.save(path, {"kernel": ONES}, {"kernel": FULL})

    def fails(tensors, name, metadata):
        save_file(dict(list(tensors.items())[:1]), name, metadata)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "save_file", fails)
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
    save_file(tensors, path, {"eoi_jax": json.dumps(header)})
    return path


def test_the_good_file_is_good(written, tmp_path):
    tensors, header, _ = written
    saved = eoi.load(spoiled(tmp_path / "net", tensors, header))
    assert saved.metadata == header
    assert np.array_equal(saved.mask["a"]["kernel"], HALF)


KERNEL, MASK = "a/kernel", "a/kernel~mask"
BYTE = np.packbits(np.asarray(HALF))
TENSORS = {
    "no mask": ({MASK: None}, r"lacks the tensors \['a/kernel~mask'\]"),
    "no weights": ({KERNEL: None}, r"lacks the tensors \['a/kernel'\]"),
    "one too many": ({"b": np.ones(1)}, r"has \['b'\] too many"),
    "a mask too many": ({"a/bias~mask": BYTE}, r"has \['a/bias~mask'\] too many"),
    "another shape": ({KERNEL: np.ones((3, 2), np.float32)}, r"shape \[3, 2\]; .* \[2, 3\] were"),
    "another dtype": ({KERNEL: np.ones((2, 3), np.int32)}, "has a/kernel of dtype int32"),
    "a dtype of others": ({KERNEL: np.ones((2, 3), jnp.float8_e4m3fn)}, "dtype that no sparse"),
    "a longer mask": ({MASK: np.append(BYTE, BYTE)}, r"shape \(2,\); its 6 weights need uint8"),
    "no bytes": ({MASK: BYTE[:0]}, r"shape \(0,\); its 6 weights"),
    "a mask of signed bytes": ({MASK: BYTE.view(np.int8)}, "dtype int8"),
    "bits beyond the end": ({MASK: BYTE | np.uint8(1)}, "bits after the end of the mask"),
    "a bit more": ({MASK: BYTE | np.uint8(64)}, "keeps 4 weights of a/kernel; 3"),
    "another bit": ({MASK: BYTE ^ np.uint8(0b11000000)}, "has 1 weights off its mask"),
    "a weight off the mask": ({KERNEL: np.ones((2, 3), np.float32)}, "has 3 weights off its mask"),
    "a NaN": ({"a/bias": np.full(3, np.nan, np.float32)}, "infinite or NaN"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_agree_with_the_records(what, written, tmp_path):
    (tensors, header, _), (changes, message) = written, TENSORS[what]
    changed = {name: own for name, own in (tensors | changes).items() if own is not None}
    with pytest.raises(ValueError, match=message) as error:
        eoi.load(spoiled(tmp_path / "net", changed, header))
    assert f"path='{tmp_path}" in str(error.value)


LEAVES = {
    "another count": ({KERNEL: {"kept": 4}}, "keeps 3 weights of a/kernel; 4"),
    "another density": ({KERNEL: {"density": 0.4}}, "density 0.4 were recorded"),
    "no density": ({KERNEL: {"density": None}}, "has metadata that are not"),
    "a count in words": ({KERNEL: {"kept": "three"}}, "has metadata that are not"),
    "an unknown dtype": ({KERNEL: {"dtype": "float7"}}, "has metadata that are not"),
    "another dtype": ({KERNEL: {"dtype": "float16"}}, "float16 and .* were recorded"),
    "a layout of others": ({KERNEL: {"layout": {"axes": 1}}}, "has metadata that are not"),
    "a layout in words": ({KERNEL: {"layout": {"groups": "two"}}}, "has metadata that are not"),
    "no groups": ({KERNEL: {"layout": {"groups": 0}}}, "has metadata that are not"),
    "a group": ({KERNEL: {"layout": {"groups": True}}}, "has metadata that are not"),
    "half an axis": ({KERNEL: {"layout": {"batch_axes": 1.0}}}, "has metadata that are not"),
    "an axis less": ({KERNEL: {"layout": {"batch_axes": -1}}}, "has metadata that are not"),
    "all axes": ({KERNEL: {"layout": {"batch_axes": 2}}}, "has metadata that are not"),
    "nearly transposed": ({KERNEL: {"layout": {"transposed": 1}}}, "has metadata that are not"),
    "an error in words": ({KERNEL: {"orthogonality_error": "0"}}, "has metadata that are not"),
    "no error": ({KERNEL: {"orthogonality_error": float("nan")}}, "has metadata that are not"),
    "a long error": ({KERNEL: {"orthogonality_error": 10**400}}, "has metadata that are not"),
    "a shape of floats": ({KERNEL: {"shape": [2.0, 3.0]}}, "has metadata that are not"),
    "a shape in words": ({KERNEL: {"shape": "ab"}}, "has metadata that are not"),
    "another leaf": ({"a": {"dtype": "int8", "shape": []}}, "has metadata that are not"),
}


@pytest.mark.parametrize("what", LEAVES)
def test_records_that_do_not_agree_with_the_tensors(what, written, tmp_path):
    (tensors, header, _), (changes, message) = written, LEAVES[what]
    leaves = dict(header["leaves"])
    for name, own in changes.items():
        leaves[name] = {**leaves.get(name, {}), **own}
    with pytest.raises(ValueError, match=message):
        eoi.load(spoiled(tmp_path / "net", tensors, {**header, "leaves": leaves}))


HEADERS = [{}, [], 3, {"format": 1}, {"format": 1, "leaves": []}, {"format": 1, "leaves": {}}]
VERSIONS = ([], {}, {"eoi_jax": 1}, {"eoi_jax": "\x1b[2J"}, {"eoi_jax": "\ud800"}, "eoi_jax")


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_metadata_of_other_programs(header, written, tmp_path):
    with pytest.raises(ValueError, match="has metadata that are not those of a sparse network"):
        eoi.load(spoiled(tmp_path / "net", written[0], header))


@pytest.mark.parametrize("versions", VERSIONS, ids=ascii)
def test_versions_of_other_programs(versions, written, tmp_path):
    with pytest.raises(ValueError, match="has metadata that are not those of a sparse network"):
        eoi.load(spoiled(tmp_path / "net", written[0], {**written[1], "versions": versions}))


@pytest.mark.parametrize("text", ["", "{", "NaN", "[" * 100_000, "1" * 5000], ids=len)
def test_metadata_that_are_no_json(text, written, tmp_path):
    save_file(written[0], tmp_path / "net", {"eoi_jax": text})
    with pytest.raises(ValueError, match="has metadata that are not those of a sparse network"):
        eoi.load(tmp_path / "net")


def test_formats_of_the_future(written, tmp_path):
    with pytest.raises(ValueError, match=r"has format 2, outside \{1\}\. Update"):
        eoi.load(spoiled(tmp_path / "net", written[0], {**written[1], "format": 2}))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_without_masks(metadata, written, tmp_path):
    save_file(written[0], tmp_path / "net", metadata)
    with pytest.raises(ValueError, match=r"has no masks: .* eoi\.masks\.support"):
        eoi.load(tmp_path / "net")


def test_files_cut_short_or_of_another_kind(written, tmp_path):
    whole, path = written[2], tmp_path / "net"
    for content in (*(whole[:end] for end in (0, 7, 100, len(whole) - 1)), whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no complete safetensors file"):
            eoi.load(path)
    with pytest.raises(FileNotFoundError):
        eoi.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        eoi.load(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["EOI_BOMB"],)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("EOI_BOMB", str(tmp_path / "went off"))
    path = tmp_path / "net"
    for write in (pickle.dump, lambda own, file: np.save(file, np.array([own], object))):
        with path.open("wb") as file:
            write(Bomb(), file)
        with pytest.raises(ValueError, match="is no complete safetensors file"):
            eoi.load(path)
    assert os.listdir(tmp_path) == ["net"]


def test_wide_weights_are_not_narrowed(tmp_path, x64):
    eoi.save(tmp_path / "net", {"kernel": np.ones((2, 2))}, {"kernel": np.ones((2, 2), bool)})
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"float64.*JAX_ENABLE_X64=1"):
        eoi.load(tmp_path / "net")
    assert eoi.load(tmp_path / "net").params["kernel"].dtype == "float64"


# ------------------------------------------------------------------ like


def test_like_has_to_fit(tmp_path):
    params = {"a": {"kernel": ONES * HALF, "bias": jnp.ones(3)}}
    eoi.save(tmp_path / "net", params, {"a": {"kernel": HALF, "bias": jnp.array(True)}})

    def refuses(like, message):
        with pytest.raises(ValueError, match=message):
            eoi.load(tmp_path / "net", like)

    own = params["a"]
    turned = jax.ShapeDtypeStruct((3, 2), "float32")
    half = jax.ShapeDtypeStruct((2, 3), "float16")
    refuses({"a": own | {"kernel": turned}}, r"like\[a/kernel\] has shape \(3, 2\).*\(2, 3\)")
    refuses({"a": own | {"kernel": half}}, r"like\[a/kernel\] .* float16, but .* float32")
    refuses({"a": own | {"scale": ONES}}, r"like\[a/scale\] is not in .* outside \['a/bias', ")
    refuses({"b": own}, r"like\[b/bias\] is not in")
    refuses({"a": {"bias": own["bias"]}}, r"like has no leaf a/kernel, one of 1 that only")
    refuses(own["kernel"], "like.* outside the leaves that have a name")
