"""Image classification sets and a text by name: uint8 arrays in memory, in three splits.

:func:`load` returns a :class:`Dataset`, whose ``normalize`` and ``augment`` are pure functions of a
batch, to be called inside a jitted step. TensorFlow is not needed: tensorflow-datasets reads its
sets without it (and prepares them, with the package ``importlib_resources``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax.typing import Array
from experiments.data import augment, readers
from experiments.data.readers import Shape, Split

__all__ = ["ANY_SHAPE", "NAMES", "Dataset", "Split", "Text", "load"]

_Augment: TypeAlias = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images ``(size, height, width, channels)`` uint8 with labels, and how they are transformed.

    Attributes:
        name: Name of the set.
        train: Images to train on.
        validation: Images to choose settings by, held out from the training images.
        test: Images for the accuracy that is reported.
        num_classes: Number of classes; labels are in [0, num_classes).
        scale: Largest value of a pixel.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        change: Random change of training images in [0, 1].
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    scale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    change: _Augment

    @property
    def image_shape(self) -> Shape:
        """Shape of one example as a network takes it: height, width and channels of an image."""
        return tuple(self.train.images.shape[1:])

    def normalize(self, images: Any) -> Array:
        """Turn pixels into what a network takes, ``(images / scale - mean) / std`` in float32.

        Example:
            >>> from experiments import data
            >>> synthetic = data.load("made")
            >>> synthetic.normalize(synthetic.test.images[:2]).shape
            (2, 28, 28, 1)
        """
        return self._standardize(self._unit(images))

    def augment(self, key: Array, images: Any) -> Array:
        """Change each image at random and normalize it.

        Example:
            >>> import jax
            >>> from experiments import data
            >>> synthetic = data.load("made")
            >>> synthetic.augment(jax.random.key(0), synthetic.train.images[:2]).shape
            (2, 28, 28, 1)
        """
        return self._standardize(self.change(key, self._unit(images)))

    def _unit(self, images: Any) -> Array:
        return jnp.asarray(images).astype(jnp.float32) / self.scale

    def _standardize(self, unit: Array) -> Array:
        return (unit - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


class Text(Dataset):
    """Texts ``(size, length)`` uint8, with the next characters as labels of the same shape.

    Networks take the characters one-hot. There is no random augmentation.
    """

    @property
    def image_shape(self) -> Shape:
        """Characters of a text, and how many there are to choose from."""
        return self.train.images.shape[1], self.num_classes

    def normalize(self, images: Any) -> Array:
        """Return characters one-hot, in float32.

        Example:
            >>> from experiments import data
            >>> topics = data.load("topics")
            >>> topics.normalize(topics.test.images[:2]).shape
            (2, 64, 96)
        """
        return jax.nn.one_hot(jnp.asarray(images), self.num_classes)

    def augment(self, key: Array, images: Any) -> Array:
        """Return what :meth:`normalize` does."""
        del key
        return self.normalize(images)


class _Spec(NamedTuple):
    """What is known of a set before any file is read."""

    read: readers.Reader
    shape: Shape
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    change: _Augment = augment.unchanged
    scale: int = 255
    any_shape: bool = False
    kind: type[Dataset] = Dataset


_GRAY = (28, 28, 1)
_cifar = functools.partial(_Spec, readers.tfds, (32, 32, 3), change=augment.cifar)
_SPECS = {
    "made": _Spec(readers.synthetic, _GRAY, 10, (0.5,), (0.2,), any_shape=True),
    "digits": _Spec(readers.digits, (8, 8, 1), 10, (0.30492586,), (0.3758863,), scale=16),
    "mnist": _Spec(readers.tfds, _GRAY, 10, (0.1307,), (0.3081,)),
    "fashion_mnist": _Spec(readers.tfds, _GRAY, 10, (0.2860,), (0.3530,)),
    "cifar10": _cifar(10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _cifar(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": _Spec(
        readers.tiny_imagenet, (64, 64, 3), 200, (0.5,) * 3, (0.5,) * 3, augment.tiny_imagenet
    ),
    "imagenet2012": _Spec(
        functools.partial(readers.tfds, test="validation", resize=True),
        (224, 224, 3),
        1000,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        augment.imagenet,
        any_shape=True,
    ),
    "topics": _Spec(readers.topics, (64, 96), 96, (), (), kind=Text),
}

NAMES = tuple(_SPECS)
ANY_SHAPE = tuple(name for name, spec in _SPECS.items() if spec.any_shape)
"""Sets whose images come in the shape that :func:`load` is asked for."""


def load(
    name: str,
    data_dir: str | None = None,
    *,
    image_shape: Shape | None = None,
    validation: float = 0.1,
) -> Dataset:
    """Load a data set.

    ===================  ========================================================================
    ``"made"``           synthetic, in no time: ten easy classes of any ``image_shape``
    ``"digits"``         the 1797 digits that scikit-learn carries; a fifth is the test set
    ``"mnist"``          and ``"fashion_mnist"``, ``"cifar10"``, ``"cifar100"``: through
                         tensorflow-datasets, which downloads a set that is not there
    ``"tiny_imagenet"``  from the folder tiny-imagenet-200 of the official archive
    ``"imagenet2012"``   through tensorflow-datasets, from the official archives; all images are
                         kept in memory, at ``image_shape``
    ``"topics"``         the help texts of Python's standard library, of which a network predicts
                         the next of 96 characters; the last tenth is the test set
    ===================  ========================================================================

    The labels of Tiny ImageNet's and ImageNet's test images are not public: there, the official
    validation images are the test split. Tiny ImageNet lies sorted by class and is interleaved, so
    that any run of 200 images has one of each class.

    Args:
        name: One of :data:`NAMES`.
        data_dir: Folder of the files. Default, with tensorflow-datasets: its own
            (``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``).
        image_shape: Height, width and channels of ``"made"`` (default (28, 28, 1)) and
            ``"imagenet2012"`` (default (224, 224, 3)); the other sets have one shape.
        validation: Fraction of the training images, the last ones, that become the validation
            split, in [0, 1).

    Returns:
        A :class:`Dataset`. Its arrays are shared between calls and cannot be written to.

    Raises:
        ValueError: For a name, shape or fraction out of range; for a file that cannot be read, that
            has a label outside the classes or an image of another shape, or gray images in color,
            with its name and the record; for an empty split; and for a set that is larger than
            this machine's memory.
        FileNotFoundError: If the set is not there and could not be downloaded.
        ImportError: If the package that carries or reads the set is not installed.

    Example:
        >>> from experiments import data
        >>> digits = data.load("digits")
        >>> digits.train.images.shape, len(digits.validation.labels), len(digits.test.labels)
        ((1294, 8, 8, 1), 144, 359)
    """
    if name not in _SPECS:
        raise ValueError(f"name={name!r} is outside {NAMES}. Choose one of these data sets.")
    checks.number(validation, "validation", interval="[0, 1)", remedy="Give 0 for no such split.")
    spec = _SPECS[name]
    shape = _shape(name, spec, image_shape)
    train, test = _read(name, data_dir, shape)
    kept = len(train.labels) - round(validation * len(train.labels))
    return spec.kind(
        name=name,
        train=Split(train.images[:kept], train.labels[:kept]),
        validation=Split(train.images[kept:], train.labels[kept:]),
        test=test,
        num_classes=spec.num_classes,
        scale=spec.scale,
        mean=spec.mean,
        std=spec.std,
        change=spec.change,
    )


def _shape(name: str, spec: _Spec, asked: Shape | None) -> Shape:
    if asked is None:
        return spec.shape
    shape = tuple(asked)
    if spec.any_shape:
        channels = "1 or more" if len(spec.mean) == 1 else str(len(spec.mean))
        if len(shape) != 3 or min(shape) < 1 or len(spec.mean) not in (1, shape[-1]):
            raise ValueError(
                f"image_shape={asked} is not a (height, width, channels) of {name!r}, all "
                f"positive, channels {channels}. Give three such numbers."
            )
    elif shape != spec.shape:
        raise ValueError(
            f"image_shape={asked} is not {spec.shape}, the shape of all images of {name!r}. Leave "
            "it out, or choose 'made' or 'imagenet2012', which come in any size."
        )
    return shape


@functools.lru_cache(maxsize=2)
def _read(name: str, data_dir: str | None, shape: Shape) -> tuple[Split, Split]:
    """Read a set once in a process: decoding takes seconds, and a sweep loads one set often."""
    splits = _SPECS[name].read(name, data_dir, shape, _SPECS[name].num_classes)
    for split in splits:
        split.images.flags.writeable = split.labels.flags.writeable = False
    return splits
