"""Starts: which methods share what, what each criterion scores, and what is kept on disk."""

import dataclasses
import functools
import math
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import linen
from experiments import data, models
from experiments.config import Criterion, Method, Train
from experiments.runs.cache import get_or_compute
from experiments.training import criteria, network, starts
from experiments.training.keys import Purpose, key_of

# Ten inputs, ten units, ten classes: kernels of one shape, so that each program compiles once.
TWO = Train(data="made", depth=2, width=10, density=0.25, init="fan_in", method="base")
FOUR = dataclasses.replace(TWO, depth=4, density=0.3, init="orthogonal", scale=1.5)


@pytest.fixture(scope="module")
def dataset():
    return data.load("made", image_shape=(5, 2, 1))


def kernels(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if "kernel" in jax.tree_util.keystr(path)
    }


def make(config, dataset, seed=1, **options):
    return starts.make(config, seed, dataset, **options)


# ------------------------------------------------------------------ what the methods share


@pytest.mark.slow
def test_the_methods_of_a_seed_share_dense_weights_and_mask(dataset):
    dense = make(dataclasses.replace(FOUR, method="dense", density=1.0), dataset)
    base = make(FOUR, dataset)
    ai = make(dataclasses.replace(FOUR, method="ai", ai_steps=3), dataset)
    assert all(leaf.shape == () and leaf for leaf in jax.tree.leaves(dense.mask))
    masks = kernels(base.mask)
    weights, values = kernels(dense.variables), kernels(ai.variables)
    on_base = kernels(base.variables)
    for name, mask in masks.items():
        leaf = f"['params']{name}"
        np.testing.assert_array_equal(on_base[leaf], np.where(mask, weights[leaf], 0))
        np.testing.assert_array_equal(kernels(ai.mask)[name], mask)
        assert (values[leaf][~mask] == 0).all()
        assert not np.array_equal(values[leaf], on_base[leaf])
        gram = weights[leaf].swapaxes(-1, -2) @ weights[leaf]
        np.testing.assert_allclose(gram, np.broadcast_to(2.25 * np.eye(10), gram.shape), atol=2e-5)
    assert starts.count(dense) == (400, 400)
    rescaled = make(dataclasses.replace(FOUR, method="rescaled"), dataset)
    for name, weights in kernels(rescaled.variables).items():
        mask = kernels(rescaled.mask)[name.removeprefix("['params']")]
        density = mask.mean((-2, -1), keepdims=True)
        np.testing.assert_allclose(weights, on_base[name] / np.sqrt(density), rtol=1e-6)
    for start in (base, rescaled, ai):
        assert starts.count(start) == (120, 400)


@pytest.mark.slow
def test_another_seed_draws_all_of_it_anew(dataset):
    one, other = make(FOUR, dataset), make(FOUR, dataset, seed=2)
    for name, mask in kernels(one.mask).items():
        assert not np.array_equal(mask, kernels(other.mask)[name])
    last = "['params']['last']['kernel']"
    both = kernels(one.mask)["['last']['kernel']"] & kernels(other.mask)["['last']['kernel']"]
    assert (kernels(one.variables)[last] != kernels(other.variables)[last])[both].all()


def test_purposes_have_keys_of_their_own():
    keys = [
        tuple(jax.random.key_data(key_of(jax.random.key(1), purpose)).tolist())
        for purpose in Purpose
    ]
    assert len(set(keys)) == len(Purpose)


def test_networks_by_their_fields(dataset):
    biased = dataclasses.replace(TWO, bias_std=0.5)
    biases = network.build(biased, 10).bias_init(jax.random.key(0), (1000,))
    assert abs(float(biases.std()) - 0.5) < 4 * 0.5 / 2000**0.5  # standard errors
    assert not starts.dense(TWO, 1, dataset)["params"]["last"]["bias"].any()
    assert network.build(biased, 10) is not network.build(TWO, 10)
    assert network.build(dataclasses.replace(TWO, method="eoi"), 10) is network.build(TWO, 10)


@pytest.mark.slow
def test_orthogonal_convolutions_are_deltas_by_group():
    shapes = {"plain": (3, 3, 4, 6), "depthwise": (3, 3, 1, 5)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    drawn = starts.redraw_orthogonal(jax.random.key(0), params, 2.0, eoi.masks.is_kernel)
    plain, depthwise = (np.array(drawn[name]["kernel"]) for name in ("plain", "depthwise"))
    np.testing.assert_allclose(plain[1, 1] @ plain[1, 1].T, 4 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(np.abs(depthwise[1, 1]), np.full((1, 5), 2.0), atol=1e-5)
    for kernel in (plain, depthwise):
        kernel[1, 1] = 0
        assert not kernel.any()


def test_what_reaches_the_library(dataset, monkeypatch):
    """The config chooses variants, angles and the center's density; the library draws them."""
    seen = []

    def draw(key, params, densities, **options):
        seen.append(options | {"densities": densities})
        return eoi.SparseInit(params, eoi.masks.support(params))

    monkeypatch.setattr(eoi, "exact_orthogonal", draw)
    monkeypatch.setattr(eoi, "sparsity_aware_orthogonal", draw)
    spread = {"taps": "spread", "planes": "matching", "angles": "hadamard", "he_norm": True}
    for change in ({}, {"angles": "80"}, {"method": "eis"}, {"method": "sao"}, spread):
        make(dataclasses.replace(FOUR, **{"method": "eoi", **change}), dataset)
    *_, last = seen
    plain, constant, variant, blocks = seen[:-1]
    assert [options["scale"] for options in seen] == [1.5, 1.5, 1.5, 1.5, "he"]
    assert (last["taps"], last["planes"]) == ("spread", eoi.planes.matching)
    assert last["angles"] is eoi.givens.hadamard_angle
    assert (plain["taps"], plain["planes"]) == ("center", eoi.planes.independent)
    assert {options["layout"] for options in seen} == {models.layout}
    assert plain["angles"] is eoi.givens.uniform_angle
    assert constant["angles"] == pytest.approx(80 * math.pi / 180)
    assert (plain["variant"], variant["variant"], blocks["activation"]) == ("eoi", "eis", "tanh")
    assert blocks["densities"] == 0.3
    # The layer densities of the mask that Base and AI have, each layer of the stack its own.
    for name, mask in kernels(make(FOUR, dataset).mask).items():
        expected = mask.mean((-2, -1))
        assert expected.shape == ((2,) if "hidden" in name else ())
        for options in (plain, variant):
            np.testing.assert_array_equal(kernels(options["densities"])[name], expected)
    assert plain["infeasible"] == "redistribute"
    assert plain["center_density"] is variant.get("center_density") is None
    densities = {name: spec.center_density for name, spec in models.SPECS.items()}
    assert {name for name, density in densities.items() if density} == {"cnn1000"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "center"), [("eoi", "density"), ("eis", None)])
def test_the_center_of_the_plain_convolutional_network(method, center, monkeypatch):
    """Only EOI takes the layer's density at the center tap; EIS has a rule for all taps."""
    seen = []

    def draw(key, params, densities, **options):
        seen.append(options.get("center_density"))
        return eoi.SparseInit(params, eoi.masks.support(params))

    monkeypatch.setattr(eoi, "exact_orthogonal", draw)
    config = Train(model="cnn1000", method=method, depth=4, width=4, init="fan_in", density=0.5)
    make(config, data.load("made", image_shape=(8, 8, 3)))
    assert seen == [center]


# Two layers of 8 x 8 between the first and the last, which stay dense.
HALF = Train(data="made", model="mlp7_wide", depth=4, width=8, density=0.5, scale=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"method": "2:4"}, {"method": "blocks", "block_size": 2}])
def test_starts_that_decide_by_themselves_which_weights_there_are(fields, dataset):
    config = dataclasses.replace(HALF, **fields)
    start = make(config, dataset)
    assert starts.count(start) == (10 * 8 + 64 + 8 * 10, 10 * 8 + 128 + 8 * 10)
    if config.method == "2:4":
        params, mask = start.variables["params"], start.mask
        assert mask["first"]["kernel"].shape == ()
    else:
        assert all(leaf.shape == () and leaf for leaf in jax.tree.leaves(start.mask))
        params, mask = linen.to_dense(start.variables)
    kernel, kept = (tree["hidden"]["linear"]["kernel"] for tree in (params, mask))
    for matrix, matrix_mask in zip(np.asarray(kernel), np.asarray(kept), strict=True):
        np.testing.assert_allclose(matrix @ matrix.T, 2.25 * np.eye(8), atol=1e-5)
        np.testing.assert_array_equal(matrix != 0, matrix_mask)
        if config.method == "2:4":
            assert (matrix_mask.reshape(2, 4, 8).sum(1) == 2).all()
    other = make(config, dataset, seed=2).variables["params"]["hidden"]["linear"]["kernel"]
    assert not np.array_equal(other, start.variables["params"]["hidden"]["linear"]["kernel"])


def test_the_command_line_offers_what_the_registries_have():
    """tyro reads the choices from types, which cannot be computed."""
    assert set(get_args(Criterion)) == set(criteria.CRITERIA)
    assert set(get_args(Method)) == set(starts.METHODS)


# ------------------------------------------------------------------ criteria


def examples(dataset, number):
    """Return the images that a criterion sees, flattened, in float64, and labels as rows."""
    order = jax.random.permutation(key_of(jax.random.key(1), Purpose.EXAMPLES), 576)[:number]
    split = dataset.train
    pixels = split.images[order].reshape(number, -1).astype(np.float64)
    return (pixels / 255 - 0.5) / 0.2, np.eye(10)[split.labels[order]]


def gradient(weights, x, y, temperature):
    """Backpropagate by hand through ``tanh(x W1) W2 / temperature``."""
    first, last = weights
    hidden = np.tanh(x @ first)
    logits = hidden @ last / temperature
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    error = (exponents / exponents.sum(1, keepdims=True) - y) / len(x) / temperature
    return x.T @ (error @ last.T * (1 - hidden**2)), hidden.T @ error


def snip(weights, x, y):
    return [np.abs(w * g) for w, g in zip(weights, gradient(weights, x, y, 1.0), strict=True)]


def grasp(weights, x, y):
    """A central difference of the gradient, along the gradient."""
    along = gradient(weights, x, y, 200.0)
    step = 1e-3 / np.sqrt(sum((g**2).sum() for g in along))
    ahead, behind = (
        gradient([w + s * g for w, g in zip(weights, along, strict=True)], x, y, 200.0)
        for s in (step, -step)
    )
    return [w * (a - b) / step for w, a, b in zip(weights, ahead, behind, strict=True)]


def kept(scores, density):
    flat = np.concatenate([score.ravel() for score in scores])
    least = np.sort(flat)[-math.floor(density * flat.size + 0.5)]
    return [score >= least for score in scores]


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "score"), [("snip", snip), ("grasp", grasp)])
def test_scores_by_hand(criterion, score, dataset):
    config = dataclasses.replace(TWO, criterion=criterion, batch_size=64)
    params = starts.dense(config, 1, dataset)["params"]
    weights = [np.asarray(params[name]["kernel"], np.float64) for name in ("first", "last")]
    # One batch; of GraSP two, for ten images of each of ten classes.
    x, y = examples(dataset, 64 if criterion == "snip" else 128)
    mask = make(config, dataset).mask
    for name, expected in zip(("first", "last"), kept(score(weights, x, y), 0.25), strict=True):
        found = np.asarray(mask[name]["kernel"])
        assert (found == expected).mean() >= 0.98  # float32 may swap two that are nearly equal
        assert 0 < found.mean() < 1


class Normalized(nn.Module):
    """A chain with normalization, which evaluates as a chain without."""

    num_classes: int
    activation = staticmethod(jnp.tanh)

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(10, name="first")(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(self.num_classes, name="last")(x)


@functools.lru_cache
def normalized(config, num_classes):
    return Normalized(num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_synflow_by_hand(norm, dataset, monkeypatch):
    """A hundred rounds in float64; tanh counts as the identity, normalization as a factor."""
    if norm:
        monkeypatch.setattr(network, "build", normalized)
    config = dataclasses.replace(TWO, criterion="synflow")
    variables = starts.dense(config, 1, dataset)
    first, last = (
        np.abs(np.asarray(variables["params"][name]["kernel"], np.float64))
        for name in ("first", "last")
    )
    masks = [np.ones_like(first), np.ones_like(last)]
    for number in range(1, 101):
        one, two = masks[0] * first, masks[1] * last
        scores = [one * two.sum(1), one.sum(0)[:, None] * two]
        masks = kept(scores, 0.25 ** (number / 100))
    start = make(config, dataset)
    for name, expected in zip(("first", "last"), masks, strict=True):
        assert (np.asarray(start.mask[name]["kernel"]) == expected).mean() >= 0.98
    assert ("batch_stats" in start.variables) == norm
    assert jax.tree.leaves(start.variables)[0].dtype == jnp.float32


@pytest.mark.parametrize("criterion", ["uniform", "erdos_renyi", "magnitude", "random"])
def test_counts_of_the_other_criteria(criterion, dataset):
    config = dataclasses.replace(TWO, criterion=criterion)
    start = make(config, dataset)
    assert starts.count(start) == (50, 200)
    first, last = (np.asarray(start.mask[name]["kernel"]) for name in ("first", "last"))
    if criterion == "uniform":
        assert (first.sum(), last.sum()) == (25, 25)
    if criterion == "magnitude":
        params = starts.dense(config, 1, dataset)["params"]
        sizes = [np.abs(np.asarray(params[name]["kernel"])) for name in ("first", "last")]
        for found, expected in zip((first, last), kept(sizes, 0.25), strict=True):
            np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------ what is kept on disk


def test_masks_are_found_once(dataset, tmp_path, monkeypatch):
    snip_config = dataclasses.replace(TWO, criterion="snip")
    first = make(snip_config, dataset, cache=tmp_path / "cache")
    [path] = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(criteria, "_snip_scores", lambda *args: pytest.fail("scored again"))
    for change in ({"method": "ai", "ai_steps": 2}, {"learning_rate": 1.0, "experiment": "other"}):
        start = make(dataclasses.replace(snip_config, **change), dataset, cache=tmp_path / "cache")
        jax.tree.map(np.testing.assert_array_equal, start.mask, first.mask)
        assert eoi.masks.density(start.mask) == 0.25
    monkeypatch.setattr(eoi, "approximate_isometry", lambda *a, **b: pytest.fail("solved again"))
    again = make(
        dataclasses.replace(snip_config, method="ai", ai_steps=2), dataset, cache=tmp_path / "cache"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not np.array_equal(again.variables["params"]["first"]["kernel"], 0)
    names = {
        criteria.part_digest(config, seed, *criteria.FIELDS)
        for config in (
            snip_config,
            dataclasses.replace(snip_config, density=0.5),
            dataclasses.replace(snip_config, scale=2.0),
        )
        for seed in (1, 2)
    }
    assert len(names) == 6
    assert path.stem in names
    heads = dataclasses.replace(snip_config, model="gpt_plain", attention=True, perceptrons=False)
    both = dataclasses.replace(heads, perceptrons=True)
    kept = {criteria.part_digest(one, 1, *criteria.FIELDS) for one in (heads, both)}
    assert len(kept) == 2


def test_kept_trees_are_whole_and_named_if_they_are_not(tmp_path):
    tree = {"a": jnp.arange(3), "b": (jnp.array(True), jnp.ones((2, 2), jnp.bfloat16))}
    like = {"a": jnp.zeros(3), "b": (jnp.zeros(5), jnp.zeros((2, 2)))}  # of one a mask is a scalar
    assert get_or_compute(None, "x", like, lambda: tree) is tree
    with pytest.raises(ZeroDivisionError):
        get_or_compute(tmp_path, "x", like, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []
    plain = {"a": tree["a"], "b": (tree["b"][0], jnp.ones((2, 2)))}
    get_or_compute(tmp_path, "x", like, lambda: plain)
    again = get_or_compute(tmp_path, "x", like, lambda: 1 / 0)
    jax.tree.map(np.testing.assert_array_equal, again, plain)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    for other in ({**like, "a": jnp.zeros(4)}, {**like, "c": jnp.zeros(1)}, {"a": like["a"]}):
        with refuses("x.npz", tmp_path):
            get_or_compute(tmp_path, "x", other, lambda: plain)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:50])
    with refuses("x.npz", tmp_path):
        get_or_compute(tmp_path, "x", like, lambda: plain)


def test_attention_is_pruned_if_asked():
    leaf = jax.ShapeDtypeStruct((12, 6, 384, 64), "float32")
    path = tuple(map(jax.tree_util.DictKey, ("hidden", "attention", "query", "kernel")))
    for attention in (False, True):
        where = models.where("deit_s", attention=attention)
        assert where(path, leaf) == attention
        assert where is models.where("deit_s", attention=attention)  # programs compile once
    assert models.layout(path, leaf).batch_axes == 2
