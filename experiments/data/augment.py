"""Random changes of training images: pure, jittable functions of one key and one batch.

Images are ``(size, height, width, channels)`` float32 in [0, 1]; each image of a batch gets another
random change. Nothing is padded or copied per image, and every shape is static, so all functions
run inside a jitted step and under :func:`jax.vmap` over keys.
"""

from __future__ import annotations

from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax.typing import Array

__all__ = ["cifar", "crop", "flip", "imagenet", "jitter", "rotate", "tiny_imagenet", "unchanged"]


def crop(key: Array, images: Array, padding: int) -> Array:
    """Pad each image by reflection and crop it to its size at a random place.

    Equal to ``numpy.pad(mode="reflect")`` and a crop whose corner is uniform over the
    ``(2 padding + 1)²`` possible ones; the two are one gather.

    Args:
        key: PRNG key.
        images: ``(size, height, width, channels)``, of any dtype.
        padding: Pixels on each side, in [0, min(height, width)).
    """
    size, height, width = images.shape[:3]
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"padding={padding} is outside [0, {min(height, width)}): a reflection of an image of "
            f"{height} x {width} has no more pixels. Pad less."
        )
    shifts = jax.random.randint(key, (2, size, 1), -padding, padding + 1)
    rows = _reflect(jnp.arange(height) + shifts[0], height)
    columns = _reflect(jnp.arange(width) + shifts[1], width)
    return images[jnp.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(key: Array, images: Array) -> Array:
    """Exchange left and right in each image with probability one half.

    Args:
        key: PRNG key.
        images: ``(size, height, width, channels)``, of any dtype.
    """
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def jitter(key: Array, images: Array, *, hue: float, saturation: float) -> Array:
    """Change saturation and hue of each image at random.

    Saturation blends with the gray image, ``gray + f (image - gray)``, ``f`` uniform in
    ``1 ± saturation``, as torchvision and Pillow do. Hue then turns by an angle that is uniform in
    ``± hue`` turns.

    Args:
        key: PRNG key.
        images: ``(size, height, width, 3)`` float, red, green and blue in [0, 1].
        hue: Largest angle, in turns, in [0, 0.5].
        saturation: Largest change of the factor, in [0, 1].

    Returns:
        Images of the same shape, in [0, 1].
    """
    remedy = "Give 0 for no change."
    checks.number(hue, "hue", interval="[0, 0.5]", remedy=remedy)
    checks.number(saturation, "saturation", interval="[0, 1]", remedy=remedy)
    for_hue, for_saturation = jax.random.split(key)
    shape = (len(images), 1, 1, 1)
    factor = jax.random.uniform(for_saturation, shape, minval=1 - saturation, maxval=1 + saturation)
    gray = dm_pix.rgb_to_grayscale(images)
    images = jnp.clip(gray + factor * (images - gray), 0, 1)
    turns = jax.random.uniform(for_hue, (len(images),), minval=-hue, maxval=hue)
    return jax.vmap(dm_pix.adjust_hue)(images, turns)


def rotate(images: Array, degrees: Array) -> Array:
    """Rotate each image counterclockwise about its center; what comes from outside is 0.

    The nearest pixel is taken, as torchvision does by default.

    Args:
        images: ``(size, height, width, channels)`` float.
        degrees: ``(size,)``, one angle an image.
    """

    def one(image: Array, angle: Any) -> Array:
        return dm_pix.rotate(image, angle, order=0, mode="constant")

    # Coordinates are products of matrices: a GPU's TF32 would round them to ten bits.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(images, jnp.deg2rad(degrees))


def unchanged(key: Array, images: Array) -> Array:
    """Return the images as they are: MNIST, and other sets whose classes a flip would mix up.

    Returns:
        ``images``.
    """
    del key
    return images


def cifar(key: Array, images: Array) -> Array:
    """Augment CIFAR: reflection by 4 pixels, random crop, flip.

    Args:
        key: PRNG key.
        images: ``(size, height, width, channels)`` in [0, 1].
    """
    for_crop, for_flip = jax.random.split(key)
    return flip(for_flip, crop(for_crop, images, 4))


def tiny_imagenet(key: Array, images: Array) -> Array:
    """Augment Tiny ImageNet: as CIFAR, with hue and saturation ± 0.05 and rotation by ± 10°.

    Args:
        key: PRNG key.
        images: ``(size, height, width, 3)`` in [0, 1].
    """
    for_crop, for_jitter, for_flip, for_angle = jax.random.split(key, 4)
    images = crop(for_crop, images, 4)
    images = jitter(for_jitter, images, hue=0.05, saturation=0.05)
    images = flip(for_flip, images)
    degrees = jax.random.uniform(for_angle, (len(images),), minval=-10, maxval=10)
    return rotate(images, degrees)


def imagenet(key: Array, images: Array) -> Array:
    """Augment ImageNet by flips alone.

    Random crops of random size and shape need the images at their full size, which memory does
    not hold.

    Args:
        key: PRNG key.
        images: ``(size, height, width, channels)``.
    """
    return flip(key, images)


def _reflect(index: Array, size: int) -> Array:
    """Bring indices that are less than ``size`` outside back by reflection at the border pixels."""
    return (size - 1) - jnp.abs((size - 1) - jnp.abs(index))
