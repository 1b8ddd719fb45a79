"""Transformers: what their blocks see, which of their kernels are sparse, and text to train on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

from experiments import data, models
from experiments.config import Train, digest, to_dict
from experiments.studies import measure
from experiments.training import starts, steps

SIZES = {"depth": 2, "width": 16}


@functools.cache
def built(name):
    """A small network and its variables."""
    model = models.create(name, **SIZES)
    shape = (1, *models.input_shape(name))
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))


def characters_of(split):
    return "".join(chr(code + 31) if code else "\n" for code in split.images.ravel())


@pytest.mark.slow
def test_no_character_sees_those_after_it():
    model, variables = built("gpt")
    codes = np.array(data.load("topics").train.images[:1])
    changed = codes.copy()
    changed[0, 40] = (changed[0, 40] + 1) % 96
    apply = jax.jit(model.apply)
    before, after = (
        np.asarray(apply(variables, jax.nn.one_hot(each, 96))) for each in (codes, changed)
    )
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).any(axis=-1).all()


@pytest.mark.slow
def test_every_patch_sees_all():
    _, variables = built("vit")
    model = models.create("vit", **SIZES)
    tokens = jax.random.normal(jax.random.key(1), (5, 16))
    one = jnp.zeros(16).at[0].set(1.0)
    changed = models.transformer.blocks_alone(model, variables, tokens.at[4].add(one))
    assert (models.transformer.blocks_alone(model, variables, tokens) != changed).any(-1).all()


@pytest.mark.slow
def test_a_network_is_its_embedding_blocks_and_last_layer():
    """Without normalization, in float64 by hand but for the blocks."""
    model, variables = built("gpt_plain")
    params = variables["params"]
    text = jax.nn.one_hot(data.load("topics").test.images[:2], 96)
    tokens = text @ params["embedding"] + params["position"]
    tokens = models.transformer.blocks_alone(model, variables, tokens)
    expected = tokens @ params["last"]["kernel"] + params["last"]["bias"]
    np.testing.assert_allclose(model.apply(variables, text), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_plain_networks_have_no_normalization_and_small_branches(name):
    normed, plain = (built(each)[1]["params"] for each in (name, f"{name}_plain"))
    assert any("norm" in layer for layer in normed["hidden"])
    assert not any("norm" in layer for layer in (*plain, *plain["hidden"]))
    for branch in ("scale1", "scale2"):
        assert (normed["hidden"][branch] == 1).all()
        np.testing.assert_allclose(plain["hidden"][branch], 0.5)  # 1 / sqrt(2 * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [{}, {"attention": True}, {"attention": True, "perceptrons": False}]
)
def test_sparse_kernels_are_isometries_and_the_others_dense(parts):
    config = Train(
        **{"model": "gpt", "data": "topics", "criterion": "uniform", "density": 0.25, **SIZES},
        **parts,
    )
    start = starts.make(config, 1, data.load("topics"))
    hidden, mask = start.variables["params"]["hidden"], start.mask["hidden"]
    for layer in ("mlp_in", "mlp_out"):
        assert (mask[layer]["kernel"].ndim > 0) == config.perceptrons
    for layer in ("query", "key", "value", "out"):
        kernel, kept = hidden["attention"][layer]["kernel"], mask["attention"][layer]["kernel"]
        assert (kept.ndim > 0) == config.attention
        if not config.attention:
            continue
        assert np.mean(kept) == pytest.approx(0.25, abs=0.01)
        for head in np.asarray(kernel, np.float64).reshape(-1, *kernel.shape[2:]):
            narrow = head if head.shape[0] <= head.shape[1] else head.T
            np.testing.assert_allclose(narrow @ narrow.T, np.eye(len(narrow)), atol=1e-5)


def test_nothing_to_prune_is_refused():
    with refuses("perceptrons=False", "attention=True"):
        Train(model="gpt", perceptrons=False)


def test_fields_that_came_later_change_no_digest():
    assert not {"optimizer", "perceptrons"} & set(to_dict(Train()))
    assert digest(Train(optimizer="adamw")) != digest(Train())


def test_texts_are_followed_by_their_labels():
    topics = data.load("topics")
    for split in (topics.train, topics.validation, topics.test):
        np.testing.assert_array_equal(split.images[:, 1:], split.labels[:, :-1])
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    assert "statement" in characters_of(topics.train)
    text = topics.augment(jax.random.key(0), topics.test.images[:2])
    assert text.shape == (2, *topics.image_shape) == (2, 64, 96)
    np.testing.assert_array_equal(jnp.argmax(text, -1), topics.test.images[:2])
    np.testing.assert_array_equal(text.sum(-1), 1)


def test_no_paragraph_is_in_two_splits():
    """What is tested on must not have been trained on, so repeated paragraphs count once."""
    topics = data.load("topics")
    train = set(characters_of(topics.train).split("\n\n"))
    tested = [part for part in characters_of(topics.test).split("\n\n") if len(part) > 80]
    assert len(tested) > 50
    assert not train.intersection(tested)


@pytest.mark.slow
def test_the_loss_of_a_text_is_the_mean_over_its_characters():
    labels = jnp.array([[0, 2], [1, 1]])
    logits = jax.random.normal(jax.random.key(0), (2, 2, 3))
    loss, correct = steps._losses(logits, labels)
    one_by_one = [steps._losses(logits[:, t], labels[:, t]) for t in (0, 1)]
    np.testing.assert_allclose(loss, (one_by_one[0][0] + one_by_one[1][0]) / 2, rtol=1e-6)
    np.testing.assert_allclose(correct, (one_by_one[0][1] + one_by_one[1][1]) / 2)


def test_a_step_of_adamw_is_that_of_optax_under_the_mask():
    params = {"kernel": jnp.array([[1.0, 0.0], [2.0, 3.0]]), "bias": jnp.ones(2)}
    mask = {"kernel": params["kernel"] != 0, "bias": jnp.array(True)}
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), params)
    optimizer_of = steps.sparse_optimizer(10, optimizer="adamw", momentum=0.8, weight_decay=0.1)
    tx = optimizer_of(jax.random.key(0), mask, 0.01)
    updates, _ = tx.update(grads, tx.init(params), params)
    reference = optax.adamw(0.01, b1=0.8, weight_decay=0.1)
    expected, _ = reference.update(grads, reference.init(params), params)
    np.testing.assert_allclose(updates["bias"], expected["bias"])
    np.testing.assert_allclose(
        updates["kernel"], jnp.where(mask["kernel"], expected["kernel"], 0), rtol=1e-6
    )


@pytest.mark.slow
def test_the_spectrum_of_a_transformer_is_that_of_its_blocks():
    """Branches without weight leave the identity, whose singular values are all one."""
    config = Train(model="gpt", data="topics", method="dense", density=1.0, **SIZES)
    topics = data.load("topics")
    start = starts.make(config, 1, topics)
    hidden = start.variables["params"]["hidden"]
    silent = {**hidden, "scale1": 0 * hidden["scale1"], "scale2": 0 * hidden["scale2"]}
    variables = {"params": {**start.variables["params"], "hidden": silent}}
    found = measure.spectrum_of(config, topics, starts.Start(variables, start.mask))
    assert found == {
        "spectrum_mean": pytest.approx(1, abs=1e-5),
        "spectrum_min": pytest.approx(1, abs=1e-5),
        "spectrum_max": pytest.approx(1, abs=1e-5),
        "spectrum_std": pytest.approx(0, abs=1e-5),
    }
