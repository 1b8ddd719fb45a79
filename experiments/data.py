"""Image classification sets as arrays in memory, normalized and flattened on request."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["NAMES", "Dataset", "load"]

NAMES = ("digits", "mnist")


class Dataset(NamedTuple):
    """Images ``(size, height, width, channels)`` float32, normalized, and int32 labels."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: ``"digits"``, the 1797 8 x 8 digits that scikit-learn carries (a fifth of them, drawn
            with a fixed seed, is the test set), or ``"mnist"`` through tensorflow-datasets.
        data_dir: folder of tensorflow-datasets; default: its own (``TFDS_DATA_DIR`` or the home
            folder), where a missing set is downloaded to.

    Returns:
        A :class:`Dataset`.

    Raises:
        ValueError: for another name.
        FileNotFoundError: if the set is not there and could not be downloaded.
        ImportError: if the package that carries or reads the set is not installed.

    Example:
        >>> from experiments import data
        >>> data.load("digits").train_images.shape
        (1438, 8, 8, 1)
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(data_dir)
    raise ValueError(f"name={name!r} is outside {NAMES}. Choose one of these data sets.")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = raw.images[..., None].astype(np.float32) / 16
    labels = raw.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[len(images) // 5 :], order[: len(images) // 5]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Dataset("digits", images[train], labels[train], images[test], labels[test], 10)


def _mnist(data_dir: str | None) -> Dataset:
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir!r} is not a folder. Give the folder that holds mnist/, or leave "
            "it out to let tensorflow-datasets download the set."
        )
    train_images, train_labels = _mnist_split("train", data_dir)
    test_images, test_labels = _mnist_split("test", data_dir)
    return Dataset("mnist", train_images, train_labels, test_images, test_labels, 10)


def _mnist_split(split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds

    try:
        source = tfds.data_source("mnist", split=split, data_dir=data_dir)
    except Exception as error:
        raise FileNotFoundError(
            f"MNIST is not in data_dir={data_dir!r} and could not be downloaded ({error}). "
            "Run once with a network connection, or use --data digits, which needs none."
        ) from error
    samples = list(source)
    images = np.stack([sample["image"] for sample in samples]).astype(np.float32) / 255
    labels = np.array([sample["label"] for sample in samples], np.int32)
    return (images - np.float32(0.1307)) / np.float32(0.3081), labels
