"""Laws of masks: what they select, what they keep, and exact, uniform budgets."""

import functools
import itertools
import math

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, serialization
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import DictKey, GetAttrKey
from torch.nn.utils import prune

from eoi_jax import masks, networks
from eoi_jax._internal import selection
from eoi_jax._internal.arrays import nonzero
from eoi_jax.typing import Layout


def random_mask(seed, shape, density=0.3):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < density)


def example_mask():
    return {
        "conv": {"bias": jnp.array(True), "kernel": random_mask(0, (3, 2, 4, 5))},
        "layers": {"bias": jnp.array(True), "kernel": random_mask(1, (4, 6, 5))},
        "scale": jnp.array(True),
    }


def linen_params():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(4)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3,))(x)
            stack = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)
            return stack(name="layers")(x, None)[0]

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 5, 3)))["params"]
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


def nnx_params():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.rest = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def equinox_params():
    model = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array)


def haiku_params():
    def net(x):
        return hk.LayerNorm(-1, True, True)(hk.nets.MLP([4, 2])(x))

    return hk.without_apply_rng(hk.transform(net)).init(jax.random.key(0), jnp.ones((2, 3)))


# The leaves that the default predicate must select, by shape: nothing else in the tree may be.
FRAMEWORKS = {
    "linen": (linen_params, [(3, 3, 4), (3, 4, 4)]),
    "nnx": (nnx_params, [(3, 4), (4, 4)]),
    "equinox": (equinox_params, [(4, 3), (4, 4), (2, 4)]),
    "haiku": (haiku_params, [(3, 4), (4, 2)]),
}


@pytest.fixture(params=FRAMEWORKS, scope="module")
def framework(request):
    build, kernels = FRAMEWORKS[request.param]
    return build(), kernels


@pytest.mark.parametrize(
    ("path", "leaf", "expected"),
    [
        ((DictKey("kernel"),), jnp.ones((2, 3)), True),
        ((DictKey("mlp"), DictKey("w")), jnp.ones((2, 3)), True),
        ((GetAttrKey("weight"),), jnp.ones((2, 3), jnp.bfloat16), True),
        ((DictKey("kernel"), GetAttrKey("value")), jnp.ones((2, 3)), True),
        ((DictKey("kernel"),), jax.ShapeDtypeStruct((2, 3), jnp.float32), True),
        ((DictKey("bias"),), jnp.ones((2, 3)), False),
        ((DictKey("bias"), GetAttrKey("value")), jnp.ones((2, 3)), False),
        ((DictKey("kernel"), DictKey("value")), jnp.ones((2, 3)), False),
        ((DictKey("kernel"), DictKey("scale")), jnp.ones((2, 3)), False),
        ((DictKey("kernel"),), jnp.ones(3), False),
        ((DictKey("kernel"),), jnp.ones((2, 3), jnp.int8), False),
        ((DictKey("kernel"),), jnp.ones((2, 3), jnp.complex64), False),
        ((DictKey("kernel"),), "text", False),
        ((), jnp.ones((2, 3)), False),
    ],
)
def test_is_kernel(path, leaf, expected):
    assert masks.is_kernel(path, leaf) is expected


@pytest.mark.slow
def test_support_selects_the_kernels_of_each_framework(framework):
    params, kernels = framework
    mask = masks.support(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    chex.assert_type(jax.tree.leaves(mask), bool)
    found = [leaf.shape for leaf in jax.tree.leaves(mask) if leaf.ndim]
    assert sorted(found) == sorted(kernels)
    assert len(jax.tree.leaves(mask)) > len(kernels)
    assert all(leaf.all() for leaf in jax.tree.leaves(mask) if not leaf.ndim)


def test_masks_of_each_framework_survive_fill_apply_and_serialization(framework):
    params, kernels = framework
    empty = jax.tree.map(lambda m: m & False if m.ndim else m, masks.support(params))
    mask = masks.fill(jax.random.key(0), empty, 0.25)
    assert masks.density(mask) == sum(int(np.prod(k)) // 4 for k in kernels) / sum(
        int(np.prod(k)) for k in kernels
    )
    sparse = masks.apply(mask, params)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    chex.assert_trees_all_equal(masks.support(sparse), mask)
    leaves = jax.tree.leaves(mask)
    restored = serialization.from_bytes(leaves, serialization.to_bytes(leaves))
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, restored), leaves)


def test_support_is_where_weights_are_not_zero():
    kernel = jnp.array([[0.0, -0.0, 1e-30], [jnp.nan, jnp.inf, -2.0]])
    mask = masks.support({"kernel": kernel, "bias": jnp.zeros((2, 3))})
    np.testing.assert_array_equal(mask["kernel"], [[False, False, True], [True, True, True]])
    chex.assert_shape(mask["bias"], ())


def test_where_decides():
    leaf = jnp.eye(3)
    np.testing.assert_array_equal(masks.support(leaf, where=lambda path, leaf: True), leaf != 0)
    params = {"kernel": leaf, "table": leaf}
    mask = masks.support(params, where=lambda path, leaf: path[-1].key == "table")
    chex.assert_shape([mask["kernel"], mask["table"]], [(), (3, 3)])


@pytest.mark.parametrize(
    ("params", "paths"), [(jnp.eye(3), ["(root)"]), ({"bias": jnp.eye(3)}, ["bias"]), ({}, [])]
)
@pytest.mark.parametrize(
    "where", [masks.is_kernel, functools.partial(masks.is_kernel), lambda path, leaf: False]
)
def test_a_mask_of_nothing_is_refused(params, paths, where):
    with refuses(f"params={paths}", "where="):
        masks.support(params, where=where)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_apply_keeps_or_zeroes(dtype):
    mask = {"bias": jnp.array(True), "kernel": random_mask(3, (7, 5))}
    tree = {
        "bias": jnp.arange(1, 6, dtype=dtype),
        "kernel": jnp.arange(1, 36, dtype=dtype).reshape(7, 5),
    }
    out = masks.apply(mask, tree)
    assert out["bias"] is tree["bias"]
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    expected = np.where(np.asarray(mask["kernel"]), np.asarray(tree["kernel"]), 0)
    np.testing.assert_array_equal(np.asarray(out["kernel"]), expected)
    chex.assert_trees_all_equal(jax.jit(masks.apply)(mask, tree), out)
    chex.assert_trees_all_equal(masks.apply(mask, out), out)


def test_apply_stops_what_is_not_finite():
    mask = {"kernel": jnp.array([[True, False, False]])}
    tree = {"kernel": jnp.array([[jnp.nan, jnp.nan, -jnp.inf]])}
    out = masks.apply(mask, tree)["kernel"]
    np.testing.assert_array_equal(out, [[np.nan, 0.0, 0.0]])
    # The gradient too: multiplication by a mask would give 0 · NaN.
    grad = jax.grad(lambda t: jnp.nansum(jnp.sqrt(masks.apply(mask, t)["kernel"] + 1)))(tree)
    np.testing.assert_array_equal(grad["kernel"][0, 1:], [0.0, 0.0])


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    start=st.floats(0.0, 1.0),
    end=st.floats(0.0, 1.0, exclude_min=True),
    shape=st.sampled_from([(7, 5), (3, 2, 6), (1, 1), (3, 3, 2, 3)]),
)
def test_fill_meets_the_budget_exactly_and_only_adds(seed, start, end, shape):
    before = {"bias": jnp.array(True), "kernel": random_mask(seed, shape, min(start, end))}
    size = int(np.prod(shape))
    count = int(before["kernel"].sum())
    density = max(end, count / size)
    after = masks.fill(jax.random.key(seed), before, density)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert after["bias"] is before["bias"]
    assert abs(int(after["kernel"].sum()) - density * size) <= 0.5
    assert bool((after["kernel"] >= before["kernel"]).all())


@pytest.mark.parametrize(("density", "count"), [(0.1, 1), (0.09, 0), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_budgets_round_half_up(density, count):
    mask = {"kernel": jnp.zeros((5, 1), bool)}
    assert int(masks.fill(jax.random.key(0), mask, density)["kernel"].sum()) == count


def test_budgets_are_exact_where_float32_has_no_odd_numbers():
    size = 2**24 + 2
    mask = np.ones((size, 1), bool)
    mask[:3] = False
    assert selection.target_count((size - 1) / size, size) == size - 1
    assert selection.target_count(np.float64(1.0), size) == size
    np.testing.assert_array_equal(
        selection.target_count(np.array([0.5, 1.0]), size), [size // 2, size]
    )
    assert masks.density({"w": mask}) == (size - 3) / size


@pytest.mark.slow
def test_every_set_of_further_weights_is_equally_likely():
    before = np.array([[True, False, False], [False, False, True]])
    draws = 6000
    keys = jax.random.split(jax.random.key(7), draws)
    fill = jax.jit(jax.vmap(lambda key: masks.fill(key, {"w": jnp.asarray(before)}, 4 / 6)["w"]))
    after = np.asarray(fill(keys)).reshape(draws, -1)
    free = np.flatnonzero(~before.ravel())
    pairs = list(itertools.combinations(free, 2))
    counts = np.array([after[:, list(pair)].all(axis=1).sum() for pair in pairs])
    assert counts.sum() == draws
    # Each count is binomial; 5 standard errors.
    p = 1 / len(pairs)
    assert np.abs(counts - draws * p).max() < 5 * np.sqrt(draws * p * (1 - p))


@pytest.mark.slow
def test_leaves_and_slices_draw_independently():
    mask = {"a": jnp.zeros((40, 10), bool), "b": jnp.zeros((40, 10), bool)}
    filled = masks.fill(jax.random.key(0), mask, 0.5)
    assert bool((filled["a"] != filled["b"]).any())
    stack = masks.fill(
        jax.random.key(0), {"a": jnp.zeros((2, 20, 10), bool)}, {"a": np.array([0.5, 0.5])}
    )["a"]
    assert bool((stack[0] != stack[1]).any())


def test_same_key_same_mask_and_other_key_other_mask():
    mask = example_mask()
    first = masks.fill(jax.random.key(0), mask, 0.6)
    chex.assert_trees_all_equal(masks.fill(jax.random.key(0), mask, 0.6), first)
    other = masks.fill(jax.random.key(1), mask, 0.6)
    assert bool((other["conv"]["kernel"] != first["conv"]["kernel"]).any())


@pytest.mark.slow
def test_fill_under_jit_and_vmap_is_fill():
    mask = example_mask()
    keys = jax.random.split(jax.random.key(2), 3)
    loop = [masks.fill(key, mask, 0.6) for key in keys]

    chex.assert_trees_all_equal(jax.jit(masks.fill, static_argnums=2)(keys[0], mask, 0.6), loop[0])
    chex.assert_trees_all_equal(jax.jit(lambda k: masks.fill(k, mask, 0.6))(keys[0]), loop[0])
    # A traced density: half of each size is exact in any precision.
    half = jax.tree.map(lambda m: jnp.float32(0.5), mask)
    chex.assert_trees_all_equal(
        jax.jit(masks.fill)(keys[0], mask, half), masks.fill(keys[0], mask, half)
    )
    batched = jax.vmap(lambda k: masks.fill(k, mask, 0.6))(keys)
    kernels = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    chex.assert_trees_all_equal(batched, kernels)
    many_masks = jax.vmap(masks.fill, in_axes=(0, 0, None))(keys, kernels, 0.8)
    for index, key in enumerate(keys):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf, i=index: leaf[i], many_masks),
            masks.fill(key, loop[index], 0.8),
        )


@pytest.mark.slow
def test_densities_per_leaf_and_per_slice():
    mask = jax.tree.map(lambda m: jnp.zeros_like(m) if m.ndim else m, example_mask())
    per_layer = np.array([0.1, 0.5, 0.0, 1.0])
    wanted = {
        "conv": {"bias": 1.0, "kernel": 0.25},
        "layers": {"bias": 7.0, "kernel": per_layer},  # the mask of a bias is a scalar: ignored
        "scale": 1.0,
    }
    filled = masks.fill(jax.random.key(0), mask, wanted)
    assert int(filled["conv"]["kernel"].sum()) == 30
    np.testing.assert_array_equal(filled["layers"]["kernel"].sum((1, 2)), [3, 15, 0, 30])
    traced = jax.jit(masks.fill)(jax.random.key(0), mask, wanted)
    chex.assert_trees_all_equal(traced, filled)


def test_fill_to_its_own_densities_changes_nothing():
    mask = {**example_mask(), "none": jnp.zeros((4, 4), bool), "empty": jnp.zeros((0, 4), bool)}
    found = masks.densities(mask)
    chex.assert_trees_all_equal(masks.fill(jax.random.key(0), mask, found), mask)
    chex.assert_trees_all_equal(jax.jit(masks.fill)(jax.random.key(0), mask, found), mask)


def test_a_traced_support_above_its_budget_is_left_alone():
    mask = {"w": jnp.eye(4, dtype=bool), "v": jnp.zeros((4, 4), bool)}
    filled = jax.jit(lambda key, mask: masks.fill(key, mask, 0.125))(jax.random.key(0), mask)
    np.testing.assert_array_equal(filled["w"], np.eye(4))
    assert int(filled["v"].sum()) == 2


def test_density_is_the_fraction_of_kernel_weights():
    mask = example_mask()
    kernels = [np.asarray(mask["conv"]["kernel"]), np.asarray(mask["layers"]["kernel"])]
    total = sum(k.sum() for k in kernels) / sum(k.size for k in kernels)
    assert masks.density(mask) == total
    assert isinstance(masks.density(mask), float)
    np.testing.assert_allclose(jax.jit(masks.density)(mask), total, rtol=1e-6)

    found = masks.densities(mask)
    assert jax.tree.structure(found) == jax.tree.structure(mask)
    chex.assert_type(jax.tree.leaves(found), np.float64)
    chex.assert_shape(jax.tree.leaves(found), ())
    np.testing.assert_allclose(found["conv"]["kernel"], kernels[0].mean(), rtol=1e-7)
    np.testing.assert_allclose(found["layers"]["kernel"], kernels[1].mean(), rtol=1e-7)
    assert float(found["scale"]) == 1.0
    chex.assert_trees_all_close(jax.jit(masks.densities)(mask), found, rtol=1e-6)


def test_a_tree_without_kernels_is_dense():
    assert masks.density({"bias": jnp.array(True)}) == 1.0
    assert masks.density({"kernel": jnp.ones((0, 3), bool)}) == 1.0
    assert float(masks.densities({"kernel": jnp.ones((0, 3), bool)})["kernel"]) == 1.0


# Shapes and trees are few, since each compiles.
TREES = [
    {"a": {"kernel": (7, 5), "bias": ()}},
    {"a": {"kernel": (7, 5), "bias": ()}, "b": {"kernel": (3, 2, 6)}, "c": {"kernel": (1, 1)}},
]


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.0, 1.0, exclude_min=True),
    levels=st.integers(1, 50),
)
def test_every_mask_has_the_exact_count(tree, seed, density, levels):
    """Random masks and masks of scores with many ties, for any tree and density."""
    generator = np.random.default_rng(seed)
    scores = jax.tree.map(
        lambda shape: generator.integers(0, levels, shape).astype(np.float32) if shape else np.inf,
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(scores) if np.ndim(leaf)]

    def counts(mask):
        assert jax.tree.structure(mask) == jax.tree.structure(scores)
        assert [m.shape for m in jax.tree.leaves(mask)] == list(
            map(np.shape, jax.tree.leaves(scores))
        )
        chex.assert_type(jax.tree.leaves(mask), bool)
        assert all(m for m in jax.tree.leaves(mask) if m.ndim == 0)
        return [int(m.sum()) for m in jax.tree.leaves(mask) if m.ndim]

    each = [np.floor(density * size + 0.5) for size in sizes]
    random = masks.random(jax.random.key(seed), scores, density)
    by_layer = masks.top_k(scores, density, scope="layer")
    overall = masks.top_k(scores, density)
    assert counts(random) == counts(by_layer) == each
    assert sum(counts(overall)) == np.floor(density * sum(sizes) + 0.5)
    assert counts(masks.shuffle(jax.random.key(seed), overall)) == counts(overall)

    # The right ones: a stable sort in the order of the tree.
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(scores) if np.ndim(leaf)])
    kept = np.concatenate([np.ravel(m) for m in jax.tree.leaves(overall) if m.ndim])
    best = np.argsort(-flat, kind="stable")[: sum(counts(overall))]
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(best))
    for leaf, mask in zip(jax.tree.leaves(scores), jax.tree.leaves(by_layer), strict=True):
        if mask.ndim:
            best = np.argsort(-leaf.ravel(), kind="stable")[: int(mask.sum())]
            np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(best))


def example_scores():
    generator = np.random.default_rng(5)
    shapes = {"conv": {"bias": (), "kernel": (7, 5)}, "stack": (3, 2, 6), "empty": (0, 4)}
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.slow
def test_top_k_under_jit_and_vmap_is_top_k():
    scores = example_scores()
    eager = masks.top_k(scores, 0.25)
    chex.assert_trees_all_equal(jax.jit(masks.top_k)(scores, 0.25), eager)
    by_layer = jax.jit(lambda: masks.top_k(scores, 0.25, scope="layer"))
    chex.assert_trees_all_equal(by_layer(), masks.top_k(scores, 0.25, scope="layer"))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), scores)
    batched = jax.vmap(lambda s: masks.top_k(s, 0.25))(batch)
    for index, sign in enumerate([1, -1]):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf, i=index: leaf[i], batched),
            masks.top_k(jax.tree.map(lambda leaf, s=sign: s * leaf, scores), 0.25),
        )


@pytest.mark.slow
def test_top_k_takes_densities_per_leaf_and_per_slice():
    scores = example_scores()
    wanted = {"conv": {"bias": 1.0, "kernel": 0.2}, "stack": np.array([0.0, 0.5, 1.0]), "empty": 1}
    mask = masks.top_k(scores, wanted, scope="layer")
    assert int(mask["conv"]["kernel"].sum()) == 7
    np.testing.assert_array_equal(mask["stack"].sum((1, 2)), [0, 6, 12])
    kept = np.asarray(scores["stack"][1])[np.asarray(mask["stack"][1])]
    assert kept.min() >= np.median(scores["stack"][1])
    nested = masks.top_k(scores, {**wanted, "stack": np.full((3, 2), 1 / 3)}, scope="layer")
    np.testing.assert_array_equal(nested["stack"].sum(2), np.full((3, 2), 2))


def test_infinite_scores_have_their_place():
    scores = {"w": jnp.array([[-jnp.inf, 0.0], [jnp.inf, -1.0]])}
    for density, expected in [(0.25, [2]), (0.5, [1, 2]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        mask = masks.top_k(scores, density)
        assert np.flatnonzero(mask["w"]).tolist() == expected


@pytest.mark.slow
def test_random_and_shuffled_masks_are_uniform_under_vmap():
    """Each set of 2 among 6 entries, within five standard errors; and vmap over keys = loop."""
    draws = 6000
    keys = jax.random.split(jax.random.key(11), draws)
    start = {"w": jnp.array([[True, True, False], [False, False, False]]), "b": jnp.array(True)}
    weights = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    samplers = [
        lambda key: masks.random(key, weights, 1 / 3),
        lambda key: masks.shuffle(key, start),
    ]
    for sampler in samplers:
        many = jax.jit(jax.vmap(sampler))(keys)
        for index in range(3):
            one = jax.tree.map(lambda leaf, i=index: leaf[i], many)
            chex.assert_trees_all_equal(one, sampler(keys[index]))
        drawn = np.asarray(many["w"]).reshape(draws, 6)
        pairs = list(itertools.combinations(range(6), 2))
        counts = np.array([drawn[:, list(pair)].all(axis=1).sum() for pair in pairs])
        assert counts.sum() == draws
        p = 1 / len(pairs)
        assert np.abs(counts - draws * p).max() < 5 * np.sqrt(draws * p * (1 - p))


@pytest.mark.slow
def test_shuffle_keeps_counts_by_kernel_or_by_layer():
    mask = {
        "stack": jnp.zeros((3, 2, 6), bool).at[0].set(True),
        "kernel": random_mask(2, (7, 5)),
        "bias": jnp.array(True),
        "empty": jnp.zeros((0, 3), bool),
    }
    whole = masks.shuffle(jax.random.key(0), mask)
    assert jax.tree.map(lambda m: int(m.sum()), whole) == jax.tree.map(lambda m: int(m.sum()), mask)
    assert whole["bias"] is mask["bias"]
    assert bool((whole["kernel"] != mask["kernel"]).any())
    assert not bool(whole["stack"][0].all())
    again = masks.shuffle(jax.random.key(0), mask)
    chex.assert_trees_all_equal(again, whole)
    other = masks.shuffle(jax.random.key(1), mask)
    assert bool((other["kernel"] != whole["kernel"]).any())

    def layout(path, leaf):
        return Layout(batch_axes=1 if path[-1].key == "stack" else 0)

    layered = masks.shuffle(jax.random.key(0), mask, layout=layout)
    np.testing.assert_array_equal(layered["stack"], mask["stack"])
    assert int(layered["kernel"].sum()) == int(mask["kernel"].sum())


def test_overlap_is_the_jaccard_index():
    mask, other = example_mask(), example_mask()
    assert masks.overlap(mask, other) == 1.0
    other["conv"]["kernel"] = random_mask(8, (3, 2, 4, 5))
    pairs = [(mask["conv"]["kernel"], other["conv"]["kernel"])]
    pairs.append((mask["layers"]["kernel"], other["layers"]["kernel"]))
    both = sum(int((left & right).sum()) for left, right in pairs)
    either = sum(int((left | right).sum()) for left, right in pairs)
    assert masks.overlap(mask, other) == masks.overlap(other, mask) == both / either
    np.testing.assert_allclose(jax.jit(masks.overlap)(mask, other), both / either, rtol=1e-6)
    nothing = jax.tree.map(lambda m: m & False if m.ndim else m, mask)
    assert masks.overlap(mask, nothing) == 0.0
    assert masks.overlap(nothing, nothing) == 1.0
    assert float(jax.jit(masks.overlap)(nothing, nothing)) == 1.0


KERNEL = {"kernel": jnp.eye(4, dtype=bool)}
SCORES = {"kernel": jnp.arange(6.0).reshape(2, 3)}


@pytest.mark.parametrize(
    ("named", "call"),
    [
        (["densities=0.0"], lambda key: masks.fill(key, KERNEL, 0.0)),
        (["densities=1.5"], lambda key: masks.fill(key, KERNEL, 1.5)),
        (["densities[kernel]=-0.1"], lambda key: masks.fill(key, KERNEL, {"kernel": -0.1})),
        (
            ["densities[kernel]", (3,), (4, 4)],
            lambda key: masks.fill(key, KERNEL, {"kernel": np.full(3, 0.5)}),
        ),
        (["densities[w]"], lambda key: masks.fill(key, KERNEL, {"w": 0.5})),
        (
            ["mask[kernel]", "density 0.25", "4 of 16", "[0, 2]"],
            lambda key: masks.fill(key, KERNEL, 0.125),
        ),
        (
            ["mask[kernel][2]", "density 0.25"],
            lambda key: masks.fill(key, KERNEL, {"kernel": np.array([0.5, 0.5, 0.0, 0.5])}),
        ),
        (
            ["mask[kernel]", "density 0.25"],
            lambda key: jax.jit(lambda k: masks.fill(k, KERNEL, 0.125))(key),
        ),
        (["mask[kernel]", "float32"], lambda key: masks.fill(key, {"kernel": jnp.eye(4)}, 0.5)),
        (["mask[kernel]", "float32"], lambda key: masks.density({"kernel": jnp.eye(4)})),
        (["mask[kernel]", "float32"], lambda key: masks.densities({"kernel": jnp.eye(4)})),
        (["mask[kernel]", "float32"], lambda key: masks.shuffle(key, {"kernel": jnp.eye(4)})),
        (["mask[kernel]", "tree"], lambda key: masks.apply(KERNEL, {"w": jnp.eye(4)})),
        (
            ["mask[kernel]", (4, 4), (3, 3), "tree"],
            lambda key: masks.apply(KERNEL, {"kernel": jnp.eye(3)}),
        ),
        (
            ["mask[kernel]=False"],
            lambda key: masks.apply({"kernel": jnp.array(False)}, {"kernel": jnp.eye(3)}),
        ),
        (["densities=2.0"], lambda key: masks.random(key, SCORES, 2.0)),
        (["params=['bias']"], lambda key: masks.random(key, {"bias": jnp.ones(3)}, 0.5)),
        (["density=0.0"], lambda key: masks.top_k(SCORES, 0.0)),
        (["density={'kernel': 0.5}"], lambda key: masks.top_k(SCORES, {"kernel": 0.5})),
        (["scope='net'", "'layer'"], lambda key: masks.top_k(SCORES, 0.5, scope="net")),
        (
            ["density[kernel]=1.5"],
            lambda key: masks.top_k(SCORES, {"kernel": 1.5}, scope="layer"),
        ),
        (["density[w]"], lambda key: masks.top_k(SCORES, {"w": 0.5}, scope="layer")),
        (
            ["scores[kernel]", "NaN"],
            lambda key: masks.top_k({"kernel": jnp.array([1.0, jnp.nan])}, 0.5),
        ),
        (["scores[kernel]", "int32"], lambda key: masks.top_k({"kernel": jnp.arange(4)}, 0.5)),
        (
            ["scores.size=2147483648", "scope='layer'"],
            lambda key: jax.eval_shape(
                lambda leaf: masks.top_k({"a": leaf, "b": leaf}, 0.5),
                jax.ShapeDtypeStruct((2**15, 2**15), jnp.bfloat16),
            ),
        ),
        (
            ["layout(kernel).batch_axes=2"],
            lambda key: masks.shuffle(key, KERNEL, layout=lambda path, leaf: Layout(2)),
        ),
        (["other[w]", "mask"], lambda key: masks.overlap(KERNEL, {"w": jnp.eye(4)})),
        (
            ["other[kernel]", (3, 3), (4, 4)],
            lambda key: masks.overlap(KERNEL, {"kernel": jnp.eye(3, dtype=bool)}),
        ),
        (["other[kernel]", ()], lambda key: masks.overlap({"kernel": jnp.array(True)}, KERNEL)),
        (
            ["other[kernel]=False"],
            lambda key: masks.overlap(KERNEL, {"kernel": jnp.array(False)}),
        ),
    ],
)
def test_errors_name_the_leaf_and_the_value(named, call):
    with refuses(*named):
        call(jax.random.key(0))


DENSE = jnp.array(True)
PARAMS = {"fc": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "blocks": [jnp.ones(2)]}


@pytest.mark.parametrize(
    ("path", "found", "mask"),
    [
        ("fc/extra", "tree", {"fc": dict.fromkeys(("kernel", "bias", "extra"), DENSE)}),
        ("fc/bias", "tree", {"fc": {"kernel": DENSE}}),
        ("fc/bias", "None", {"fc": {"kernel": DENSE, "bias": None}}),
        ("blocks/1", "tree", {"blocks": [DENSE, DENSE]}),
        ("blocks", "leaf", {"blocks": DENSE}),
        ("blocks", "(*,)", {"blocks": (DENSE,)}),
        ("blocks/0", "None", {"blocks": [None]}),
    ],
)
def test_a_mask_of_another_structure_is_refused_at_the_first_path_that_differs(path, found, mask):
    whole = {"fc": {"kernel": DENSE, "bias": DENSE}, "blocks": [DENSE], **mask}
    with refuses(f"mask[{path}]", found) as raised:
        masks.apply(whole, PARAMS)
    assert "kernel" not in str(raised.value), "it names more than the path"


def test_a_none_is_named_where_the_parameters_have_it_and_accepted_where_both_do():
    params = {"fc": {"kernel": jnp.eye(3), "bias": None}}
    mask = masks.support(params)
    chex.assert_trees_all_equal(masks.apply(mask, params), params)
    with refuses("mask[fc/bias]", "None"):
        masks.apply({"fc": {**mask["fc"], "bias": DENSE}}, params)


def test_densities_of_the_layers_of_a_stack():
    layers = jnp.stack([jnp.eye(4, dtype=bool), jnp.ones((4, 4), bool), jnp.zeros((4, 4), bool)])
    mask = {"kernel": layers, "bias": jnp.array(True)}
    found = masks.densities(mask, layout=lambda path, leaf: Layout(batch_axes=1))
    assert found["kernel"].tolist() == [0.25, 1.0, 0.0]
    assert found["bias"].shape == ()
    refilled = masks.fill(jax.random.key(0), mask, found)
    chex.assert_trees_all_equal(refilled, mask)


def test_a_kernel_of_zeros_has_no_support():
    params = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    selections = masks.is_kernel, functools.partial(masks.is_kernel), lambda _, leaf: leaf.ndim == 2
    for where in selections:
        with refuses("params[kernel]", "zero"):
            masks.support(params, where=where)
    assert not jax.jit(masks.support)(params)["kernel"].any()
    with refuses("params[bias]", "shape"):
        masks.support(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_zero_is_told_by_bits(dtype, x64):
    """Eager, compiled, mapped and differentiated, as NumPy compares float64, which is exact."""
    info = jnp.finfo(dtype)
    values = np.array([0.0, -0.0, 1.0, np.nan, np.inf, info.max]).astype(jnp.dtype(dtype))
    small = [info.smallest_subnormal, -info.smallest_subnormal, info.tiny / 4, info.tiny]
    values = np.concatenate([values, np.array(small).astype(values.dtype)])
    expected = np.array([False, False] + [True] * 8)
    forms = [values, np.repeat(values, 2)[::2], values.astype(values.dtype.newbyteorder(">"))]
    for form in forms:
        np.testing.assert_array_equal(nonzero(form), expected)
    for function in (nonzero, jax.jit(nonzero), jax.vmap(nonzero)):
        np.testing.assert_array_equal(function(jnp.asarray(values)), expected)


def test_zero_of_other_dtypes_and_in_gradients():
    assert nonzero(np.float32(1e-45))
    assert nonzero(np.complex64(1e-45j))
    assert not nonzero(-0.0)
    for dtype in (bool, np.int8, np.uint64, np.longdouble):
        np.testing.assert_array_equal(nonzero(np.array([[0, 1]]).astype(dtype)), [[False, True]])
    tiny = jnp.asarray([2.0**-9, 0.0, -0.0], jnp.float8_e4m3fn)
    assert nonzero(tiny).tolist() == [True, False, False]
    weights = jnp.array([[1e-40, 0.0]])
    slope = jax.grad(lambda w: jnp.where(nonzero(w), w, 0).sum())(weights)
    assert slope.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-40, -1e-42])
def test_a_kernel_of_subnormal_numbers_has_support(scale):
    params = {"kernel": jnp.asarray(np.eye(3, dtype=np.float32) * np.float32(scale))}
    assert int(masks.support(params)["kernel"].sum()) == 3
    start = networks.masked(params, masks.support(params))
    assert int(np.count_nonzero(start.params["kernel"])) == 3


@pytest.mark.slow
def test_selection_runs_without_jit():
    mask = {"kernel": jnp.eye(10, dtype=bool)}
    with jax.disable_jit():
        plain = masks.fill(jax.random.key(0), mask, 0.3)
    chex.assert_trees_all_equal(plain, masks.fill(jax.random.key(0), mask, 0.3))


def test_densities_count_beyond_what_float32_can():
    mask = np.zeros((4096, 8192), bool)
    mask.reshape(-1)[: 2**24 + 12345] = True
    [found] = jax.tree.leaves(masks.densities({"kernel": jnp.asarray(mask)}))
    assert round(float(found) * mask.size) == 2**24 + 12345


# ------------------------------------------------------------- masks of other libraries


def outside(seed=0):
    """A mask as PyTorch stores it: a convolution, a grouped one and a linear layer, flat names."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (5, 2, 3, 4), "block.grouped": (6, 1, 3), "fc": (4, 7)}
    return {f"{name}.weight": rng.random(shape) < 0.4 for name, shape in shapes.items()}


def inside():
    """The parameters for it, as Flax stores them."""
    shapes = {"conv": (3, 4, 2, 5), "grouped": (3, 1, 6), "fc": (7, 4)}
    layers = {
        name: {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1])}
        for name, shape in shapes.items()
    }
    return {"block": {"grouped": layers.pop("grouped")}, **layers}


ADOPTED = [("conv", "conv.weight"), ("grouped", "block.grouped.weight"), ("fc", "fc.weight")]


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        lambda mask: mask.astype(np.uint8),
        lambda mask: jnp.asarray(mask, jnp.bfloat16),
        torch.from_numpy,
        lambda mask: torch.from_numpy(mask).to(torch.float32),
        lambda mask: torch.from_numpy(mask).to(torch.bfloat16),
        lambda mask: torch.from_numpy(mask).to(torch.float16).requires_grad_(),
        lambda mask: torch.from_numpy(mask).to(torch.float8_e4m3fn),
        lambda mask: mask.astype(">f4"),
        lambda mask: mask.astype(">i2"),
        lambda mask: mask.astype(np.longdouble),
        np.asfortranarray,
    ],
)
def test_masks_of_pytorch_entry_by_entry(convert):
    given = outside()
    mask = masks.adopt(jax.tree.map(convert, given), inside(), order="torch")
    masks.apply(mask, inside())  # it is a mask
    for name, key in ADOPTED:
        kernel = np.asarray({**mask, **mask["block"]}[name]["kernel"])
        assert kernel.dtype == bool
        for index in np.ndindex(*given[key].shape):
            output, inputs, *taps = index
            assert kernel[*taps, inputs, output] == given[key][index]
        assert {**mask, **mask["block"]}[name]["bias"].shape == ()


def test_adopted_masks_start_networks():
    params = {"conv": inside()["conv"]}
    given = outside()["conv.weight"]
    mask = masks.adopt({"conv.weight": given}, params, order="torch")
    kept = networks.masked(params, mask)
    chex.assert_trees_all_equal(kept.mask, mask)
    np.testing.assert_array_equal(kept.params["conv"]["kernel"], given.transpose(2, 3, 1, 0))
    start = networks.exact_orthogonal(jax.random.key(0), params, masks.densities(mask))
    chex.assert_trees_all_equal(masks.densities(start.mask), masks.densities(mask))
    tap = start.params["conv"]["kernel"][1, 1]
    np.testing.assert_allclose(tap @ tap.T, np.eye(2), atol=1e-5)


def test_the_masks_that_pytorch_prunes_by():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", amount=5)
    buffers = dict(net.named_buffers())
    assert set(buffers) == {"0.weight_mask", "2.weight_mask"}
    flax = {name: {"kernel": jnp.ones(s)} for name, s in (("0", (3, 4)), ("2", (4, 2)))}
    mask = masks.adopt(buffers, flax, order="torch")
    np.testing.assert_array_equal(mask["0"]["kernel"], buffers["0.weight_mask"].numpy().T)
    equinox = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    renamed = {f"layers.{int(name[0]) // 2}.weight": leaf for name, leaf in buffers.items()}
    adopted = masks.adopt(renamed, eqx.filter(equinox, eqx.is_inexact_array))
    np.testing.assert_array_equal(adopted.layers[1].weight, buffers["2.weight_mask"].numpy())


def test_every_frameworks_own_masks_are_adopted_as_they_are(framework):
    params, _ = framework
    mask = masks.random(jax.random.key(0), params, 0.5)
    adopted = masks.adopt(jax.tree.map(np.asarray, mask), params)
    chex.assert_trees_all_equal(adopted, mask)
    chex.assert_trees_all_equal_structs(adopted, mask)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    chex.assert_trees_all_equal(masks.adopt(flat, params), mask)


def test_dense_leaves_of_adopted_masks():
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"w": jnp.ones((3, 3))}}
    given = {"a": {"weight": True, "bias": np.ones(3)}, "b": {"weight": np.eye(3)}}
    mask = masks.adopt(given, params)
    assert mask["a"]["kernel"].shape == mask["a"]["bias"].shape == ()
    np.testing.assert_array_equal(mask["b"]["w"], np.eye(3))
    given["a"]["bias"][1] = 0
    with refuses("tree[a/bias]", "1 zeros"):
        masks.adopt(given, params)
    everything = masks.adopt(
        {**given, "a": {"kernel": 1, "bias": given["a"]["bias"]}},
        params,
        where=lambda path, leaf: True,
    )
    assert everything["a"]["bias"].tolist() == [True, False, True]


def test_leaves_that_are_python_scalars_stay_dense():
    params = {"fc": {"kernel": jnp.ones((3, 2)), "scale": 2.0, "steps": 3}}
    for scalars in ({"scale": 1, "steps": True}, {"scale": np.array(1.0)}, {}):
        mask = masks.adopt({"fc": {"kernel": np.eye(3, 2)} | scalars}, params)
        assert mask["fc"]["scale"].shape == mask["fc"]["steps"].shape == ()
        np.testing.assert_array_equal(mask["fc"]["kernel"], np.eye(3, 2))


FLAX = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("named", "tree", "options"),
    [
        (
            ["tree[fc/kernel]", (2, 3), (3, 2), 'order="torch"'],
            {"fc.weight": np.ones((2, 3))},
            {},
        ),
        (
            ["tree[fc/kernel]", (3, 2), (2, 3), 'order="jax"'],
            {"fc.weight": np.ones((3, 2))},
            {"order": "torch"},
        ),
        (["tree[fc/kernel]", (3, 4), (3, 2)], {"fc.weight": np.ones((3, 4))}, {}),
        (["tree[fc/kernel]=0.5"], {"fc.weight": np.full((3, 2), 0.5)}, {}),
        (["tree[fc/kernel]=nan"], {"fc.weight": np.full((3, 2), np.nan)}, {}),
        (["tree[fc/kernel]=-1"], {"fc.weight": -1}, {}),
        (["tree[fc/kernel]", "1 zeros"], {"fc.weight": False}, {}),
        (
            ["tree[fc/kernel]", "Tensor", "detach().cpu().to_dense()"],
            {"fc.weight": torch.ones((3, 2)).to_sparse()},
            {},
        ),
        (["tree[fc/kernel]", "object"], {"fc.weight": np.full((3, 2), None)}, {}),
        (["tree[fc/kernel]", "str", "<U3"], {"fc.weight": "yes"}, {}),
        (
            ["tree[fc/kernel]", "ShapeDtypeStruct"],
            {"fc.weight": jax.ShapeDtypeStruct((3, 2), bool)},
            {},
        ),
        (["tree[fc/kernel]=1e-310"], {"fc.weight": np.full((3, 2), 1e-310)}, {}),
        ([r"\x1b[2J"], {"fc.weight": True, "\x1b[2J": True}, {}),
        (["tree", "fc/kernel"], {}, {}),
        (["tree", "fc1/kernel", "fc/kernel", "fc/bias"], {"fc1.weight": np.ones((3, 2))}, {}),
        (
            ["tree[fc.weight]", "fc/kernel"],
            {"fc.weight": np.ones((3, 2)), "fc": {"kernel": np.ones((3, 2))}},
            {},
        ),
        (["order='flax'", "'torch'"], {"fc.weight": True}, {"order": "flax"}),
    ],
)
def test_foreign_masks_that_do_not_fit_are_refused(named, tree, options):
    with refuses(*named):
        masks.adopt(tree, FLAX, **options)


MASK = {"kernel": jnp.eye(3, dtype=bool), "bias": jnp.array(True)}
ON_SHAPES = {
    "params": masks.support,
    "tree": lambda shapes: masks.apply(MASK, shapes),
    "scores": lambda shapes: masks.top_k(shapes, 0.5),
    "mask": lambda shapes: masks.density(shapes),
}


@pytest.mark.parametrize("name", ON_SHAPES)
def test_a_shape_without_values_is_refused(name):
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32), "bias": jnp.array(True)}
    with refuses(f"{name}[kernel]", "shape"):
        ON_SHAPES[name](shapes)


def test_shuffles_of_like_kernels_differ_and_so_does_a_random_mask_of_the_same_key():
    key, params = jax.random.key(0), {name: {"kernel": jnp.ones((9, 9))} for name in "ab"}
    mask = masks.random(key, params, 0.5)
    shuffled = masks.shuffle(key, mask)
    assert masks.overlap({"w": shuffled["a"]["kernel"]}, {"w": shuffled["b"]["kernel"]}) < 0.6
    assert masks.overlap(mask, shuffled) < 0.6


@pytest.mark.parametrize(
    ("mask", "other"),
    [(jnp.array(True), jnp.eye(3, dtype=bool)), (jnp.eye(3, dtype=bool), jnp.array(True))],
)
def test_an_overlap_needs_like_masks_either_way(mask, other):
    with refuses("kernel", "shape"):
        masks.overlap({"kernel": mask}, {"kernel": other})


def test_a_message_lists_five_names_and_counts_the_others():
    others = {f"layer{index}": np.ones((3, 3), bool) for index in range(7)}
    with refuses("layer4", "2 more") as raised:
        masks.adopt({"kernel": np.ones((3, 3), bool), **others}, {"kernel": jnp.ones((3, 3))})
    assert "layer5" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "order", "remedy"),
    [
        ((3, 2), "torch", 'order="jax"'),
        ((2, 3), "jax", 'order="torch"'),
        ((5, 5), "torch", "split or stack"),
        ((5, 5), "jax", "split or stack"),
    ],
)
def test_a_shape_that_fits_in_the_other_order_says_so(shape, order, remedy):
    params = {"kernel": jnp.ones((3, 2))}
    with refuses("tree[kernel]", shape, remedy) as raised:
        masks.adopt({"kernel": np.ones(shape, bool)}, params, order=order)
    assert ("fits" in str(raised.value)) == (shape != (5, 5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_traced_density_of_any_dtype_selects_its_share(dtype):
    density = jnp.asarray(0.1, dtype)
    scores = {"kernel": jnp.arange(512 * 512.0).reshape(512, 512)}
    mask = jax.jit(masks.top_k)(scores, density)
    assert mask["kernel"].sum() == math.floor(float(density) * 512 * 512 + 0.5)


def test_overlap_names_the_mask_that_does_not_fit():
    array, scalar = {"w": jnp.ones(3, bool)}, {"w": jnp.array(True)}
    with refuses("mask[w]", "(3,)"):
        masks.overlap(array, scalar)
    with refuses("other[w]", "(3,)"):
        masks.overlap(scalar, array)


def test_layers_without_entries_have_density_one_each():
    mask = {"kernel": jnp.ones((3, 0, 5), bool)}
    found = masks.densities(mask, layout=lambda path, leaf: Layout(batch_axes=1))
    assert found["kernel"].tolist() == [1, 1, 1]


def test_vectors_have_no_order():
    tree = {"bias": np.array([1, 0, 1]), "kernel": np.ones((4, 4))}
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(3)}
    mask = masks.adopt(tree, params, order="torch", where=lambda path, leaf: True)
    assert mask["bias"].tolist() == [True, False, True]
