"""Readers of the data sets: uint8 images and int32 labels, from files or synthetic.

A reader takes the set's name, a folder, the shape of its images and the number of classes, and
returns the training and the test split. Labels outside the classes, images of another shape and
empty splits are refused. Errors name the faulty file, with the record or the line in it, and the
source of the set.
"""

from __future__ import annotations

import contextlib
import io
import operator
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = ["Reader", "Shape", "Split", "digits", "synthetic", "tfds", "tiny_imagenet", "topics"]

Shape: TypeAlias = tuple[int, ...]

_TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MANUAL = {
    "imagenet2012": "ImageNet has to be asked for at https://image-net.org: put "
    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {folder}/downloads/manual, and "
    "install tensorflow, which preparing this set needs, once."
}
_CHUNK = 1000  # records at once: bounds the memory of undecoded ones


class Split(NamedTuple):
    """Images ``(size, height, width, channels)`` uint8 and labels ``(size,)`` int32.

    Of texts the characters ``(size, length)`` uint8, and those that follow, int32.
    """

    images: np.ndarray
    labels: np.ndarray


Reader: TypeAlias = Callable[[str, str | None, Shape, int], tuple[Split, Split]]


def synthetic(
    name: str, data_dir: str | None, shape: Shape, num_classes: int
) -> tuple[Split, Split]:
    """Draw ten classes: a pattern of 4 x 4 uniform patches each, under uniform noise as large.

    Returns:
        640 images and 128 images, always the same.
    """
    del name, data_dir, num_classes
    height, width, channels = shape
    generator = np.random.default_rng(0)
    patches = generator.integers(128, size=(10, 4, 4, channels), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    patterns = patches[:, rows[:, None], columns]

    def split(size: int) -> Split:
        labels = (generator.permutation(size) % 10).astype(np.int32)
        noise = generator.integers(128, size=(size, *shape), dtype=np.uint8)
        return Split(patterns[labels] + noise, labels)

    return split(640), split(128)


def digits(name: str, data_dir: str | None, shape: Shape, num_classes: int) -> tuple[Split, Split]:
    """Take the digits of scikit-learn; a fifth of them, drawn with a fixed seed, is the test set.

    Returns:
        1438 images and 359 images, with values from 0 to 16.
    """
    from sklearn.datasets import load_digits

    del name, data_dir, shape, num_classes
    raw = load_digits()
    images, labels = raw.images[..., None].astype(np.uint8), raw.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[len(images) // 5 :], order[: len(images) // 5]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def topics(name: str, data_dir: str | None, shape: Shape, num_classes: int) -> tuple[Split, Split]:
    """Take the help texts of Python's standard library, ``pydoc_data.topics``, in pieces.

    They are about 370,000 characters of English and code, a little different from one version of
    Python to the next; a paragraph that stands in several topics counts once. Characters are
    numbered: 0 for the end of a line, 1 to 95 for the printable ones of ASCII; all others count as
    question marks.

    Returns:
        Pieces of one text, one after the other: the first nine tenths, and the rest.
    """
    from pydoc_data.topics import topics as found

    del name, data_dir, num_classes
    paragraphs: dict[str, str] = {}
    for _, topic in sorted(found.items()):
        text = topic.encode("ascii", "replace").decode()
        for paragraph in re.split("\n{2,}", text.strip("\n")):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    raw = np.frombuffer("\n\n".join(paragraphs.values()).encode(), np.uint8)
    codes = np.where((raw >= 32) & (raw < 127), raw - 31, ord("?") - 31)
    codes = np.where(raw == ord("\n"), 0, codes).astype(np.uint8)
    length = shape[0]
    size = (len(codes) - 1) // length
    texts, following = (
        codes[first : first + size * length].reshape(size, length) for first in (0, 1)
    )
    kept = size * 9 // 10
    following = following.astype(np.int32)
    return Split(texts[:kept], following[:kept]), Split(texts[kept:], following[kept:])


def tfds(
    name: str,
    data_dir: str | None,
    shape: Shape,
    num_classes: int,
    *,
    test: str = "test",
    resize: bool = False,
) -> tuple[Split, Split]:
    """Read a set through tensorflow-datasets, without TensorFlow, and prepare it if it is missing.

    Args:
        name: The set's name there.
        data_dir: Folder of prepared sets; default: tensorflow-datasets' own.
        shape: Height, width and channels of all images.
        num_classes: Labels are below it.
        test: Name of the split to test on.
        resize: Whether images of another size are resized, their shorter side to 8/7 of what is
            kept, and cropped at the center; default: they are refused.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir!r} is not a folder. Give the folder that holds {name}/, or leave "
            "it out to let tensorflow-datasets download the set."
        )
    sources = [_source(name, split, data_dir) for split in ("train", test)]
    _check_memory(name, sum(len(source) for source in sources), shape)
    train, tested = (_decode_all(source, shape, num_classes, resize) for source in sources)
    return train, tested


def tiny_imagenet(
    name: str, data_dir: str | None, shape: Shape, num_classes: int
) -> tuple[Split, Split]:
    """Read Tiny ImageNet from the folder of its official archive; the test split is its ``val``.

    Args:
        name: Not used.
        data_dir: The folder that holds ``tiny-imagenet-200``.
        shape: Height, width and channels of all images.
        num_classes: Number of its classes, 200.

    Returns:
        The training images, interleaved by class, and the labelled validation images. Classes are
        numbered in the order of their WordNet names.
    """
    del name
    root = Path(data_dir or ".") / "tiny-imagenet-200"
    if not root.is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir!r} has no folder tiny-imagenet-200. Download {_TINY}, unpack it, "
            "and give the folder that it is unpacked into."
        )
    wnids = sorted(_lines(root / "wnids.txt"))
    number = {wnid: label for label, wnid in enumerate(wnids)}
    classes = [
        sorted((root / "train" / wnid / "images").glob("*.JPEG"), key=_index) for wnid in wnids
    ]
    counts = [len(paths) for paths in classes]
    if (
        len(number) != num_classes
        or len(wnids) != num_classes
        or min(counts) < 1
        or min(counts) < max(counts)
    ):
        raise ValueError(
            f"{root}/train has {len(number)} classes of {min(counts, default=0)} to "
            f"{max(counts, default=0)} images, and not {num_classes} of one size. Unpack {_TINY} "
            "again."
        )
    # Image by image of every class, for sorted by class the last tenth would be twenty classes.
    train = [
        (path, label) for paths in zip(*classes, strict=True) for label, path in enumerate(paths)
    ]
    annotations, test = root / "val" / "val_annotations.txt", []
    for line, text in enumerate(_lines(annotations), 1):
        image, wnid = (*text.split("\t"), "", "")[:2]
        if wnid not in number:
            raise ValueError(
                f"{annotations}, line {line}, names the class {wnid!r}, which is outside those of "
                f"{root / 'wnids.txt'}. Unpack {_TINY} again."
            )
        test.append((root / "val" / "images" / image, number[wnid]))
    if not test:
        raise ValueError(f"{annotations} has no lines. Unpack {_TINY} again.")
    return _read_files(train, shape), _read_files(test, shape)


def _source(name: str, split: str, data_dir: str | None) -> Any:
    import tensorflow_datasets

    skip = {"image": tensorflow_datasets.decode.SkipDecoding()}  # Pillow alone is twice as fast
    try:
        if name not in _MANUAL:
            _prepare(name, data_dir)
        return tensorflow_datasets.data_source(name, split=split, data_dir=data_dir, decoders=skip)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        prepared = _prepared(name, data_dir)
        if prepared is not None:
            raise ValueError(
                f"{prepared} is there, but has no images of the split {split!r} that can be read "
                f"({reason}). Delete it and prepare it again."
            ) from error
        folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        remedy = _MANUAL.get(
            name, "Load it once with a network connection, for it to be downloaded there."
        )
        raise FileNotFoundError(
            f"{name} is not in data_dir={folder!r} and could not be prepared "
            f"({reason}). {remedy.format(folder=folder)} The sets 'digits' "
            "and 'made' need no files."
        ) from error


def _prepared(name: str, data_dir: str | None) -> str | None:
    """Return the folder of a set that is prepared, None for another."""
    import tensorflow_datasets

    with contextlib.suppress(Exception):
        builder = tensorflow_datasets.builder(name, data_dir=data_dir)
        return str(builder.data_path) if builder.is_prepared() else None
    return None


def _prepare(name: str, data_dir: str | None) -> None:
    """Download MNIST or CIFAR unless it is there, and prepare it without TensorFlow.

    Their builders open files by TensorFlow and hand on arrays, which it would encode: Python opens
    files as well, and images are encoded by Pillow.
    """
    import tensorflow_datasets
    from PIL import Image
    from tensorflow_datasets.image_classification import cifar, mnist

    builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format="array_record")
    if builder.is_prepared():
        return
    gfile = types.SimpleNamespace(GFile=open)
    cifar.tf = mnist.tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    generate = builder._generate_examples

    def examples(*arguments: Any, **options: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, example in generate(*arguments, **options):
            yield key, {**example, "image": Image.fromarray(example["image"].squeeze())}

    builder._generate_examples = examples
    builder.download_and_prepare()


def _decode_all(source: Any, shape: Shape, num_classes: int, resize: bool = False) -> Split:
    split = source.dataset_info.splits[source.split]
    if not len(source):
        folders = {str(Path(path).parent) for path in split.filepaths}
        raise ValueError(
            f"{', '.join(folders)} has no images in the split {source.split!r}. Delete it and "
            "prepare it again."
        )
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    position, doubt = 0, "at or after "  # which record of a group cannot be read is not known
    try:
        for first in range(0, len(source), _CHUNK):
            position = first
            indices = list(range(first, min(first + _CHUNK, len(source))))
            records = source.__getitems__(indices)
            doubt = ""
            for record in records:
                images[position] = _decode(record["image"], shape, resize)
                labels[position] = _label(record["label"], num_classes)
                position += 1
            doubt = "at or after "
    except Exception as error:
        ends = np.cumsum(split.shard_lengths)
        shard = min(int(np.searchsorted(ends, position, side="right")), len(split.filepaths) - 1)
        path, index = split.filepaths[shard], position - (ends[shard] - split.shard_lengths[shard])
        raise ValueError(
            f"{path} cannot be read {doubt or 'at '}record {index} of it, image {position} of the "
            f"split ({type(error).__name__}: {error}). Delete {Path(path).parent} and prepare it "
            "again."
        ) from error
    return Split(images, labels)


def _label(value: Any, num_classes: int) -> int:
    label = operator.index(value)
    if not 0 <= label < num_classes:
        raise ValueError(f"its label {label} is outside [0, {num_classes - 1}]")
    return label


def _decode(encoded: bytes, shape: Shape, resize: bool = False) -> np.ndarray:
    """Decode one image of 8 bits a channel; resize it if that is asked for, or refuse its size."""
    from PIL import Image, ImageOps

    height, width, channels = shape
    # Some files of sets in color are gray, or have the colors of print; Pillow converts them.
    modes = ("L",) if channels == 1 else ("RGB", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")
    with Image.open(io.BytesIO(encoded)) as opened:
        if opened.mode not in modes:
            kind = "gray" if channels == 1 else "color"
            raise ValueError(f"its image is of mode {opened.mode!r}, not {kind} with 8 bits")
        if opened.size != (width, height) and not resize:
            found = f"{opened.size[1]} x {opened.size[0]}"
            raise ValueError(f"its image has {found} pixels, not {height} x {width}")
        image = opened.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        # An eighth of each side goes, half at each end: resize to 256, crop 224.
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, bleed=1 / 16)
    return np.asarray(image).reshape(shape)


def _read_files(files: list[tuple[Path, int]], shape: Shape) -> Split:
    images = np.empty((len(files), *shape), np.uint8)
    for row, (path, _) in enumerate(files):
        try:
            images[row] = _decode(path.read_bytes(), shape)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Unpack {_TINY} again."
            ) from error
    return Split(images, np.array([label for _, label in files], np.int32))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Unpack {_TINY} again.")
    return path.read_text().split("\n")[:-1]


def _index(path: Path) -> int:
    """Return the number at the end of a file's name, ``n01443537_10.JPEG``."""
    return int(path.stem.rsplit("_", 1)[1])


def _check_memory(name: str, size: int, shape: Shape) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = size * int(np.prod(shape))
    if needed > memory:
        side = int((memory / size / shape[-1]) ** 0.5)
        raise ValueError(
            f"image_shape={shape} makes the {size:,} images of {name} {needed / 2**30:.0f} GiB, "
            f"more than the {memory / 2**30:.0f} GiB of this machine's memory. Give a shape of at "
            f"most ({side}, {side}, {shape[-1]}), or take a larger machine."
        )
