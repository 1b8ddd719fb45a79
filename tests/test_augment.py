"""Augmentation against NumPy, colorsys and Pillow; its draws against their distributions."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from PIL import Image, ImageEnhance

from experiments.data import augment

POLICIES = [augment.cifar, augment.tiny_imagenet, augment.imagenet, augment.unchanged]
CROP = jax.jit(augment.crop, static_argnums=2)
ROTATE = jax.jit(augment.rotate)


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def test_crops_are_those_of_the_padded_image_and_uniform():
    """Each is one of the 9² windows that NumPy cuts from the image it padded itself."""
    size, padding = 8100, 4
    image = np.arange(7 * 6 * 2).reshape(7, 6, 2)
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode="reflect")
    windows = {
        padded[row : row + 7, column : column + 6].tobytes(): 9 * row + column
        for row in range(9)
        for column in range(9)
    }
    assert len(windows) == 81
    found = CROP(jax.random.key(0), np.tile(image, (size, 1, 1, 1)), padding)
    drawn = [windows[one.tobytes()] for one in np.asarray(found, np.int64)]
    counts = np.bincount(drawn, minlength=81)
    # Chi-squared of 80 degrees of freedom: mean 80, variance 160. Five standard errors.
    assert abs(((counts - 100) ** 2 / 100).sum() - 80) < 5 * np.sqrt(160)


def test_crops_keep_the_type():
    images = np.arange(2 * 5 * 5, dtype=np.uint8).reshape(2, 5, 5, 1)
    assert jax.eval_shape(lambda key: CROP(key, images, 2), jax.random.key(0)).dtype == np.uint8


@pytest.mark.parametrize("padding", [-1, 5])
def test_more_padding_than_reflection_has_is_refused(padding):
    with refuses("padding", padding):
        augment.crop(jax.random.key(0), jnp.ones((1, 5, 6, 1)), padding)


def test_half_of_the_images_are_flipped():
    size = 10_000
    image = random_images(3, 4, 2)
    found = np.asarray(jax.jit(augment.flip)(jax.random.key(0), np.tile(image, (size, 1, 1, 1))))
    flipped = (found == image[:, ::-1]).all(axis=(1, 2, 3))
    assert (flipped | (found == image).all(axis=(1, 2, 3))).all()
    # The count of 10 000 fair draws has standard deviation 50: four of them.
    assert abs(flipped.sum() - size / 2) < 4 * 50


@pytest.fixture(scope="module")
def hues():
    """Images and the same with another hue, as arrays (image, pixel, hue-saturation-value)."""
    images = random_images(200, 3, 3, 3)
    jitter = jax.jit(lambda key, x: augment.jitter(key, x, hue=0.05, saturation=0))
    pair = (images, np.asarray(jitter(jax.random.key(0), images), np.float64))
    return [
        np.array([[colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)] for x in y]) for y in pair
    ]


def test_hue_turns_by_one_angle_an_image_and_nothing_else_changes(hues):
    before, after = hues
    np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-5)
    turns = (after - before)[..., 0]
    turns -= np.rint(turns)
    np.testing.assert_allclose(turns, np.broadcast_to(turns[:, :1], turns.shape), atol=2e-4)
    # Uniform in ± 0.05: standard deviation 0.1 / sqrt(12); four standard errors of 200 draws.
    assert 0.049 < abs(turns).max() < 0.0502
    assert abs(turns[:, 0].mean()) < 4 * 0.1 / np.sqrt(12 * 200)


def test_saturation_blends_with_gray_as_pillow_does():
    pixels = np.random.default_rng(1).integers(40, 210, size=(50, 4, 4, 3)).astype(np.uint8)
    jitter = jax.jit(lambda key, x: augment.jitter(key, x, hue=0, saturation=0.2))
    found = np.asarray(jitter(jax.random.key(0), jnp.asarray(pixels / 255, np.float32))) * 255
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    away = pixels - gray[..., None]
    factors = ((found - gray[..., None]) * away).sum(axis=(1, 2, 3)) / (away**2).sum(axis=(1, 2, 3))
    assert 0.8 <= factors.min() < 0.83
    assert 1.17 < factors.max() <= 1.2
    for one, image, factor in zip(found, pixels, factors.tolist(), strict=True):
        expected = np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))
        np.testing.assert_allclose(one, expected, atol=1.5)  # Pillow rounds gray, then the blend


def test_jitter_of_nothing_changes_nothing_and_colors_stay_in_range():
    images = random_images(20, 5, 5, 3)
    images[:5] = np.rint(images[:5])  # corners of the cube, gray ones among them
    images[5] = images[5, ..., :1]
    for amount, tolerance in ((0.0, 1e-5), (0.5, 1.0)):
        jitter = jax.jit(lambda key, x, a=amount: augment.jitter(key, x, hue=a, saturation=a))
        found = np.asarray(jitter(jax.random.key(0), images))
        np.testing.assert_allclose(found, images, atol=tolerance)
        assert 0 <= found.min() <= found.max() <= 1 + 1e-6
        # Gray has no hue; its weights in the library add up to 0.9999.
        np.testing.assert_allclose(found[5], images[5], atol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("hue", 0.6), ("saturation", -1.0)])
def test_bad_amounts_of_jitter_are_named(name, value):
    amounts = {"hue": 0.0, "saturation": 0.0, name: value}
    with refuses(name, value):
        augment.jitter(jax.random.key(0), jnp.ones((1, 2, 2, 3)), **amounts)


def test_quarter_turns_are_those_of_numpy():
    images = random_images(5, 6, 6, 3)
    found = ROTATE(images, np.float32([0, 90, 180, 270, -90]))
    for one, image, quarters in zip(found, images, (0, 1, 2, 3, 3), strict=True):
        np.testing.assert_array_equal(one, np.rot90(image, quarters))


@pytest.mark.parametrize("degrees", [-10.0, 3.0, 10.0])
def test_rotation_takes_the_nearest_pixel_and_black_from_outside(degrees):
    """By the definition, one pixel at a time in float64; a tie may go either way."""
    size = 16
    image = random_images(size, size, 1) + 1
    found = np.asarray(ROTATE(image[None], np.float32([degrees])))[0]
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    center, wrong = (size - 1) / 2, 0
    for row in range(size):
        for column in range(size):
            # Upwards and to the right of the center, then back by the angle.
            right, up = column - center, center - row
            x, y = cosine * right + sine * up, cosine * up - sine * right
            source = np.rint([center - y, center + x]).astype(int)
            inside = (source >= 0).all() and (source < size).all()
            wrong += found[row, column] != (image[tuple(source)] if inside else 0)
    assert wrong <= 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_policies_are_pure_functions_of_key_and_batch(policy):
    """Under jit and under vmap over keys the same, one key one result, another key another."""
    images = jnp.asarray(random_images(4, 16, 16, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(policy, in_axes=(0, None)))(keys, images)
    jitted = jax.jit(policy)
    for key, expected in zip(keys, together, strict=True):
        np.testing.assert_allclose(jitted(key, images), expected, atol=1e-5)
    assert policy is augment.unchanged or not np.array_equal(together[0], together[1])
    assert policy is augment.unchanged or not np.array_equal(together[0], images)
    assert together.dtype == jnp.float32
    if policy is not augment.tiny_imagenet:  # hundreds of operations to compile one by one
        np.testing.assert_allclose(policy(keys[0], images), together[0], atol=1e-5)


def test_images_of_a_batch_draw_their_own_changes():
    image = random_images(16, 16, 3)
    jitted = jax.jit(augment.tiny_imagenet)
    found = np.asarray(jitted(jax.random.key(1), jnp.tile(image, (4, 1, 1, 1))))
    assert len({one.tobytes() for one in found}) == 4
